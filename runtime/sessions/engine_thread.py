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

from ...errors import SessionEnded, UsageError, no_host_memory, quoted
from ..engine_condition import EngineCondition
from ..kv.pages import OutOfPages
from ..streams import make_current

SHORTAGES = (OutOfPages, MemoryError, torch.OutOfMemoryError)  # there may be memory another time

T = TypeVar("T")


class CallFuture(Future[T]):
    """The result of a call that the thread of an engine makes.

    A wait in that thread makes the pending calls first. In a callback, which the calls come after, it is a UsageError.
    `concurrent.futures.wait` and `as_completed` call no method of a future that could refuse. They lock the condition
    of each and then append to its waiters, so both of these are extended here.
    """

    def __init__(self, thread: EngineThread) -> None:
        super().__init__()
        self.thread = thread
        self._condition = CallCondition(self)
        self._waiters = CallWaiters(self)

    def result(self, timeout: float | None = None) -> T:
        self.refuse_deadlock()
        self.answer_in_owner()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.refuse_deadlock()
        self.answer_in_owner()
        return super().exception(timeout)

    def waits_in_owner(self) -> bool:
        return self.thread.owner is threading.current_thread() and not self.done()

    def refuse_deadlock(self) -> None:
        """UsageError in a callback in the owning thread, unless the call is done."""
        if self.thread.callbacks and self.waits_in_owner():
            raise UsageError(
                "the result of engine.soon() was awaited by an observer or while a block is made, and the call is made "
                "after it; use add_done_callback(), or wait in another thread"
            )

    def answer_in_owner(self) -> None:
        """Make the pending calls in the owning thread, outside of callbacks."""
        if not self.thread.callbacks and self.waits_in_owner():
            self.thread.answer_calls()


class CallCondition(threading.Condition):
    """The condition of a future, whose `acquire` begins a wait for several futures; `with` does not go through it."""

    def __init__(self, future: CallFuture[Any]) -> None:
        super().__init__()
        self.lock_acquire = self.acquire
        self.acquire = self.answer_and_acquire  # type: ignore[method-assign]
        self.future = future

    def answer_and_acquire(self, *args: Any, **kwargs: Any) -> bool:
        self.future.answer_in_owner()
        return self.lock_acquire(*args, **kwargs)


class CallWaiters(list[Any]):
    """The waits for several futures that include this one."""

    def __init__(self, future: CallFuture[Any]) -> None:
        super().__init__()
        self.future = future

    def append(self, waiter: Any) -> None:
        self.future.refuse_deadlock()
        super().append(waiter)


class EngineThread:
    """Owns the claim to an engine and the calls that wait for its thread."""

    def __init__(self, condition: EngineCondition, device: torch.device) -> None:
        self.condition, self.device = condition, device
        self.owner: threading.Thread | None = None
        self.calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.loops = 0  # loops that make blocks, nested
        self.halted = False
        self.ended = False  # the last `run` has returned, and no thread was given the engine since
        self.callbacks = 0  # callbacks of the user's that are running in the owning thread, nested
        self.unusable: str | None = None  # why no thread can drive the engine

    def is_owner(self) -> bool:
        """True in the thread that drives the engine; one that no living thread drives becomes this thread's."""
        with self.condition:
            if self.owner is None or not self.owner.is_alive():
                self.owner = threading.current_thread()
                make_current(self.device)
            return self.owner is threading.current_thread()

    def check_owner(self, what: str) -> None:
        """UsageError in any thread but the one that drives the engine, and in callbacks that it makes."""
        if self.unusable is not None:
            raise SessionEnded(self.unusable)
        if not self.is_owner():
            here = quoted(threading.current_thread().name)
            raise UsageError(
                f"{what} was called in thread {here}, but {quoted(self.name)} drives this "
                "engine; use engine.soon(), or engine.hand_over() there first. prompt, act, pause, resume, stop and "
                "reading a stream are free to any thread"
            )
        if self.callbacks:
            raise UsageError(
                f"{what} was called by an observer or while a block is made; use engine.soon(), which calls it after"
            )

    @property
    def name(self) -> str:
        return self.owner.name if self.owner is not None else "no thread"

    def release_ownership(self) -> None:
        """Leave the engine to the next thread that calls it; UsageError in a thread that does not own it."""
        self.check_owner("hand_over()")
        with self.condition:
            self.owner = None
            self.halted = self.ended = False

    @contextmanager
    def looping(self) -> Iterator[None]:
        """Mark that blocks are being made, so that readers in other threads wait for them."""
        self.loops += 1
        try:
            yield
        finally:
            self.loops -= 1

    @contextmanager
    def in_callback(self) -> Iterator[None]:
        """Refuse calls that belong between two blocks while a callback of the user's may run in the owning thread."""
        if self.owner is not threading.current_thread():
            yield
            return
        self.callbacks += 1
        try:
            yield
        finally:
            self.callbacks -= 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark a `run`. Whatever ends it, every call that waits is answered; later ones are refused at once.

        A halt that came before `run` began holds for it.
        """
        self.ended = False
        try:
            with self.looping():
                yield
            self.answer_calls()
        finally:
            with self.condition:
                calls, self.calls = self.calls, []
                self.halted, self.ended = False, True
            for _, done in calls:
                refuse(done, "engine.run() has ended")

    def call_soon(self, call: Callable[[], T]) -> Future[T]:
        """Call between two blocks in the owning thread, at once if this is it; free to any thread.

        The future ends in the result or in the error, an InferixError where no thread drives the engine any more.
        """
        done = CallFuture[T](self)
        if self.owner is threading.current_thread() and not self.callbacks and self.unusable is None:
            answer(call, done)
            return done
        with self.condition:
            refused = self.unusable or ("engine.run() has ended" if self.ended else None)
            if refused is None:
                self.calls.append((call, done))
                self.condition.signal()
        if refused is not None:
            refuse(done, refused)
        return done

    def answer_calls(self) -> None:
        """Make the calls that wait."""
        for _ in range(len(self.calls)):  # one that comes meanwhile waits for the next time
            with self.condition:
                call, done = self.calls.pop(0)
            answer(call, done)

    def halt(self) -> None:
        with self.condition:
            self.halted = True
            self.condition.signal()

    def after_fork(self) -> None:
        """Drop what belongs to threads of the parent process; this is the only thread of the child.

        Where another thread of the parent was making a block, its memory is in an unknown state: nothing can go on.
        """
        if self.loops and self.owner is not threading.current_thread():
            self.unusable = "the process was forked while another thread made a block; load the engine in the child"
        elif self.device.type == "cuda":
            self.unusable = "the engine is on a GPU, which a forked process cannot use; load it in the child"
        calls, self.calls = self.calls, []
        for _, done in calls:
            refuse(done, "the process was forked, and the parent makes the call")


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
    """Call and set the result or the error; an interruption is raised here, too."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        with shortages_named():
            result = call()
    except Exception as error:  # the call is the user's, and so is what it raises
        done.set_exception(error)
    except BaseException as error:  # Ctrl-C or SystemExit: the future is answered, and the loop ends
        done.set_exception(SessionEnded(f"the call was interrupted by {type(error).__name__}"))
        raise
    else:
        done.set_result(result)


def refuse(done: Future[Any], reason: str) -> None:
    """End a future that no thread will work on."""
    if done.set_running_or_notify_cancel():
        done.set_exception(SessionEnded(f"{reason}; the call was not made"))
