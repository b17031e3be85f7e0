"""Ranges on a profiler's timeline: sessions, blocks, stages, passes, decoding and sending, as NVTX for Nsight Systems.

Ranges are started and ended by handle and not as a stack, since blocks of several sessions interleave in one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Ranges(Protocol):
    """Marks spans of time by name."""

    def start(self, name: str) -> Any:
        """Begin a range; the handle ends it, in any thread."""

    def end(self, handle: Any) -> None: ...


class NvtxRanges:
    """NVTX ranges of this process, which Nsight Systems shows above the kernels that they launch."""

    def start(self, name: str) -> int:
        handle: int = torch.cuda.nvtx.range_start(name)
        return handle

    def end(self, handle: int) -> None:
        torch.cuda.nvtx.range_end(handle)


@contextmanager
def ranged(ranges: Ranges | None, name: str) -> Iterator[None]:
    """Mark what happens inside, unless there are no ranges."""
    if ranges is None:
        yield
        return
    handle = ranges.start(name)
    try:
        yield
    finally:
        ranges.end(handle)
