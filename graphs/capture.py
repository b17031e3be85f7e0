"""Recording a launch sequence once and replaying it: one thin interface, and CUDA graphs behind it.

What is captured and when is decided elsewhere and tested on a CPU; only `CudaGraphs` needs a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from ..errors import InferixError

Replay = Callable[[], object]
WARM_UPS = 2  # the first compiles kernels and makes library handles, the second runs as the recorded one will


class CaptureFailed(InferixError):
    """A launch sequence that the device cannot record."""


class Event(Protocol):
    """A point in a stream whose time can be read; torch's own events are such."""

    def record(self) -> object: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later event, once both have happened."""


class CaptureBackend(Protocol):
    """Something that records launches."""

    def event(self) -> Event:
        """An event that, recorded among the launches, is recorded again by each replay."""

    def capture(self, launch: Callable[[], None]) -> Replay:
        """Record what `launch` puts on the device; the result replays it, on the same tensors.

        `launch` may run several times: it must leave the same results each time. Raises CaptureFailed.
        """


class CudaGraphs:
    """CUDA graphs of one device. They share a memory pool, since no call's private memory outlives the call.

    inspect: called with the driver's handle of each captured graph; without it torch keeps none.
    """

    def __init__(self, device: torch.device, inspect: Callable[[int], object] | None = None) -> None:
        self.device, self.inspect = device, inspect
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True, external=True)

    def capture(self, launch: Callable[[], None]) -> Replay:
        """Warm up on a side stream, so that nothing is compiled or first allocated while recording; then record."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                launch()
        current.wait_stream(self.stream)
        torch.cuda.synchronize(self.device)
        # A collection while recording could free device memory, which is not allowed there.
        gc.collect()
        graph = torch.cuda.CUDAGraph(keep_graph=self.inspect is not None)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                launch()
        except RuntimeError as error:
            self.leave_capture(current)
            raise CaptureFailed(str(first_cause(error)).splitlines()[0]) from error
        if self.inspect is not None:
            self.inspect(graph.raw_cuda_graph())
            graph.instantiate()
        return graph.replay

    def leave_capture(self, current: torch.cuda.Stream) -> None:
        """Put right what torch leaves as it is when a capture cannot end: the thread's stream, and the allocator, which
        would go on taking memory from the pool and refuse every later capture.
        """
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # it did end there
            torch._C._cuda_endAllocateToPool(current.device_index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)


def first_cause(error: BaseException) -> BaseException:
    """The first error while recording; ending a recording that failed raises another."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
