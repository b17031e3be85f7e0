"""Condition variable of an engine: one lock, which wakes threads that wait for a change."""

from __future__ import annotations

import threading


class EngineCondition(threading.Condition):
    """Lock and condition of an engine. `changes` counts signals, so that a waiter misses none."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.changes = 0

    def signal(self) -> None:
        """Wake all waiters; callable from any thread."""
        with self:
            self.changes += 1
            self.notify_all()

    def wait_after(self, seen: int, timeout: float | None = None) -> bool:
        """Wait until `changes` differs from `seen`; False after `timeout` seconds."""
        with self:
            return self.wait_for(lambda: self.changes != seen, timeout)
