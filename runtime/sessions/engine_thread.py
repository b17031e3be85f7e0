"""Which thread drives an engine, what others may ask of it, and the loop that it runs.

The driving thread owns everything but mailboxes, outboxes and what is being decoded. It is the first that calls the
engine; another one can take over once that has handed over, or has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ...errors import InferixError, UsageError, no_host_memory
from ..engine_condition import Bell
from ..kv.pages import OutOfPages
from ..streams import make_current

SHORTAGES = (OutOfPages, MemoryError, torch.OutOfMemoryError)  # there may be memory another time
FAILURES = (InferixError, *SHORTAGES)  # what concerns one session, or one call, and no other

T = TypeVar("T")


class Driver:
    """Owns the claim to an engine, and the calls that wait for its thread."""

    def __init__(self, bell: Bell, device: torch.device) -> None:
        self.bell, self.device = bell, device
        self.owner: threading.Thread | None = None
        self.calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.loops = 0  # that make blocks, one within the other
        self.halted = False

    def owns(self) -> bool:
        """Whether this thread drives the engine; one that no living thread drives becomes this thread's."""
        with self.bell:
            if self.owner is None or not self.owner.is_alive():
                self.owner = threading.current_thread()
                make_current(self.device)
            return self.owner is threading.current_thread()

    def check_owner(self, what: str) -> None:
        """UsageError in any thread but the one that drives the engine."""
        if not self.owns():
            raise UsageError(
                f"{what} was called in thread {threading.current_thread().name!r}, but {self.name!r} drives this "
                "engine; use engine.soon(), or engine.hand_over() there first. prompt, act, pause, resume, stop and "
                "reading a stream are free to any thread"
            )

    @property
    def name(self) -> str:
        return self.owner.name if self.owner is not None else "no thread"

    def hand_over(self) -> None:
        self.check_owner("hand_over()")
        self.owner = None

    @contextmanager
    def looping(self) -> Iterator[None]:
        """While blocks are being made, readers in other threads have something to wait for."""
        self.loops += 1
        try:
            yield
        finally:
            self.loops -= 1

    def soon(self, call: Callable[[], T]) -> Future[T]:
        done: Future[T] = Future()
        if self.owner is threading.current_thread():
            answer(call, done)
        else:
            with self.bell:
                self.calls.append((call, done))
                self.bell.ring()
        return done

    def answer_calls(self) -> None:
        with self.bell:
            calls, self.calls = self.calls, []
        for call, done in calls:
            answer(call, done)

    def halt(self) -> None:
        self.halted = True
        self.bell.ring()


@contextmanager
def shortages_named() -> Iterator[None]:
    """Raise MemoryError where the host's memory runs out in torch."""
    try:
        yield
    except RuntimeError as error:
        if not no_host_memory(error):
            raise
        raise MemoryError(str(error)) from error


def answer(call: Callable[[], T], done: Future[T]) -> None:
    """Call and keep the result, or the error that it is allowed to end in."""
    try:
        with shortages_named():
            done.set_result(call())
    except FAILURES as error:
        done.set_exception(error)
    finally:
        if not done.done():
            done.cancel()
