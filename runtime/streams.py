"""Copies between device and host memory, on CUDA streams beside the computation; plain copies on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def sendable(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor, pinned if it is copied from the host to a GPU: only pinned copies are asynchronous."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy to a device, in the order of the current stream, without waiting on the host."""
    return sendable(tensor, device).to(device, dtype, non_blocking=True)


def rows_of(tensor: Tensor, rows: Sequence[int], dim: int = 0) -> Tensor:
    """Select rows of a dimension: a view where they are neighbours, else a copy.

    An index list would be copied to a GPU, for which the host waits.
    """
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor.narrow(dim, rows[0], len(rows))
    return torch.cat([tensor.narrow(dim, row, 1) for row in rows], dim)


def put_rows(tensor: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """Write rows of the first dimension, without an index list on the device."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        tensor.narrow(0, rows[0], len(rows)).copy_(values)
        return
    for row, value in zip(rows, values, strict=True):
        tensor[row].copy_(value)


def make_current(device: torch.device) -> None:
    """Make a GPU the current device of this thread, for kernels and events without an explicit stream."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def claim(tensors: Iterable[Tensor]) -> None:
    """Record that the current stream uses `tensors` of other streams, so that their memory is not reused too early."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Transfer:
    """Runs copies on a CUDA stream of its own; on a CPU copies run at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Issue copies within: after all work of the current stream so far, concurrent with its later work."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """Order later work of the current stream after the copies."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def wait(self) -> None:
        """Block the host until the copies are complete."""
        if self.stream is not None:
            self.stream.synchronize()
