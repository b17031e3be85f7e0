"""The engine in a thread of its own, and the calls that the event loop has it make between two blocks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import SessionEnded
from ..runtime.engine import Engine
from ..runtime.limits import Limits
from ..runtime.sessions.session import Session
from .settings import ServeSettings

T = TypeVar("T")


def engine_limits(settings: ServeSettings, memory_bytes: int | None = None) -> Limits:
    """The limits that an engine of this server is loaded with. The server itself refuses sessions that would be late,
    since one that goes on from another place is not to be refused.
    """
    return Limits(
        schedule="earliest-deadline", sessions=settings.sessions + settings.jobs, memory_bytes=memory_bytes,
        realtime=True, overcommit=True, queue_blocks=2,
    )  # fmt: skip


class EngineHost:
    """Runs an engine in its own thread. failure: what ended that thread, if anything did."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.engine.hand_over()
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.run(keep=True)
        except BaseException as error:  # of any kind: nobody else would see it in this thread
            self.failure = error
            raise

    @property
    def alive(self) -> bool:
        """True while blocks can be made."""
        return self.thread.is_alive() and self.engine.fault is None

    @property
    def reason(self) -> object:
        """Failure that ended the engine; None while it runs."""
        return self.failure or self.engine.fault

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function between two blocks; raises what it raises."""
        return await asyncio.wrap_future(self.engine.soon(function))

    async def make(self, function: Callable[[], Session]) -> Session:
        """Call a function that makes a session, and close that session if nobody waits for it any more."""
        future = self.engine.soon(function)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._close_unused)
            raise

    def _close_unused(self, future: Future[Session]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.engine.soon(future.result().close)

    async def close(self, session: Session) -> None:
        """Free a session, if it has not ended already."""
        if session.closed:
            return
        with suppress(SessionEnded):
            await self.call(session.close)

    def on_control(self, loop: asyncio.AbstractEventLoop, notify: Callable[[dict[str, Any]], object]) -> None:
        """Have `notify` called on the loop with the record of each control that is applied."""

        def observer(record: dict[str, Any]) -> None:
            if "control" in record:
                with suppress(RuntimeError):  # the loop is closed: the server has ended
                    loop.call_soon_threadsafe(notify, record)

        self.engine.observe(observer)

    def stop(self) -> None:
        """End the engine's thread after its current block."""
        self.engine.halt()
        self.thread.join()
