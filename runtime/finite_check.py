"""Check that the latents of a block are finite, without a wait for the device between two blocks.

On a CPU a block is looked at when it is made. On a GPU the largest entry is copied to pinned memory behind the block's
other work, and read before the block is handed out, while the device makes the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from ..errors import InferixError

Check = Callable[[], None]  # waits for a block and raises InferixError if it is not finite


def checked() -> None:
    """The check of a block that was found finite when it was made."""


class FiniteCheck:
    """Checks blocks of an engine. at_once: True where looking costs no wait, on a CPU.

    On a GPU it owns a scalar on the device and pinned slots, one for each block that was made and not yet read, in the
    dtype of latents: copies that convert would need memory on the device. older, latest: events of the blocks of the
    last two steps.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.at_once = device, dtype, device.type == "cpu"
        self.lock, self.free = Lock(), list[Tensor]()  # slots are put back by the decoder's thread
        self.largest = torch.empty((), dtype=dtype, device=device)
        self.older, self.latest = list[torch.cuda.Event](), list[torch.cuda.Event]()

    def begin_step(self) -> None:
        """Wait for the blocks of the step before the last: the host is one step ahead of the device, and no more."""
        for event in self.older:
            event.synchronize()
        self.older, self.latest = self.latest, []

    def now(self, block: int, latents: Tensor) -> None:
        """Raise InferixError for latents with an infinity or a NaN; waits for the device."""
        if not torch.isfinite(latents).all():
            raise not_finite(block)

    def begin(self, block: int, latents: Tensor) -> Check:
        """Start the check of a block's latents; the result ends it, in any thread, once."""
        if self.at_once:
            self.now(block, latents)
            return checked
        slot = self.slot()
        torch.linalg.vector_norm(latents, math.inf, out=self.largest)  # NaN for a NaN
        slot.copy_(self.largest, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self.latest.append(copied)

        def read() -> None:
            copied.synchronize()
            value = float(slot)
            with self.lock:
                self.free.append(slot)
            if not math.isfinite(value):
                raise not_finite(block)

        return read

    def slot(self) -> Tensor:
        """A pinned scalar that no block uses."""
        with self.lock:
            if self.free:
                return self.free.pop()
        return torch.empty((), dtype=self.dtype, pin_memory=True)


def not_finite(block: int) -> InferixError:
    return InferixError(f"block {block} is not finite; try dtype float32 or another checkpoint")
