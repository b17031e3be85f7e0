"""The sessions of one engine: who is in, whose turn it is, and how each ends, alone.

One thread drives; it is the owner of everything but mailboxes, outboxes and the decoder's thread. What crosses
threads is guarded by the bell. Heavy work is never done while the bell is held.
"""

from __future__ import annotations

import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import InferixError, UsageError
from ...schemes.presets import Preset
from ..capacity.memory_need import session_need
from ..engine_condition import Bell
from ..execution.decode_pipeline import DecodePipeline, to_frames
from ..limits import Limits, Relief
from ..telemetry.records import Ack, BlockRecord, Metrics, Stopwatch
from .control_queue import LIFE, Control
from .engine_thread import FAILURES, SHORTAGES, Driver, shortages_named
from .lifecycle import ENDED, State
from .output_queue import Block
from .scheduler import Client, Scheduler
from .session import Demand, Session
from .session_state import Snapshot

if TYPE_CHECKING:
    from ..engine import Engine

DRIVER_WAIT = 10.0  # seconds that a reader waits for some thread to drive the engine

def narrower(preset: Preset, frames: int) -> Preset:
    """A preset with a window of so many frames; UsageError if a block does not fit into it."""
    size = preset.context.local_attn_size
    window = frames if size == -1 else min(size, frames)
    return replace(preset, context=replace(preset.context, local_attn_size=window))


class Host:
    """Owns the open sessions, the scheduler, the decoder's thread and the metrics of one engine."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.bell = Bell()
        self.driver = Driver(self.bell, engine.device)
        self.scheduler = Scheduler(limits)
        self.pipeline = DecodePipeline(engine.device, self.bell)
        self.metrics = Metrics()
        self.observers: list[Callable[[dict[str, Any]], None]] = []
        self.sessions: dict[int, Session] = {}
        for relief in limits.overload:
            self.check_relief(relief)
        self.seen = 0  # rings when the last turn was chosen
        self.ids = 0

    def drive(self, keep: bool) -> None:
        """Make blocks until all sessions have ended, or until `halt`."""
        self.driver.check_owner("run()")
        self.driver.halted = False
        with self.driver.looping():
            while not self.driver.halted and (keep or self.sessions or self.driver.calls):
                if not self.engine.step():
                    self.bell.wait_after(self.seen, self.limits.consumer_timeout)

    # Coming and going

    def new_id(self) -> int:
        with self.bell:
            self.ids += 1
            return self.ids

    def join(self, session: Session) -> None:
        """Let a session in or have it wait; one that is refused holds nothing, and that is raised."""
        self.driver.check_owner("open()")
        self.metrics.count("sessions_opened")
        try:
            inside = self.scheduler.join(session.id, self.client(session))
        except InferixError:
            session.free()
            self.metrics.count("sessions_refused")
            raise
        self.sessions[session.id] = session
        if inside:
            self.enter(session)

    def enter(self, session: Session) -> None:
        """A session that is let in begins with what it goes on from; where that fails, it is out again."""
        if session.entering is not None:
            try:
                with shortages_named():
                    session.entering()
            except FAILURES as error:
                self.fail(session, error)
                raise
            session.entering = None
        session.fetch()

    def client(self, session: Session) -> Client:
        """What the scheduler has to know of a session."""
        engine, preset = self.engine, session.timeline.preset
        form, period = engine.memory.form(session.size), engine.spec.vae_stride[0] * preset.num_frame_per_block
        need = session_need(
            preset, engine.spec, engine.parts.vae.spec, session.size, engine.config.dtype, form.nbytes,
            queued=self.limits.queue_blocks,
        )  # fmt: skip
        store = engine.memory.stores.get(form.grid)
        room = None if store is None or store.grows else store.pool.size * form.nbytes
        return Client(need, session.size, period / engine.spec.fps, room)

    def fork(self, session: Session) -> Session:
        self.settle(session)
        moment = Snapshot.of(session)
        twin = Session(
            session.engine, moment.timeline, session.sampler, session.size, session.noise, moment.rows, moment.branches,
            moment.actions, session.source, session.clamped, session.negative, None, moment.flight, moment.change,
            moment.recent, moment.pixels, session.prefix_frames,
        )  # fmt: skip
        twin.track = session.track.fork()
        twin.kept = [kept.fork() for kept in session.kept]
        self.join(twin)
        return twin

    def close(self, session: Session) -> None:
        """End a session now; what is being decoded is waited for, and finished blocks may still be taken."""
        self.pipeline.settle(session.id)
        if session.state is not State.FAILED:
            self.end(session, State.CLOSED)

    def fail(self, session: Session, error: Exception) -> None:
        """End a session that cannot go on. The error keeps where it came from, but not what that place held."""
        self.pipeline.settle(session.id)
        traceback.clear_frames(error.__traceback__)
        self.end(session, State.FAILED, error)

    def end(self, session: Session, state: State, failure: Exception | None = None) -> None:
        with self.bell:
            session.life.move(state, failure)
            self.sessions.pop(session.id, None)
            self.scheduler.leave(session.id)
            self.bell.ring()
        session.free()
        self.metrics.count(f"sessions_{state}")

    @contextmanager
    def alone(self, session: Session) -> Iterator[None]:
        """What fails in here concerns this session and nothing else.

        A block for which memory ran out is taken back; all else ends the session, an interruption, too.
        """
        failure: Exception = InferixError("its last block was interrupted")
        whole = False
        try:
            with shortages_named():
                yield
            whole = True
        except FAILURES as error:
            failure = error
        finally:
            if not whole and session.beginning is not None and isinstance(failure, SHORTAGES):
                self.take_back(session, failure)
            elif not whole:
                self.fail(session, failure)

    def take_back(self, session: Session, error: Exception) -> None:
        """Undo the block of a session that is being made, and tell its reader, who may ask for it again."""
        traceback.clear_frames(error.__traceback__)
        session.take_back()
        with self.bell:
            assert session.demand is not None
            session.demand.left, session.demand.trouble = 0, error
            session.outbox.take_back()
        self.metrics.count("blocks_taken_back")

    # Between blocks

    def turn(self) -> tuple[Session, ...]:
        """Do what was asked for since the last block; then say whose blocks come next, if any can be made."""
        self.driver.check_owner("step()")
        self.seen = self.bell.rings
        self.pipeline.collect()
        for session in list(self.sessions.values()):
            with self.alone(session):
                self.tend(session)
        self.driver.answer_calls()
        with self.bell:
            let_in = [self.sessions[index] for index in self.scheduler.admit_waiting()]
            relief = self.scheduler.relief()
        for session in let_in:
            with suppress(*FAILURES):  # it has failed, alone
                self.enter(session)
        if relief is not None:
            self.relieve(relief)
        return self.choose()

    def choose(self) -> tuple[Session, ...]:
        with self.bell:
            now = time.perf_counter()
            ready = [session for session in self.sessions.values() if self.can_go_on(session)]
            for session in self.sessions.values():
                session.ready_since = (session.ready_since or now) if session in ready else None
            held = [s.id for s in self.sessions.values() if s not in ready and not s.outbox.unfinished]
            chosen = self.scheduler.choose([session.id for session in ready], held, now)
            if chosen is None:
                return ()
            beside = self.beside(self.sessions[chosen], ready)
            return tuple(self.sessions[index] for index in self.scheduler.together(chosen, beside, now))

    def beside(self, chosen: Session, ready: list[Session]) -> list[int]:
        """Sessions whose next blocks can be run as one with that of the chosen one."""
        if not self.engine.executor.batches or not self.engine.memory.batches(chosen.size):
            return []
        return [s.id for s in ready if s is not chosen and s.likeness == chosen.likeness]

    def batch_failed(self, count: int, said: str) -> None:
        """So many sessions, each of which can run, could not as one: from now on fewer do."""
        self.metrics.count("batches_split")
        self.scheduler.batch_room = count - 1
        warnings.warn(f"{count} sessions could not be run as one ({said}); from now on fewer are", stacklevel=2)

    def can_go_on(self, session: Session) -> bool:
        return session.wants_block and session.id in self.scheduler.clients

    def tend(self, session: Session) -> None:
        """Controls of a session's life, and whether it is to end."""
        for control in session.mailbox.take(LIFE):
            self.apply(session, control)
        timeout, idle = self.limits.consumer_timeout, time.perf_counter() - session.outbox.touched
        if session.trouble is not None:
            self.fail(session, session.trouble)
        elif timeout is not None and session.outbox.ready and idle > timeout:
            said = f"nobody took its blocks for {idle:.1f} s (consumer_timeout is {timeout:g})"
            self.fail(session, InferixError(f"session {session.id} ended: {said}"))
        elif session.state is State.DRAINING and not session.outbox.unfinished:
            self.end(session, State.CLOSED)

    def apply(self, session: Session, control: Control) -> None:
        """One control of a session's life; one that changes nothing, such as a second pause, is just acknowledged."""
        if control.kind == "pause" and session.life.can(State.PAUSED):
            session.pausing = control.thread
            self.pause(session)
        elif control.kind == "resume" and session.state is State.PAUSED:
            session.life.move(State.RUNNING)
            with self.bell:
                self.scheduler.wake(session.id)
        elif control.kind == "stop" and session.life.can(State.DRAINING):
            session.life.move(State.DRAINING)
        self.applied(session, control, session.next_block)

    def applied(self, session: Session, control: Control, block: int, refused: str | None = None) -> None:
        """Take note that a control is in force, or refused, and which block will be the first to show it."""
        waited = time.perf_counter() - control.asked
        with self.bell:
            session.unshown.append((control, block, refused))
        self.metrics.count("controls")
        self.metrics.observe("control_wait_seconds", waited)
        self.tell({
            "session": session.id, "control": control.id, "kind": control.kind, "block": block, "waited": waited,
            "refused": refused,
        })  # fmt: skip

    def pause(self, session: Session) -> None:
        """Begin no more blocks of a session; its pages go to host memory, where that is asked for."""
        session.life.move(State.PAUSED)
        if self.engine.config.kv_offload and session.id in self.scheduler.clients:
            try:
                with shortages_named():
                    session.put_away()
            except SHORTAGES as error:
                warnings.warn(f"session {session.id} keeps its pages where they are: {error}", stacklevel=2)
                return
            with self.bell:
                self.scheduler.rest(session.id)
                self.bell.ring()

    def check_relief(self, relief: Relief) -> None:
        """UsageError for a step that could not be taken."""
        if relief.kind == "window":
            narrower(self.engine.preset, relief.value)
        if relief.kind == "decoder" and self.engine.parts.fast_vae is None:
            raise UsageError("overload may go over to the fast decoder, but there is none; give fast_vae")

    def relieve(self, relief: Relief) -> None:
        """Take one declared step against overload, and say so."""
        if relief.kind == "window":
            narrowed = narrower(self.engine.preset, relief.value)
            self.engine.preset = narrowed
            for session in self.sessions.values():
                session.timeline.preset = narrowed
        elif relief.kind == "decoder":
            for session in list(self.sessions.values()):
                with self.alone(session):
                    self.pipeline.settle(session.id)
                    session.track.change_decoder(self.engine.decoder)
        else:
            inside = [self.sessions[index] for index in self.scheduler.clients]
            for session in inside[relief.value :]:
                if session.life.can(State.PAUSED):
                    session.pausing = None
                    with self.alone(session):
                        self.pause(session)
        self.metrics.count("overload_steps")
        warnings.warn(f"blocks were late: overload step {relief.kind} {relief.value or ''}".rstrip(), stacklevel=2)

    def settle(self, session: Session) -> None:
        """Wait for what is being decoded; a failure there ends the session, and is raised."""
        self.pipeline.settle(session.id)
        if session.trouble is not None:
            self.fail(session, session.trouble)
            session.check_open()

    @torch.no_grad()
    def rewind(self, session: Session, block: int) -> None:
        self.settle(session)
        if block == session.next_block:
            return
        place = next((place for place, kept in enumerate(session.kept) if kept.block == block), None)
        if place is None:
            kept = [kept.block for kept in session.kept]
            policy = session.timeline.preset.context
            raise UsageError(
                f"session {session.id} cannot be rewound to block {block}: the next is {session.next_block}, and "
                f"{f'blocks from {kept[0]} on' if kept else 'no blocks'} are kept, rewind_blocks being "
                f"{policy.rewind_blocks}; give a larger rewind_blocks, or save the session in time"
            )
        for later in session.kept[place + 1 :]:
            later.release()
        moment, session.kept = session.kept[place], session.kept[:place]
        moment.give_to(session)
        session.track.rewind(block)
        with self.bell:
            dropped = session.outbox.drop_from(block)
            if session.demand is not None:
                session.demand.left += dropped
        self.metrics.count("rewinds")

    # A block

    def begin(self, session: Session, batch: int) -> None:
        """A block of a session begins, as one of `batch`: what it was told from here on counts for the next one."""
        with self.bell:
            assert session.demand is not None and session.ready_since is not None
            if session.state is State.NEW:
                session.life.move(State.RUNNING)
            session.demand.left -= 1
            session.outbox.begin()
            session.record = BlockRecord(session.id, session.next_block, Stopwatch(self.engine.device), batch)
            session.record.marks["queue"] = (session.ready_since, time.perf_counter())
            session.ready_since = None
        session.bring_back()
        session.keep_beginning()

    def finish(self, session: Session, latents: Tensor) -> None:
        """Decode a block and hand it out: beside the next block's passes, unless its context waits for pictures."""
        assert session.demand is not None
        session.beginning = None
        decode, record = session.demand.decode, session.record
        record.pages = self.pages_in_use
        if session.timeline.preset.context.needs_pixels:
            session.remember(latents, self.complete(session, record, latents, decode, keep=True))
            return
        session.remember(latents, None)
        if decode:
            self.pipeline.submit(session.id, partial(self.complete_beside, session, record, latents))
        else:
            self.pipeline.settle(session.id)
            self.complete(session, record, latents, decode=False)

    def complete(
        self, session: Session, record: BlockRecord, latents: Tensor, decode: bool, keep: bool = False
    ) -> Tensor | None:
        """Decode, where that is wanted, and put the block into its outbox; returns the pixels."""
        pixels = frames = None
        if decode or keep:
            with record.span("decode"):
                pixels = session.track.decode(record.block, latents)
                frames = to_frames(pixels) if decode else None
        self.deliver(session, record, latents, frames)
        return pixels

    def complete_beside(self, session: Session, record: BlockRecord, latents: Tensor) -> None:
        """The same on the decoder's thread: a failure waits there for the engine's."""
        try:
            with shortages_named():
                self.complete(session, record, latents, decode=True)
        except FAILURES as error:
            session.trouble = error
            self.bell.ring()

    def deliver(self, session: Session, record: BlockRecord, latents: Tensor, frames: Any) -> None:
        """The block is there: say what it is the first to show, and how it stands to its deadline."""
        spans, seconds, spec = record.spans, record.seconds, self.engine.spec
        made, decoded = spans["commit"][1] - spans["encode"][0], seconds.get("decode", 0.0)
        waited = session.timeline.preset.context.needs_pixels
        shown = len(latents) * spec.vae_stride[0] if frames is None else len(frames)
        with self.bell:
            now = time.perf_counter()
            record.acks = tuple(
                Ack(control.id, control.kind, record.block, now - control.asked, refused)
                for control, block, refused in session.unshown
                if block <= record.block
            )
            session.unshown = [entry for entry in session.unshown if entry[1] > record.block]
            share = made / record.batch
            self.scheduler.measured(session.id, share + decoded if waited else max(share, decoded))
            record.slack = self.scheduler.shown(session.id, now, shown / spec.fps)
            record.reliefs = tuple(relief.kind for relief in self.scheduler.reliefs)
            record.marks["emit"] = (now, now)
            session.outbox.put(Block(record.block, latents, frames, seconds, record.acks, record))
        self.measure(record, seconds, shown)

    def measure(self, record: BlockRecord, seconds: dict[str, float], frames: int) -> None:
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

    # Readers

    def ask(self, session: Session, demand: Demand) -> Demand:
        with self.bell:
            session.demand = demand
            self.bell.ring()
        return demand

    def withdraw(self, session: Session, demand: Demand) -> None:
        with self.bell:
            demand.left = 0

    def next_block(self, session: Session, demand: Demand) -> Block | None:
        """The session's next block, made here or waited for; None where there will be none."""
        while True:
            seen = self.bell.rings
            if session.demand is not demand:
                raise InferixError(f"another stream of session {session.id} has begun; read that one")
            if (block := session.outbox.take()) is not None:
                return self.taken(block)
            if session.life.failure is not None:
                raise session.life.failure
            if demand.trouble is not None and not session.outbox.unfinished:
                raise demand.trouble
            if session.state is State.CLOSED:
                return None
            if self.driver.owns():
                with self.driver.looping():
                    if not self.engine.step():
                        self.rest(session)
            elif not self.bell.wait_after(seen, DRIVER_WAIT) and not self.driver.loops:
                raise InferixError(
                    f"session {session.id} waits for a block, but thread {self.driver.name!r}, which drives the "
                    "engine, makes none; call engine.run() there, or engine.hand_over()"
                )

    def rest(self, session: Session) -> None:
        """Nothing can be made just now: wait for the decoder or another thread, unless that would be for ever."""
        said = None
        with self.bell:
            if session.outbox.unfinished or self.bell.rings != self.seen:
                pass
            elif session.id in self.scheduler.waiting:
                said = self.scheduler.obstacle(session.id, self.scheduler.waiting[session.id])
            elif session.state is State.PAUSED and session.pausing in (None, threading.get_ident()):
                said = f"session {session.id} is paused"
        if said is not None:
            raise InferixError(f"{said}, and this thread, which drives the engine, would wait for ever")
        self.bell.wait_after(self.seen)

    def taken(self, block: Block) -> Block:
        begin, _ = block.record.marks["emit"]
        block.record.marks["emit"] = (begin, time.perf_counter())
        if self.observers:
            self.tell(block.record.as_dict())
        return block

    def tell(self, record: dict[str, Any]) -> None:
        for observer in self.observers:
            observer(record)

    @property
    def pages_in_use(self) -> int:
        """Pages that any session holds; one that several hold counts once."""
        return sum(store.pool.used for store in self.engine.memory.stores.values())

    def check_integrity(self) -> None:
        """Hold the pools against the sessions."""
        caches = [cache for session in self.sessions.values() for cache in session.caches]
        for store in self.engine.memory.stores.values():
            store.pool.check_integrity([cache.table for cache in caches if cache.store is store])

    def gauges(self) -> dict[str, float]:
        """How things stand now: sessions by state, blocks and controls that wait, bytes and load."""
        with self.bell:
            found: dict[str, float] = {f"sessions_{state}": 0 for state in State if state not in ENDED}
            for session in self.sessions.values():
                found[f"sessions_{session.state}"] += 1
            found["sessions_waiting"] = len(self.scheduler.waiting)
            found["blocks_waiting"] = sum(len(session.outbox) for session in self.sessions.values())
            found["controls_waiting"] = sum(len(session.mailbox.waiting) for session in self.sessions.values())
            found["reserved_bytes"] = self.scheduler.reserved
            found["load"] = self.scheduler.load()
            found["pages_in_use"] = self.pages_in_use
            return found
