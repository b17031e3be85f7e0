"""The one lock of an engine, which wakes threads that wait for a change."""

from __future__ import annotations

import threading


class Bell(threading.Condition):
    """One lock for an engine. `rings` says how often something has changed, so that no change is slept through."""

    def __init__(self) -> None:
        super().__init__(threading.RLock())
        self.rings = 0

    def ring(self) -> None:
        with self:
            self.rings += 1
            self.notify_all()

    def wait_after(self, seen: int, timeout: float | None = None) -> bool:
        """Wait until it has rung more than `seen` times; False if that took too long."""
        with self:
            return self.wait_for(lambda: self.rings != seen, timeout)
