"""Admission in real time: the share of it that live sessions take, and their late blocks. Numbers only.

A block counts from its start in the engine until the event loop has it, and its encoding where that takes the engine's
processors. Work at the same time counts once. Other processes count by making it slower. What the engine does between
blocks, such as jobs and checkpoints, does not count, but shows as late blocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

BLOCKS = 32  # that the measurements are of: the latest of all sessions
MOST_LOAD = 0.85  # of real time; the rest is for jitter, sending, and sessions that begin
MOST_LATE = 3  # of the latest blocks
RECENT = 30.0  # seconds after which a block says nothing any more
SPANS = 64  # pieces of work that later ones may overlap


@dataclass(frozen=True)
class Measured:
    """A block. end: when it was ready. work: seconds that it added. played: its seconds of video."""

    end: float
    work: float
    played: float
    late: bool


class RealTime:
    """Measurements of the latest blocks. shared: encoding takes the engine's processors.

    Times are seconds on one clock that the caller reads. Every piece of work is noted at its end.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.blocks: deque[Measured] = deque(maxlen=BLOCKS)
        self._spans: deque[tuple[float, float]] = deque(maxlen=SPANS)  # of work, apart from each other
        self._work = 0.0  # since the latest block

    def note_work(self, begin: float, end: float) -> None:
        """Note a piece of work."""
        while self._spans and self._spans[-1][1] >= begin:
            first, last = self._spans.pop()
            self._work -= last - first
            begin, end = min(begin, first), max(end, last)
        self._spans.append((begin, end))
        self._work += end - begin

    def note_encoding(self, begin: float, end: float) -> None:
        """Note the encoding of a block."""
        if self.shared:
            self.note_work(begin, end)

    def note_block(self, begin: float, end: float, played: float, late: bool | None) -> None:
        """Note a block of `played` seconds of video. late: None for the first of a stream, which takes longer."""
        self.note_work(begin, end)
        if late is not None:
            self.blocks.append(Measured(end, self._work, played, late))
        self._work = 0.0

    def forget_old(self, now: float) -> None:
        """Forget blocks that are not recent: their sessions are paused or without a viewer.

        Two of the longest blocks are recent, so that a slow engine is not idle while it makes one.
        """
        recent = max(RECENT, 2 * max((block.work for block in self.blocks), default=0.0))
        while self.blocks and self.blocks[0].end < now - recent:
            self.blocks.popleft()

    @property
    def late(self) -> int:
        """Number of the latest blocks that were late."""
        return sum(block.late for block in tuple(self.blocks))  # which another thread may add to

    def load(self, sessions: int) -> float:
        """Share of real time that a number of sessions take; 1 is all of it."""
        blocks = tuple(self.blocks)
        played = sum(block.played for block in blocks)
        return sessions * sum(block.work for block in blocks) / played if played else 0.0


def obstacle(sessions: int, load: float, late: int) -> str | None:
    """The reason, with numbers, why one session more than there are would make some late; None if it would not.

    load: of these sessions. late: of their latest blocks.
    """
    if not sessions:
        return None
    with_another = load * (sessions + 1) / sessions
    if with_another > MOST_LOAD:
        return (
            f"{sessions} sessions take {load:.0%} of real time by measured blocks, one more would make it "
            f"{with_another:.0%}, and {MOST_LOAD:.0%} may be taken"
        )
    if late > MOST_LATE:
        return f"{late} of the latest {BLOCKS} blocks of {sessions} sessions were late, and {MOST_LATE} may be"
    return None
