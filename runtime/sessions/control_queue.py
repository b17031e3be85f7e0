"""A session's controls, from any thread to the one that drives the engine.

All queues of one engine share its condition: one lock, signalled on every change.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...errors import AtCapacity
from ..engine_condition import EngineCondition

LIFECYCLE_CONTROLS = frozenset({"pause", "resume", "stop"})  # applied between two blocks
BLOCK_CONTROLS = frozenset({"prompt", "act", "camera"})  # applied when a block begins
MOST_CONTROLS = 1024  # pending; a session that makes no blocks takes none


@dataclass(frozen=True)
class Control:
    """One request to a session, made at `asked` (seconds of `time.perf_counter`) by the thread `thread`."""

    id: int
    kind: str
    value: Any
    asked: float
    thread: int


class ControlQueue:
    """Controls of one session. Any thread puts; the thread that drives the engine takes."""

    def __init__(self, condition: EngineCondition) -> None:
        self.condition = condition
        self.waiting: deque[Control] = deque()
        self.last = 0

    def put(self, kind: str, value: Any = None) -> int:
        """Add a control and return its id. AtCapacity if `MOST_CONTROLS` are pending."""
        with self.condition:
            if len(self.waiting) >= MOST_CONTROLS:
                raise AtCapacity(
                    f"session has {len(self.waiting)} pending controls and is not making blocks; resume it, or read "
                    "its stream"
                )
            self.last += 1
            self.waiting.append(Control(self.last, kind, value, time.perf_counter(), threading.get_ident()))
            self.condition.signal()
            return self.last

    def pending(self, kinds: Collection[str]) -> list[Control]:
        """The pending controls of some kinds, in order. They stay until they are applied: see `remove`."""
        with self.condition:
            return [control for control in self.waiting if control.kind in kinds]

    def remove(self, control: Control) -> None:
        """Remove a control that was applied or refused."""
        with self.condition:
            self.waiting.remove(control)
