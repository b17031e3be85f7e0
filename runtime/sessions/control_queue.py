"""Controls on their way into a session, from any thread to the one that drives the engine.

The bell is shared by everything of an engine that crosses threads: it is the one lock, and rings when anything changed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...errors import InferixError
from ..engine_condition import Bell

LIFE = frozenset({"pause", "resume", "stop"})  # taken as soon as no block of the session is being made
STEERING = frozenset({"prompt", "act"})  # taken when a block of the session begins
MOST_CONTROLS = 1024  # that may wait; a session that makes no blocks takes none


@dataclass(frozen=True)
class Control:
    """Something a session was told: `asked` in seconds of `time.perf_counter`, by the thread `thread`."""

    id: int
    kind: str
    value: Any
    asked: float
    thread: int


class Mailbox:
    """Controls for one session; anyone puts, the thread that drives the engine takes."""

    def __init__(self, bell: Bell) -> None:
        self.bell = bell
        self.waiting: deque[Control] = deque()
        self.last = 0

    def put(self, kind: str, value: Any = None) -> int:
        """Leave a control; returns its id. InferixError if too many wait."""
        with self.bell:
            if len(self.waiting) >= MOST_CONTROLS:
                raise InferixError(
                    f"{len(self.waiting)} controls wait for a session that takes none; is it paused, or read by no one?"
                )
            self.last += 1
            self.waiting.append(Control(self.last, kind, value, time.perf_counter(), threading.get_ident()))
            self.bell.ring()
            return self.last

    def take(self, kinds: Collection[str]) -> list[Control]:
        """The waiting controls of some kinds, in order."""
        with self.bell:
            found = [control for control in self.waiting if control.kind in kinds]
            if found:
                self.waiting = deque(control for control in self.waiting if control.kind not in kinds)
            return found
