"""Client of a worker: sends plans and tensors, receives tensors, and numbers the objects that the worker keeps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Protocol
from weakref import finalize

from torch import Tensor

from .plans import Condition, EmbedFrames, Plan, Release


class Worker(Protocol):
    """Owner of weights, pages and an executor. Plans run in order; what one raises leaves the others as they are.

    supports_whole_block: True if it can run a `PassPlan` of a whole block.
    """

    @property
    def supports_whole_block(self) -> bool: ...

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        """Run a plan with the tensors that it takes; returns those that it gives."""


class Handle:
    """The number of something that a worker keeps until the last reference to its handle is gone."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"<Handle {self.number}>"


class WorkerClient:
    """Sends plans to a worker, from the thread that drives the engine. Handles may be dropped in any thread.

    whole: the client of all ranks, where `worker` is some of them; both have the same numbers.
    """

    def __init__(self, worker: Worker, whole: WorkerClient | None = None) -> None:
        self.worker = worker
        self.whole = whole or self
        self.numbers: Iterator[int] = count(1) if whole is None else whole.numbers
        self.dropped: deque[int] = deque() if whole is None else whole.dropped

    def handle(self) -> Handle:
        """A new handle, for a plan that makes what it stands for."""
        handle = Handle(next(self.numbers))
        finalize(handle, self.dropped.append, handle.number).atexit = False
        return handle

    def execute(self, plan: Plan, *tensors: Tensor) -> list[Tensor]:
        """Run a plan, after freeing what is no longer referred to."""
        self.release()
        return self.worker.execute(plan, tensors)

    def release(self) -> None:
        """Free what nothing refers to any more."""
        numbers = []
        while self.dropped:
            numbers.append(self.dropped.popleft())
        if numbers:
            self.whole.worker.execute(Release(tuple(numbers)))

    def condition(self, rows: Tensor) -> Handle:
        """Prepare a prompt, from the text encoder's rows [text_len, text_dim]."""
        handle = self.handle()
        self.execute(Condition(handle.number), rows)
        return handle

    def embed_frames(self, channels: Tensor) -> Handle:
        """Prepare the channels [F, C, H, W] that a block's frames are given, for all its passes."""
        handle = self.handle()
        self.execute(EmbedFrames(handle.number), channels)
        return handle
