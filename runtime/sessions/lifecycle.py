"""The states of a session, and the table of the moves between them.

`Lifecycle.move` is the one place where a state changes; what is not in the table is a bug and raises.
"""

from __future__ import annotations

from enum import StrEnum

from ...errors import InferixError


class State(StrEnum):
    NEW = "new"  # opened, and perhaps waiting for room; no block was begun
    RUNNING = "running"
    PAUSED = "paused"
    DRAINING = "draining"  # begins no block; those that are made are still decoded and handed out
    CLOSED = "closed"
    FAILED = "failed"


ENDED = frozenset({State.CLOSED, State.FAILED})
MOVES: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.RUNNING, State.PAUSED, State.DRAINING, State.CLOSED, State.FAILED}),
    State.RUNNING: frozenset({State.PAUSED, State.DRAINING, State.CLOSED, State.FAILED}),
    State.PAUSED: frozenset({State.RUNNING, State.DRAINING, State.CLOSED, State.FAILED}),
    State.DRAINING: frozenset({State.CLOSED, State.FAILED}),
    State.CLOSED: frozenset(),
    State.FAILED: frozenset(),
}


class Lifecycle:
    """Where one session stands. failure: why it failed, once it has."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.failure: Exception | None = None

    def move(self, to: State, failure: Exception | None = None) -> None:
        """Go to another state; InferixError where the table has no such move."""
        if to not in MOVES[self.state]:
            raise InferixError(f"a session that is {self.state} cannot become {to}")
        self.state, self.failure = to, failure

    def can(self, to: State) -> bool:
        return to in MOVES[self.state]
