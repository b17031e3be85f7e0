"""Small tensors of passes, made on the host and put on the device by one copy, in memory that is used again.

On a GPU the copy is from pinned memory, so the host waits for nothing; once sizes repeat, nothing is allocated on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes between tensors, as kernels expect of memory of their own
LEAST = 16384  # bytes of a slot


class TableSlots:
    """A ring of `count` slots in device memory; what `put` returns stays as it is for `count - 1` further calls.

    On a CPU tensors stay where they are.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.device = device
        self.slots = [torch.empty(0, dtype=torch.uint8, device=device)] * count
        self.next = 0

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors on the device; the host's may be changed at once."""
        if self.device.type == "cpu":
            return list(tensors)
        offsets, size = list[int](), 0
        for tensor in tensors:
            offsets.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for offset, tensor in zip(offsets, tensors, strict=True):
            place(host, offset, tensor).copy_(tensor)
        slot = self.slot(size)
        slot[:size].copy_(host, non_blocking=True)
        return [place(slot, offset, tensor) for offset, tensor in zip(offsets, tensors, strict=True)]

    def slot(self, size: int) -> Tensor:
        """The slot that was used longest ago, with at least `size` bytes."""
        at, self.next = self.next, (self.next + 1) % len(self.slots)
        if self.slots[at].numel() < size:
            room = max(LEAST, 1 << (size - 1).bit_length())
            self.slots[at] = torch.empty(room, dtype=torch.uint8, device=self.device)
        return self.slots[at]


def place(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """View of bytes of `memory` from `offset` on as a tensor like another."""
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
