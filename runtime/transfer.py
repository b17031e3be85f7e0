"""Copies between a device and the host, beside what the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def sendable(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, pinned if it goes from the host to a GPU: only then does the host not wait for the GPU's queue."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy there, in the order of the current stream; the host does not wait."""
    return sendable(tensor, device).to(device, dtype, non_blocking=True)


class Transfer:
    """A stream for copies on a GPU; elsewhere copies are done when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Copies asked for here come after everything asked for so far, and beside what is asked for next."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What is asked for from now on comes after the copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def wait(self) -> None:
        """Until the copies are done."""
        if self.stream is not None:
            self.stream.synchronize()
