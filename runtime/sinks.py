"""Sinks: where the frames of a stream go, and the pump that feeds them.

A file (`VideoWriter`), a terminal, a socket or memory is a sink: anything with the methods of `Sink`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Frames = NDArray[np.uint8]


class Sink(Protocol):
    """Receives the frames of one stream, block by block, as a context manager.

    Entering it opens its output. Leaving it without an error finishes the output; leaving it by an error ends it with
    the blocks added so far whole, and nothing half-written. when_full: `wait` holds the stream up until the sink has
    room, as a file needs; `drop` leaves out blocks that arrive while it is full, as a live view does.
    """

    @property
    def when_full(self) -> Literal["wait", "drop"]: ...

    @property
    def full(self) -> bool:
        """True while `add` would wait."""

    def __enter__(self) -> Self: ...

    def add(self, frames: Frames) -> None:
        """Take uint8 frames [T, H, W, 3] and wait while there is no room. The sink must not change them."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


class DecodedBlock(Protocol):
    """A block as the pump sees it."""

    @property
    def frames(self) -> Frames | None: ...


AnyBlock = TypeVar("AnyBlock", bound=DecodedBlock)


class Pump(Generic[AnyBlock]):
    """Feeds the frames of a stream to sinks; an iterator of its blocks, each once all sinks have taken it.

    As a context manager it opens the sinks. At the end, by an error too, it closes the stream and then each sink.
    stream: blocks, such as `session.stream()`. first: frames before those of the stream, such as
    `session.prefix_frames`. note: called with the seconds (`time.perf_counter`) at which sinks began to take frames and
    had them. dropped: number of blocks left out, for each sink. UsageError for a block without frames.
    """

    def __init__(
        self,
        stream: Iterable[AnyBlock],
        *sinks: Sink,
        first: Frames | None = None,
        note: Callable[[float, float], object] | None = None,
    ) -> None:
        self.stream, self.sinks, self.first, self.note = iter(stream), sinks, first, note
        self.dropped = [0] * len(sinks)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for sink in self.sinks:
                opened.enter_context(sink)
            if (close := getattr(self.stream, "close", None)) is not None:  # a generator's
                opened.callback(close)
            if self.first is not None:
                self._feed(self.first)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnyBlock:
        block = next(self.stream)
        if self.sinks:
            if block.frames is None:
                raise UsageError("a sink takes frames, and the stream has none; stream with decode=True")
            self._feed(block.frames)
        return block

    def _feed(self, frames: Frames) -> None:
        begin = time.perf_counter()
        for index, sink in enumerate(self.sinks):
            if sink.when_full == "drop" and sink.full:
                self.dropped[index] += 1
            else:
                sink.add(frames)
        if self.note is not None:
            self.note(begin, time.perf_counter())
