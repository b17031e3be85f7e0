"""Delivery: a block from its latents to its reader, through decoder and output queue, and a reader's wait for it.

Blocks are decoded in the decoder's thread, or in the engine's where that is faster or the next block needs the pixels.
A reader that drives the engine makes its blocks itself; others wait, blocked or awaiting, until a block of their
session is there.
"""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InferixError, SessionEnded, UsageError, quoted
from ..engine_condition import EngineCondition
from ..execution.decode_pipeline import DecodePipeline, to_frames
from ..finite_check import Check
from ..resources import Resources
from ..telemetry.records import Ack, BlockRecord, Metrics
from .engine_thread import EngineThread, shortages_named
from .lifecycle import State
from .output_queue import Block
from .scheduler import Scheduler
from .session import Demand, Session

OWNER_WAIT = 10.0  # seconds that a reader waits for some thread to drive the engine


@dataclass(frozen=True)
class Look:
    """One look of a reader. over: there is the block, or there will be none. changes: of the condition, before it."""

    block: Block | None
    over: bool
    changes: int


class Delivery:
    """Decodes, measures and queues finished blocks, and hands them to readers and records to observers.

    step: makes the next blocks, called where a reader drives the engine. fail: ends a session with an error.
    """

    def __init__(
        self,
        resources: Resources,
        condition: EngineCondition,
        thread: EngineThread,
        scheduler: Scheduler,
        metrics: Metrics,
        step: Callable[[], Sequence[Session]],
        fail: Callable[[Session, Exception], None],
    ) -> None:
        self.resources, self.condition, self.thread = resources, condition, thread
        self.scheduler, self.metrics = scheduler, metrics
        self.step, self.fail = step, fail
        self.pipeline = DecodePipeline(resources.device, condition)
        self.observers: list[Callable[[dict[str, Any]], None]] = []

    def decode(
        self, session: Session, record: BlockRecord, latents: Tensor, show: bool
    ) -> tuple[Tensor, NDArray[np.uint8] | None]:
        """Pixels [T, 3, H, W] of a block and, to show, its frames uint8 [T, H, W, 3]."""
        with record.span("decode"):
            pixels = session.current.decoder.decode(record.block, latents)
            return pixels, to_frames(pixels) if show else None

    def delivers_beside(self, session: Session, show: bool) -> bool:
        """True if the decoder's thread delivers the blocks of a session while the next ones are made.

        To show, where decoding there is faster; else where the engine's thread would wait for the device. Ranks that
        decode together do so between two passes.
        """
        if self.resources.parts.shard.columns.size > 1:
            return False
        beside = self.pipeline.beside if show else self.pipeline.stream is not None
        return beside and not session.current.preset.context.needs_pixels

    def deliver_beside(
        self, session: Session, record: BlockRecord, latents: Tensor, check: Check, show: bool
    ) -> None:
        """Have the decoder's thread check a block, decode it to show, and deliver it, while the next one is made."""
        self.pipeline.submit(session.id, partial(self._deliver_there, session, record, latents, check, show))

    def _deliver_there(
        self, session: Session, record: BlockRecord, latents: Tensor, check: Check, show: bool
    ) -> None:
        """Decode and deliver on the decoder's thread. Any error there fails this session, in the engine's thread."""
        if session.decode_error is not None:
            return  # an earlier block is missing
        try:
            with shortages_named():
                frames = self.decode(session, record, latents, show=True)[1] if show else None
                check()
                self.deliver(session, record, latents, frames, beside=True)
        except BaseException as error:  # of any kind: in this thread nobody else would see it
            session.decode_error = error if isinstance(error, Exception) else interrupted("decoding", error)
            self.condition.signal()
            session.output.wake_readers()

    def deliver(
        self, session: Session, record: BlockRecord, latents: Tensor, frames: NDArray[np.uint8] | None, beside: bool
    ) -> None:
        """Put the finished block into the output queue with its acks and its slack to the deadline (s).

        beside: it was decoded while the next block was made.
        """
        signals, meter = None, session.drift_meter
        if meter is not None and frames is not None:
            with record.span("drift"):
                signals = meter.read(frames)
        spans, seconds, spec = record.spans, record.seconds, self.resources.spec
        made, decoded = spans["commit"][1] - spans["encode"][0], seconds.get("decode", 0.0)
        shown = len(latents) * spec.vae_stride[0] if frames is None else len(frames)
        with self.condition:
            now = time.perf_counter()
            record.acks = tuple(
                Ack(control.id, control.kind, record.block, now - control.asked, refused)
                for control, block, refused in session.unshown
                if block <= record.block
            )
            session.unshown = [entry for entry in session.unshown if entry[1] > record.block]
            if meter is not None and signals is not None:
                changed = any(ack.kind == "prompt" and ack.refused is None for ack in record.acks)
                record.drift = meter.compare(signals, shown, restart=changed)
            share = made / record.batch
            self.scheduler.measured(session.id, max(share, decoded) if beside else share + decoded)
            record.slack = self.scheduler.shown(session.id, now, shown / spec.fps)
            record.degradations = tuple(step.kind for step in self.scheduler.degradations)
            record.marks["emit"] = (now, now)
            session.output.put(Block(record.block, latents, frames, seconds, record.acks, record))
        self._measure(record, seconds, shown)

    def _measure(self, record: BlockRecord, seconds: dict[str, float], frames: int) -> None:
        self.metrics.count("blocks")
        self.metrics.count("blocks_in_batches", int(record.batch > 1))
        self.metrics.count("frames", frames)
        for stage, value in seconds.items():
            self.metrics.observe(f"{stage}_seconds", value)
        for ack in record.acks:
            self.metrics.observe("control_to_pixel_seconds", ack.seconds)
        if record.slack is not None:
            self.metrics.observe("deadline_slack_seconds", record.slack)
            self.metrics.count("deadlines_missed", int(record.slack < 0))
        for signal, change in (record.drift or {}).items():
            self.metrics.observe(f"drift_{signal}_share", abs(change))

    def submit_demand(self, session: Session, demand: Demand) -> Demand:
        """Make `demand` the session's one request for blocks."""
        with self.condition:
            session.demand = demand
            self.condition.signal()
            session.output.wake_readers()  # of the stream before
        return demand

    def withdraw_demand(self, demand: Demand) -> None:
        """Begin no more blocks for a request."""
        with self.condition:
            demand.left = 0

    def next_block(self, session: Session, demand: Demand, ready: threading.Event) -> Block | None:
        """The session's next block, made in this thread or waited for; None where there will be none.

        ready: set when there is something to look at.
        """
        while not (look := self._look(session, demand, ready)).over:
            if self.thread.is_owner():
                with self.thread.looping():
                    if not self.step():
                        self._rest(session, look.changes)
            elif not ready.wait(OWNER_WAIT):
                self._check_driven(session, look.changes)
        return look.block

    async def await_block(self, session: Session, demand: Demand, ready: asyncio.Event) -> Block | None:
        """The session's next block, as another thread makes it; None where there will be none."""
        while not (look := self._look(session, demand, ready)).over:
            if self.thread.owner is threading.current_thread():
                raise UsageError("astream() is read in the thread that drives the engine; call engine.run() in another")
            try:
                async with asyncio.timeout(OWNER_WAIT):
                    await ready.wait()
            except TimeoutError:
                self._check_driven(session, look.changes)
        return look.block

    def _look(self, session: Session, demand: Demand, ready: threading.Event | asyncio.Event) -> Look:
        """Take the next block if it is ready. Raises what ended the stream."""
        ready.clear()
        changes = self.condition.changes
        if session.demand is not demand:
            raise InferixError(f"another stream of session {session.id} has begun; read that one")
        if (block := session.output.take()) is not None:
            try:
                return Look(self._taken(block), True, changes)
            except BaseException:  # an interruption, or a warning that is an error
                session.output.put_back(block)
                raise
        if failure := session.life.failure or session.decode_error:
            if session.decode_error is not None and self.thread.is_owner():
                self.fail(session, session.decode_error)
            raise failure
        if demand.error is not None and not session.output.unfinished:
            raise demand.error
        return Look(None, session.state is State.CLOSED, changes)

    def _check_driven(self, session: Session, seen: int) -> None:
        """InferixError if no thread makes blocks, and nothing has changed since `seen`."""
        if not self.thread.loops and self.condition.changes == seen:
            raise InferixError(
                f"session {session.id} waits for a block, but thread {quoted(self.thread.name)}, which drives the "
                "engine, makes none; call engine.run() there, or engine.hand_over()"
            )

    def _rest(self, session: Session, seen: int) -> None:
        """Wait for a change since `seen` by the decoder or another thread. InferixError where neither can make one."""
        obstacle = None
        with self.condition:
            if session.output.unfinished or self.condition.changes != seen:
                pass
            elif session.id in self.scheduler.waiting:
                obstacle = self.scheduler.obstacle(session.id, self.scheduler.waiting[session.id])
            elif session.state is State.PAUSED and session.paused_by in (None, threading.get_ident()):
                obstacle = f"session {session.id} is paused"
            elif session.pictures_wanted:
                block = session.next_block
                obstacle = f"the video of session {session.id} ends before block {block} (feed its pictures first)"
        if obstacle is not None:
            raise InferixError(f"{obstacle}, and this thread, which drives the engine, would wait for ever")
        self.condition.wait_after(seen)

    def _taken(self, block: Block) -> Block:
        begin, _ = block.record.marks["emit"]
        block.record.marks["emit"] = (begin, time.perf_counter())
        if self.observers:
            self.notify(block.record.as_dict())
        return block

    def notify(self, record: dict[str, Any]) -> None:
        """Give a record to all observers."""
        for observer in tuple(self.observers):
            try:
                with self.thread.in_callback():
                    observer(record)
            except Exception as error:  # the observer is the user's
                message = f"an observer raised {type(error).__name__}: {error}; blocks and other observers go on"
                warnings.warn(message, RuntimeWarning, stacklevel=2)


def interrupted(what: str, error: BaseException) -> SessionEnded:
    return SessionEnded(f"{what} was interrupted by {type(error).__name__}")
