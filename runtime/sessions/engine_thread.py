"""The thread that drives an engine, and the calls that other threads have it make.

It owns everything but control queues, output queues and what is being decoded. It is the first thread that calls the
engine; another takes over once that one has released the engine or has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ...errors import InferixError, UsageError, no_host_memory
from ..engine_condition import EngineCondition
from ..kv.pages import OutOfPages
from ..streams import make_current

SHORTAGES = (OutOfPages, MemoryError, torch.OutOfMemoryError)  # there may be memory another time
FAILURES = (InferixError, *SHORTAGES)  # what concerns one session, or one call, and no other

T = TypeVar("T")


class EngineThread:
    """Owns the claim to an engine and the calls that wait for its thread."""

    def __init__(self, condition: EngineCondition, device: torch.device) -> None:
        self.condition, self.device = condition, device
        self.owner: threading.Thread | None = None
        self.calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.loops = 0  # loops that make blocks, nested
        self.halted = False

    def is_owner(self) -> bool:
        """True in the thread that drives the engine; one that no living thread drives becomes this thread's."""
        with self.condition:
            if self.owner is None or not self.owner.is_alive():
                self.owner = threading.current_thread()
                make_current(self.device)
            return self.owner is threading.current_thread()

    def check_owner(self, what: str) -> None:
        """UsageError in any thread but the one that drives the engine."""
        if not self.is_owner():
            raise UsageError(
                f"{what} was called in thread {threading.current_thread().name!r}, but {self.name!r} drives this "
                "engine; use engine.soon(), or engine.hand_over() there first. prompt, act, pause, resume, stop and "
                "reading a stream are free to any thread"
            )

    @property
    def name(self) -> str:
        return self.owner.name if self.owner is not None else "no thread"

    def release_ownership(self) -> None:
        """Leave the engine to the next thread that calls it; UsageError in a thread that does not own it."""
        self.check_owner("hand_over()")
        self.owner = None

    @contextmanager
    def looping(self) -> Iterator[None]:
        """Mark that blocks are being made, so that readers in other threads wait for them."""
        self.loops += 1
        try:
            yield
        finally:
            self.loops -= 1

    def call_soon(self, call: Callable[[], T]) -> Future[T]:
        """Call between two blocks in the owning thread, at once if this is it; free to any thread."""
        done: Future[T] = Future()
        if self.owner is threading.current_thread():
            answer(call, done)
        else:
            with self.condition:
                self.calls.append((call, done))
                self.condition.signal()
        return done

    def answer_calls(self) -> None:
        with self.condition:
            calls, self.calls = self.calls, []
        for call, done in calls:
            answer(call, done)

    def halt(self) -> None:
        self.halted = True
        self.condition.signal()


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
    """Call and set the result, or an error of `FAILURES`; any other error is raised here."""
    try:
        with shortages_named():
            done.set_result(call())
    except FAILURES as error:
        done.set_exception(error)
    finally:
        if not done.done():
            done.cancel()
