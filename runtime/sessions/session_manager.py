"""The sessions of one engine: admission, turns, overload and failures.

One thread drives the engine and owns everything here but control queues, output queues and the decoder's thread (see
`delivery`). What crosses threads is guarded by the condition. No heavy work is done while the condition is held.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InferixError, RankFailed, SessionEnded, UsageError
from ...models.decoder import Decoder
from ...schemes.presets import Preset, with_settings
from ..capacity.memory_need import session_need
from ..engine_condition import EngineCondition
from ..finite_check import Check
from ..limits import DegradationStep, Limits
from ..live_video import LiveVideo
from ..resources import Resources
from ..telemetry.ranges import Ranges
from ..telemetry.records import BlockRecord, Metrics, Stopwatch
from .control_queue import LIFECYCLE_CONTROLS, Control
from .delivery import Delivery, interrupted
from .engine_thread import SHORTAGES, EngineThread, shortages_named
from .lifecycle import ENDED, State
from .scheduler import Scheduler, SchedulerEntry
from .session import Session
from .session_file import read_session, write_session
from .session_state import SessionState

MANAGERS: weakref.WeakSet[SessionManager] = weakref.WeakSet()
FORK_LOCKS: list[EngineCondition] = []  # held while the process is forked


def narrower(preset: Preset, frames: int) -> Preset:
    """A preset with a window of at most `frames` latent frames; UsageError if a block does not fit into it."""
    size = preset.context.local_attn_size
    return with_settings(preset, local_attn_size=frames if size == -1 else min(size, frames))


class SessionManager:
    """Owns the open sessions, the scheduler, the decoder's thread and the metrics of one engine.

    ranges: marks sessions and their blocks on a profiler's timeline; None where nobody asked for it.
    step: makes the next blocks, called where a reader drives the engine. check_prompt: UsageError for a prompt that the
    engine cannot encode. continue_live: a live video with the pictures of a block more, without frames before a number.
    """

    def __init__(
        self,
        resources: Resources,
        limits: Limits,
        step: Callable[[], Sequence[Session]],
        check_prompt: Callable[[object], None],
        continue_live: Callable[[LiveVideo, NDArray[np.uint8], int], LiveVideo],
    ) -> None:
        self.resources, self.limits = resources, limits
        self.step, self.check_prompt, self.continue_live = step, check_prompt, continue_live
        self.condition = EngineCondition()
        self.thread = EngineThread(self.condition, resources.device)
        self.scheduler = Scheduler(limits)
        self.metrics = Metrics()
        self.ranges: Ranges | None = None
        self.delivery = Delivery(
            resources, self.condition, self.thread, self.scheduler, self.metrics, step, self._fail
        )
        self.sessions: dict[str, Session] = {}  # in the order they were opened
        for degradation in limits.overload:
            self._check_degradation(degradation)
        MANAGERS.add(self)

    @property
    def preset(self) -> Preset:
        """The preset in force: as loaded, with the window narrowed by the degradation steps taken so far.

        Overload narrows it here and nowhere else. Each session's timeline gets it when a block begins.
        """
        windows = [step.value for step in self.scheduler.degradations if step.kind == "window"]
        return narrower(self.resources.preset, min(windows)) if windows else self.resources.preset

    @property
    def decoder(self) -> Decoder:
        """The decoder of new sessions: the fast one once overload has switched to it."""
        parts = self.resources.parts
        fast = parts.fast_vae if self.scheduler.took("decoder") else None
        return parts.vae if fast is None else fast

    def is_owner(self) -> bool:
        """True in the thread that drives the engine; one that no living thread drives becomes this thread's."""
        return self.thread.is_owner()

    def check_owner(self, call: str) -> None:
        """UsageError in any thread but the one that drives the engine."""
        self.thread.check_owner(call)

    def is_waiting(self, session: Session) -> bool:
        """True until there is room for the session."""
        return session.id in self.scheduler.waiting

    def run(self, keep: bool) -> None:
        """Make blocks until all sessions have ended, or until `halt`."""
        self.check_owner("run()")
        with self.thread.running():
            while True:
                seen = self.condition.changes  # before the look at what may end the loop, so that no change is missed
                if self.thread.halted or not (keep or self.sessions or self.thread.calls):
                    return
                if not self.step():
                    self.condition.wait_after(seen, self.limits.consumer_timeout)

    # Admission and end

    def open(self, state: SessionState, entering: Callable[[], None] | None = None) -> Session:
        """Admit a session with a state, or have it wait. `entering` is called on admission.

        UsageError or InferixError for a session that is refused: it then holds nothing.
        """
        session = Session(new_id(), state, self)
        session.entering = entering
        self._join(session)
        return session

    def fork(self, session: Session) -> Session:
        """Admit a copy of a session, its rewind points included."""
        self.settle(session)
        twin = Session(new_id(), session.current.fork(), self)
        twin.rewind_points = [state.fork(twin.current.decoder) for state in session.rewind_points]
        self._join(twin)
        return twin

    @torch.no_grad()
    def feed(self, session: Session, pictures: NDArray[np.uint8]) -> None:
        """Encode the pictures of the next block of a live video."""
        state = session.current
        assert state.live is not None
        state.live = self.continue_live(state.live, pictures, state.timeline.next_frame)

    def save(self, session: Session, path: Path, note: str | None = None) -> None:
        """Write a session to a file."""
        self.settle(session)
        write_session(session.current, self.resources, self.preset, path, note)

    def restore(self, path: Path) -> Session:
        """Admit a session that was saved."""
        saved = read_session(path, self.resources, self.preset)
        state = SessionState.read(saved)
        return self.open(state, partial(state.fill, saved))

    def close(self, session: Session) -> None:
        """End a session once its last block is decoded; finished blocks may still be taken."""
        self.delivery.pipeline.wait(session.id)
        if session.state is not State.FAILED:
            self._end(session, State.CLOSED)

    def _join(self, session: Session) -> None:
        self.check_owner("open()")
        self.metrics.count("sessions_opened")
        try:
            inside = self.scheduler.join(session.id, self._entry(session))
        except InferixError:
            session.free()
            self.metrics.count("sessions_refused")
            raise
        self.sessions[session.id] = session
        if self.ranges is not None:
            session.range = self.ranges, self.ranges.start(f"session {session.id[:8]}")
        if inside:
            self._enter(session)

    def _enter(self, session: Session) -> None:
        """On admission, encode and cache the session's prefix. If that fails, end the session and raise."""
        session.current.timeline.preset = self.preset
        if session.entering is not None:
            try:
                with shortages_named():
                    session.entering()
            except BaseException as error:  # raised again, once the session has ended and holds nothing
                self._fail(session, error if isinstance(error, Exception) else interrupted("its opening", error))
                raise
            session.entering = None
        session.prefetch()

    def _entry(self, session: Session) -> SchedulerEntry:
        """The session as the scheduler sees it."""
        resources, preset = self.resources, session.current.preset
        page, spec = resources.kv_manager.form(session.size), resources.spec
        need = session_need(
            preset, spec, resources.parts.vae.spec, session.size, resources.config.dtype, page.nbytes,
            queued=self.limits.queue_blocks, graphs=resources.config.executor_spec.graphs,
        )  # fmt: skip
        stores = [store for (grid, _), store in resources.kv_manager.stores.items() if grid == page.grid]
        is_fixed = bool(stores) and not any(store.grows for store in stores)
        room = sum(store.pool.size for store in stores) * page.nbytes if is_fixed else None
        period = spec.vae_stride[0] * preset.num_frame_per_block / spec.fps
        most_batched = min((limit for store in stores if (limit := store.most_batched) is not None), default=None)
        return SchedulerEntry(need, session.size, period, room, most_batched)

    def _fail(self, session: Session, error: Exception) -> None:
        """End a session with an error, unless it has ended. The traceback loses its frames' local variables."""
        self.delivery.pipeline.wait(session.id)
        traceback.clear_frames(error.__traceback__)
        if session.state in ENDED:
            return
        self._end(session, State.FAILED, error)

    def _end(self, session: Session, state: State, failure: Exception | None = None) -> None:
        with self.condition:
            session.life.move(state, failure)
            self.sessions.pop(session.id, None)
            self.scheduler.leave(session.id)
            self.condition.signal()
            session.output.wake_readers()
        session.free()
        if session.range is not None:
            ranges, handle = session.range
            ranges.end(handle)
        self.resources.client.release()
        self.metrics.count(f"sessions_{state}")

    @contextmanager
    def isolate_failures(self, session: Session) -> Iterator[None]:
        """Keep an error to this session: roll the block back if memory ran out, end the session otherwise.

        An interruption (Ctrl-C, or one in another block of the batch) rolls the block back and is raised.
        """
        try:
            with shortages_named():
                yield
        except Exception as error:  # of any kind: it ends this session, and the others go on
            if session.rollback_point is not None and isinstance(error, SHORTAGES):
                self._rollback(session, error)
            else:
                self._fail(session, error)
        except BaseException as error:  # an interruption, raised again
            if session.rollback_point is not None:
                self._rollback(session)
            elif session.begun:
                self._fail(session, interrupted("its last block", error))
            raise

    def _rollback(self, session: Session, error: Exception | None = None) -> None:
        """Undo the block in progress. Its reader gets the error, if there is one, and may request the block again."""
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        session.rollback()
        if not session.begun:
            return
        with self.condition:
            assert session.demand is not None
            session.begun = False
            session.demand.left, session.demand.error = (session.demand.left + 1, None) if error is None else (0, error)
            session.output.cancel()
        self.metrics.count("blocks_rolled_back")

    # Between blocks

    def prepare_step(self) -> tuple[Session, ...]:
        """Apply lifecycle controls and calls, admit and degrade; then pick the sessions whose blocks come next."""
        self.check_owner("step()")
        self._check_ranks()
        self.delivery.pipeline.collect()
        for session in list(self.sessions.values()):
            with self.isolate_failures(session):
                self._tend(session)
        self.thread.answer_calls()
        with self.condition:
            admitted = [self.sessions[name] for name in self.scheduler.admit_waiting()]
            degradation = self.scheduler.next_degradation()
        for session in admitted:
            with self.isolate_failures(session):
                self._enter(session)
        if degradation is not None:
            self._degrade(degradation)
        return self._pick()

    def _check_ranks(self) -> None:
        """End all sessions with a RankFailed, and raise it, where the ranks have ended."""
        if (fault := self.resources.fault) is None:
            return
        for session in list(self.sessions.values()):
            self._fail(session, RankFailed(fault))
        raise RankFailed(fault)

    def _pick(self) -> tuple[Session, ...]:
        with self.condition:
            now = time.perf_counter()
            ready = self._ready(now)
            while ready and (seconds := self._wait_for_batch(ready, now)) > 0:
                self.condition.wait_after(self.condition.changes, seconds)
                now = time.perf_counter()
                ready = self._ready(now)
            can_run = {session.id for session in ready}
            blocked = [s.id for s in self.sessions.values() if s.id not in can_run and not s.output.unfinished]
            chosen = self.scheduler.pick([session.id for session in ready], blocked, now)
            if chosen is None:
                return ()
            others = self._compatible_with(self.sessions[chosen], ready)
            return tuple(self.sessions[name] for name in self.scheduler.pick_batch(chosen, others, now))

    def _ready(self, now: float) -> list[Session]:
        """Sessions whose next blocks can begin; notes since when that is so."""
        ready = [session for session in self.sessions.values() if self._can_run(session)]
        can_run = {session.id for session in ready}
        for session in self.sessions.values():
            session.ready_since = (session.ready_since or now) if session.id in can_run else None
        return ready

    def _wait_for_batch(self, ready: list[Session], now: float) -> float:
        """Seconds for which the next block waits for sessions that have requested more but are held back."""
        if self.limits.batch_wait is None:
            return 0.0
        first = self.sessions[self.scheduler.first([session.id for session in ready])]
        here = [first.id, *self._compatible_with(first, ready)]
        held_back = [s for s in self.sessions.values() if s.requests_block and s.output.full and self._is_admitted(s)]
        coming = self._compatible_with(first, held_back)
        since = min(self.sessions[name].ready_since or now for name in here)
        return self.scheduler.batch_wait(here, len(coming), since, now)

    def _compatible_with(self, chosen: Session, ready: list[Session]) -> list[str]:
        """Sessions of `ready` whose next blocks can be batched with the chosen one's."""
        if not self.resources.config.executor_spec.batches:
            return []
        key = chosen.current.batch_key
        return [session.id for session in ready if session is not chosen and session.current.batch_key == key]

    def split_batches(self, count: int, message: str) -> None:
        """Batch fewer than `count` sessions from now on, since a batch of `count` failed and each alone ran."""
        self.metrics.count("batches_split")
        self.scheduler.batch_room = count - 1
        warnings.warn(f"{count} sessions could not be run as one ({message}); from now on fewer are", stacklevel=2)

    def _can_run(self, session: Session) -> bool:
        return session.wants_block and not session.pictures_wanted and self._is_admitted(session)

    def _is_admitted(self, session: Session) -> bool:
        return session.id in self.scheduler.admitted

    def _tend(self, session: Session) -> None:
        """Apply lifecycle controls; end the session if it failed, timed out or has drained."""
        for control in session.controls.pending(LIFECYCLE_CONTROLS):
            self._apply(session, control)
        timeout, idle = self.limits.consumer_timeout, time.perf_counter() - session.output.touched
        if session.decode_error is not None:
            self._fail(session, session.decode_error)
        elif timeout is not None and session.output.ready and idle > timeout:
            message = f"nobody took its blocks for {idle:.1f} s (consumer_timeout is {timeout:g})"
            self._fail(session, SessionEnded(f"session {session.id} ended: {message}"))
        elif session.state is State.DRAINING and not session.output.unfinished:
            self._end(session, State.CLOSED)

    def _apply(self, session: Session, control: Control) -> None:
        """Apply a lifecycle control; one that changes nothing, such as a second pause, is acknowledged all the same."""
        if control.kind == "pause" and session.life.can(State.PAUSED):
            session.paused_by = control.thread
            self._pause(session)
        elif control.kind == "resume" and session.state is State.PAUSED:
            session.life.move(State.RUNNING)
            with self.condition:
                self.scheduler.wake(session.id)
        elif control.kind == "stop" and session.life.can(State.DRAINING):
            session.life.move(State.DRAINING)
        self.acknowledge(session, control, session.next_block)

    def acknowledge(self, session: Session, control: Control, block: int, refused: str | None = None) -> None:
        """Record a control that was applied, or refused, and `block`, the first that shows it."""
        waited = time.perf_counter() - control.asked
        with self.condition:
            session.controls.remove(control)
            session.unshown.append((control, block, refused))
        self.metrics.count("controls")
        self.metrics.observe("control_wait_seconds", waited)
        self.delivery.notify({
            "session": session.id, "control": control.id, "kind": control.kind, "block": block, "waited": waited,
            "refused": refused,
        })  # fmt: skip

    def _pause(self, session: Session) -> None:
        """Begin no more blocks of a session; with `kv_offload`, move its pages to host memory."""
        session.life.move(State.PAUSED)
        if self.resources.config.kv_offload and session.id in self.scheduler.admitted:
            try:
                with shortages_named():
                    session.offload()
            except SHORTAGES as error:
                warnings.warn(f"session {session.id} keeps its pages where they are: {error}", stacklevel=2)
                return
            with self.condition:
                self.scheduler.rest(session.id)
                self.condition.signal()

    # Overload

    def _check_degradation(self, step: DegradationStep) -> None:
        """UsageError for a step that could not be taken."""
        if step.kind == "window":
            narrower(self.resources.preset, step.value)
        if step.kind == "decoder" and self.resources.parts.fast_vae is None:
            raise UsageError("overload may switch to the fast decoder, but there is none; give fast_vae")

    def _degrade(self, step: DegradationStep) -> None:
        """Take a degradation step that the scheduler chose, and warn. `preset` follows from a narrower window."""
        if step.kind == "decoder":
            for session in list(self.sessions.values()):
                with self.isolate_failures(session):
                    self.delivery.pipeline.wait(session.id)
                    session.current.decoder.change_decoder(self.decoder)
        elif step.kind == "sessions":
            admitted = [self.sessions[name] for name in self.scheduler.admitted]
            for session in admitted[step.value :]:
                if session.life.can(State.PAUSED):
                    session.paused_by = None
                    with self.isolate_failures(session):
                        self._pause(session)
        self.metrics.count("overload_steps")
        warnings.warn(f"blocks were late: overload step {step.kind} {step.value or ''}".rstrip(), stacklevel=2)

    # Rewinding

    def settle(self, session: Session) -> None:
        """Wait for the decoder. A failure there ends the session and is raised."""
        self.delivery.pipeline.wait(session.id)
        if session.decode_error is not None:
            self._fail(session, session.decode_error)
            session.check_open()

    @torch.no_grad()
    def rewind(self, session: Session, block: int) -> None:
        """Return to the state before `block` and drop finished blocks from it on. UsageError without such a state."""
        self.settle(session)
        if block == session.next_block:
            return
        kept = [state.next_block for state in session.rewind_points]
        if block not in kept:
            raise UsageError(
                f"session {session.id} cannot be rewound to block {block}: the next is {session.next_block}, and "
                f"{f'blocks from {kept[0]} on' if kept else 'no blocks'} are kept, rewind_blocks being "
                f"{self.preset.context.rewind_blocks}; give a larger rewind_blocks, or save the session in time"
            )
        index = kept.index(block)
        for state in (*session.rewind_points[index + 1 :], session.current):
            state.release()
        session.current, session.rewind_points = session.rewind_points[index], session.rewind_points[:index]
        session.current.decoder.rewind(block)
        with self.condition:
            dropped = session.output.drop_from(block)
            if session.demand is not None:
                session.demand.left += dropped
        self.metrics.count("rewinds")

    # A block

    def begin_block(self, session: Session, batch: int) -> None:
        """Start one block (batched with `batch` sessions). Controls that arrive from now on apply to the next block."""
        session.mark_rollback()
        with self.condition:
            assert session.demand is not None and session.ready_since is not None
            session.begun = True
            if session.state is State.NEW:
                session.life.move(State.RUNNING)
            session.demand.left -= 1
            session.output.reserve()
            watch = Stopwatch(self.resources.device)
            session.record = BlockRecord(session.id, session.next_block, watch, batch, self.ranges)
            session.record.marks["queue"] = (session.ready_since, time.perf_counter())
            session.ready_since = None
        session.onload()
        session.keep_rewind_point()
        session.current.timeline.preset = self.preset

    def finish_block(self, session: Session, latents: Tensor, check: Check) -> None:
        """Check a block, decode it and deliver it: beside the next block's passes, or before them."""
        assert session.demand is not None
        decode, record, state = session.demand.decode, session.record, session.current
        record.pages = self.pages_in_use
        stride, pixels, frames = self.resources.spec.vae_stride[0], None, None
        if self.delivery.delivers_beside(session, decode):
            state.remember(latents, None, stride)
            session.rollback_point = None
            self.delivery.deliver_beside(session, record, latents, check, decode)
        else:
            self.settle(session)
            check()
            with state.decoder.undone_on_error():
                if decode or state.preset.context.needs_pixels:
                    pixels, frames = self.delivery.decode(session, record, latents, decode)
                state.remember(latents, pixels, stride)
                session.rollback_point = None
            self.delivery.deliver(session, record, latents, frames, beside=False)
        session.begun = False

    @property
    def pages_in_use(self) -> int:
        """Pages that any session holds; one that several hold counts once."""
        return sum(store.pool.used for store in self.resources.kv_manager.stores.values())

    def check_integrity(self) -> None:
        """InferixError unless every page in use is held by an open session, as often as it is counted."""
        caches = [cache for session in self.sessions.values() for cache in session.caches]
        for store in self.resources.kv_manager.stores.values():
            store.pool.check_integrity([cache.table for cache in caches if cache.store is store])

    def after_fork(self) -> None:
        """Make a child process whole: it has one thread, and none of what the decoder's thread had under way."""
        self.thread.after_fork()
        self.metrics.lock = threading.Lock()
        for name in self.delivery.pipeline.after_fork():
            if session := self.sessions.get(name):
                session.decode_error = SessionEnded("a block was being decoded when the process was forked")

    def gauges(self) -> dict[str, float]:
        """Values now: sessions by state, waiting blocks and controls, bytes and load."""
        with self.condition:
            values: dict[str, float] = {f"sessions_{state}": 0 for state in State if state not in ENDED}
            for session in self.sessions.values():
                values[f"sessions_{session.state}"] += 1
            values["sessions_waiting"] = len(self.scheduler.waiting)
            values["blocks_waiting"] = sum(len(session.output) for session in self.sessions.values())
            values["controls_waiting"] = sum(len(session.controls.waiting) for session in self.sessions.values())
            values["reserved_bytes"] = self.scheduler.reserved + self.scheduler.batch_bytes()
            values["load"] = self.scheduler.load()
            values["sessions_room"] = self.scheduler.room()
            values["pages_in_use"] = self.pages_in_use
            return values


def new_id() -> str:
    """A session's id: 128 random bits in hex, which nobody guesses and no order follows."""
    return secrets.token_hex(16)


def before_fork() -> None:
    """Hold the lock of every engine, so that no thread is changing what it guards."""
    managers = sorted(MANAGERS, key=id)
    for manager in managers:
        manager.condition.acquire()
    FORK_LOCKS.extend(manager.condition for manager in managers)


def release_fork_locks() -> None:
    while FORK_LOCKS:
        FORK_LOCKS.pop().release()


def after_fork_in_child() -> None:
    """Make every engine usable in a child process. torch's own threads are gone: it computes with one."""
    release_fork_locks()
    for manager in sorted(MANAGERS, key=id):
        manager.after_fork()
        torch.set_num_threads(1)


os.register_at_fork(before=before_fork, after_in_parent=release_fork_locks, after_in_child=after_fork_in_child)
