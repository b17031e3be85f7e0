"""A fake that stands in for CUDA graphs on a CPU: it counts captures and replays by launching again.

It shows what is captured, how often, and what is replayed; it says nothing of what a GPU can capture.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from inferix.graphs.capture import CaptureFailed, Replay


class FakeEvent:
    """A point on the host's clock."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end_event: FakeEvent) -> float:
        return (end_event.time - self.time) * 1e3


class FakeGraphs:
    """captures and replays are counted. fail: what every capture fails with. idle: replays launch nothing."""

    def __init__(self, fail: str | None = None, idle: bool = False) -> None:
        self.fail, self.idle, self.captures, self.replays = fail, idle, 0, 0

    def event(self) -> FakeEvent:
        return FakeEvent()

    def capture(self, launch: Callable[[], None]) -> Replay:
        if self.fail is not None:
            raise CaptureFailed(self.fail)
        launch()  # as the warm-up does
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            if not self.idle:
                launch()

        return replay
