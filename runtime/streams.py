"""Copies between a device and the host, beside what the device computes, and which device and stream that is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def sendable(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, pinned if it goes from the host to a GPU: only then does the host not wait for the GPU's queue."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy there, in the order of the current stream; the host does not wait."""
    return sendable(tensor, device).to(device, dtype, non_blocking=True)


def make_current(device: torch.device) -> None:
    """Have this thread launch on a GPU: kernels, and events that name no stream, take the current one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def claim(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors from going to others before this thread's stream has done with it, whoever made them
    and lets them go.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


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
