"""A fake that stands in for CUDA graphs on a CPU: it counts captures and replays by launching again.

It shows what is captured, how often, and what is replayed; it says nothing of what a GPU can capture.
"""

from __future__ import annotations

from collections.abc import Callable

from inferix.graphs.capture import CaptureFailed, Replay


class FakeGraphs:
    """captures and replays are counted; `fail` makes every capture fail with that message."""

    def __init__(self, fail: str | None = None) -> None:
        self.fail, self.captures, self.replays = fail, 0, 0

    def capture(self, launch: Callable[[], None]) -> Replay:
        if self.fail is not None:
            raise CaptureFailed(self.fail)
        launch()  # as the warm-up does
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            launch()

        return replay
