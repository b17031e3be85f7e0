"""A session between two blocks: everything that its next block depends on, but for the decoder.

A `Snapshot` holds pages and can be gone back to for long; a `Beginning` holds none, and is for a block that failed.

Taking one copies integers and references. Tensors of a session are replaced, not written; pages are written,
and a cache that was forked writes to pages of its own.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ...schemes.actions import ActionTrack
from ...schemes.timeline import Timeline
from ..execution.executors import Text
from .branch import Branch, InFlight, PromptChange

if TYPE_CHECKING:
    from .session import Session


@dataclass
class Snapshot:
    """block: the next to be finished. It holds pages until it is released, or given to a session."""

    block: int
    timeline: Timeline
    rows: Tensor
    branches: list[Branch]
    actions: ActionTrack
    flight: list[InFlight]
    change: PromptChange | None
    recent: Tensor | None
    pixels: Tensor | None

    @classmethod
    def of(cls, session: Session) -> Snapshot:
        """How a session stands now."""
        return cls(
            session.next_block,
            session.timeline.fork(),
            session.rows,
            [replace(branch, cache=branch.cache.fork()) for branch in session.branches],
            session.actions.fork(),
            [replace(block, solver=copy(block.solver)) for block in session.flight],
            copy(session.change),
            session.recent,
            session.pixels,
        )

    def give_to(self, session: Session) -> None:
        """Make a session stand so; what it held is let go, and this is used up."""
        for branch in session.branches:
            branch.cache.release()
        session.timeline, session.rows, session.branches = self.timeline, self.rows, self.branches
        session.actions, session.flight, session.change = self.actions, self.flight, self.change
        session.recent, session.pixels = self.recent, self.pixels

    def fork(self) -> Snapshot:
        """The same, holding the same pages once more."""
        return replace(
            self, timeline=self.timeline.fork(), actions=self.actions.fork(), change=copy(self.change),
            branches=[replace(branch, cache=branch.cache.fork()) for branch in self.branches],
            flight=[replace(block, solver=copy(block.solver)) for block in self.flight],
        )  # fmt: skip

    def release(self) -> None:
        for branch in self.branches:
            branch.cache.release()


@dataclass
class Beginning:
    """What a session stands at when a block begins, for as long as it is being made.

    Frames that the block let go stay away: made again, it would let them go again.
    """

    timeline: Timeline
    rows: Tensor
    texts: list[Text]
    flight: list[InFlight]
    change: PromptChange | None

    @classmethod
    def of(cls, session: Session) -> Beginning:
        return cls(
            session.timeline.fork(),
            session.rows,
            [branch.text for branch in session.branches],
            [replace(block, solver=copy(block.solver)) for block in session.flight],
            copy(session.change),
        )

    def give_to(self, session: Session) -> None:
        """Have the session stand so again; pages of frames that are to be made again are free."""
        session.timeline, session.rows = self.timeline, self.rows
        session.flight, session.change = self.flight, self.change
        first = self.flight[0].span.frames.start if self.flight else self.timeline.next_frame
        for branch, text in zip(session.branches, self.texts, strict=True):
            branch.text = text
            branch.cache.take_back(first)
