"""A live session: one stream, its controls with their receipts, and the outbox of its viewer.

It belongs to the event loop. The engine's thread makes the blocks; what has to happen between two blocks goes through
`EngineHost`. A session outlives a connection: while nobody is attached it requests no blocks.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import InferixError, SessionEnded, message_of, one_line
from ..runtime.engine import Engine
from ..runtime.sessions.output_queue import Block
from ..runtime.sessions.session import Session
from ..runtime.sinks import Frames
from ..schemes.camera import Camera as CameraStart
from ..schemes.camera import CameraMove
from .checkpoints import Checkpoint, Checkpoints, token_hash
from .engine_host import EngineHost
from .keys import HeldKeys
from .metrics import ServerMetrics
from .outbox import LiveBlock, Outbox, Receipt
from .pacing import Pacer
from .protocol import (
    Act,
    Applied,
    Camera,
    Control,
    ControlId,
    Ended,
    Fork,
    MediaFormat,
    Notice,
    Open,
    Opened,
    Pause,
    Ping,
    Pong,
    Prompt,
    Received,
    Record,
    Refused,
    Reseed,
    Restore,
    Resume,
    Rewind,
    Save,
    Snapshot,
    State,
    Stop,
)
from .real_time import RealTime
from .recording import Recording, Recordings
from .refusals import Refusal, refusal_of
from .settings import ServeSettings
from .video_in import VideoIn
from .worlds import Worlds, note_of

LOG = logging.getLogger("inferix.serve")
RATE_BLOCKS = 8  # blocks that the rate is measured over
KEEP_CHECKPOINT = ("draining", "lost", "moved")  # codes of ends after which another server may go on


class Viewer(Protocol):
    """A connection, as a session sees it."""

    def displace(self) -> None: ...


class Hub(Protocol):
    """The part of the set of live sessions that a session calls."""

    host: EngineHost
    settings: ServeSettings
    worlds: Worlds
    recordings: Recordings
    metrics: ServerMetrics
    checkpoints: Checkpoints
    real_time: RealTime

    def add_twin(self, twin: LiveSession) -> None: ...
    def take_place(self) -> None: ...
    def release_place(self) -> None: ...
    def ended(self, live: LiveSession) -> None: ...


@dataclass
class Start:
    """Start of a stream. prompt: None if it is not known, as of a session that a program saved.

    strength: of a session made from live video, as for `Engine.open`.
    """

    prompt: str | None
    seed: int | None
    strength: float | None = None


@dataclass(frozen=True)
class Entered:
    """A session of the engine, and where its stream goes on: the next block and its first picture."""

    session: Session
    block: int
    frame: int


class LiveSession:
    """One stream. Made by `LiveSessions`.

    id: 32 hex digits, which stay while the engine's sessions change. resume: what a client needs to come back.
    rollout: counts the engine's sessions that the stream has had. viewer: the connection attached to it.
    slack: seconds that the last block was early. names: id and resume token, of one that goes on from a checkpoint.
    """

    def __init__(
        self, hub: Hub, entered: Entered, start: Start, behind: str, names: tuple[str, str] | None = None
    ) -> None:
        self.hub, self.start, self.behind = hub, start, behind
        self.id, self.resume = names or (secrets.token_hex(16), secrets.token_urlsafe(32))
        self.slack: float | None = None
        self.saved_at: float = entered.block  # block of the last checkpoint
        self.outbox = Outbox(hub.settings.behind_blocks)
        self.viewer: Viewer | None = None
        self.rollout, self.paused, self.stopping = 0, False, False
        self.detached_at: float | None = time.monotonic()
        self.controlled_at = time.monotonic()
        self.keys = HeldKeys(next(iter(hub.host.engine.spec.actions), None))
        self.pending: dict[int, Receipt] = {}  # by the engine's id of the control
        self.next_receipts: list[Receipt] = []  # of what the next block is the first to show
        self.pressing: int | None = None  # the engine's id of a press that no block has begun with
        self.releases: list[Receipt] = []  # that came before their press took effect
        self.pacer = Pacer()
        self.recording: Recording | None = None
        self.video: VideoIn | None = None
        self.newest: Frames | None = None  # picture [H, W, 3]
        self._attached = asyncio.Event()
        self._producer: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._enter(entered)

    # Life

    def _enter(self, entered: Entered) -> None:
        """Go on with a session of the engine from its start."""
        self.session = entered.session
        self.next_frame, self.kept_from = entered.frame, entered.block
        self.starts: dict[int, tuple[int, str | None]] = {}  # by block: its first picture, and its prompt
        self.times: deque[tuple[float, int]] = deque(maxlen=RATE_BLOCKS)
        self.pacer.restart()

    def attach(self, viewer: Viewer) -> None:
        """Show the stream to a connection; an earlier one loses it."""
        if self.viewer is not None:
            self.viewer.displace()
        self.viewer, self.detached_at = viewer, None
        self.controlled_at = time.monotonic()
        self.pacer.restart()
        self._attached.set()
        if self._producer is None and not self.outbox.finished:
            self._produce()

    def greeting(self, id: ControlId, media: MediaFormat) -> Opened:
        """The answer to the control that a viewer begins with."""
        engine, settings = self.hub.host.engine, self.hub.settings
        return Opened(
            id=id, session=self.id, resume=self.resume, resume_seconds=settings.resume_seconds,
            model=engine.parts.source, preset=engine.preset.name, media=media, actions=list(engine.spec.actions),
            rest=self.keys.rest, camera=engine.spec.camera_channels is not None,
            rewind_blocks=engine.preset.context.rewind_blocks,
            frames_per_block=engine.preset.num_frame_per_block * engine.spec.vae_stride[0], behind=self.behind,
            prompt=self.start.prompt, seed=self.start.seed, paused=self.paused, next_block=self.session.next_block,
        )  # fmt: skip

    def state_for_viewer(self, block: LiveBlock) -> State:
        """A block's state, with what waits for its viewer now, and the latency of live video."""
        state = block.state
        state.waiting, state.skipped = self.outbox.blocks, self.outbox.skipped
        if block.arrived is not None:
            state.latency = time.perf_counter() - block.arrived
            self.hub.metrics.video_to_pixel.observe(state.latency)
        return state

    def detach(self, viewer: Viewer) -> None:
        """Have the stream wait for its client to come back."""
        if self.viewer is viewer:
            self.viewer, self.detached_at = None, time.monotonic()
            self._attached.clear()
            for action in tuple(self.keys.pressed):  # nobody is there to release them
                self.keys.release(action)
            with suppress(SessionEnded):
                if self.keys.action is not None:
                    self.session.act(self.keys.action)
                if self.session.current.camera is not None:
                    self.session.move(CameraMove())

    def _produce(self) -> None:
        self._producer = asyncio.create_task(self._make_blocks())

    async def _make_blocks(self) -> None:
        """Request blocks as their viewer needs them, until the session ends."""
        try:
            while not self.session.closed:
                await self._wait_for_turn()
                arrived = None if self.video is None else await self._feed(self.video)
                requested = time.perf_counter()
                count = self.pacer.count(requested) if self.video is None else 1
                async with aclosing(self.session.astream(count)) as blocks:  # type: ignore[type-var]
                    async for block in blocks:
                        self._show(block, requested if count == 1 else None, arrived)
                await self._checkpoint_if_due()
            self.end("stopped", "the session was stopped")
        except SessionEnded as error:
            stopped, ended = ("stopped", "the session was stopped"), ("ended", message_of(error))
            self.end(*(stopped if self.stopping else ended))
        except Exception as error:  # of any kind: it ended this session in the engine, and the others go on
            LOG.warning("session %s failed: %s", self.id, one_line(error))
            self.end("failed" if self.hub.host.alive else "lost", message_of(error))

    async def _feed(self, video: VideoIn) -> float | None:
        """Give the next block its pictures; returns when the first of them arrived, None for a block that has them."""
        wanted = await self.hub.host.call(lambda: self.session.pictures_wanted)
        if not wanted:
            return None
        arrived, pictures = await video.take(wanted)
        await self.hub.host.call(partial(self.session.feed, pictures))
        return arrived

    async def _checkpoint_if_due(self) -> None:
        """Save the session for another server, once enough blocks were made since the last time."""
        every = 0 if self.video is not None else self.hub.settings.checkpoint_every
        if every == 0 or self.session.closed or self.session.next_block - self.saved_at < every:
            return
        if not self.hub.checkpoints.owns(self.id):
            return self.end("moved", "another server goes on with the session")
        try:
            await self._checkpoint()
        except InferixError as error:
            LOG.warning("session %s has no new checkpoint: %s", self.id, one_line(error))
            self.saved_at = self.session.next_block

    async def _checkpoint(self) -> None:
        """Save the session between two blocks, with what its client has."""
        block, places = self.session.next_block, self.hub.checkpoints
        path = places.place(self.id, block)
        await self.hub.host.call(partial(self.session.save, path))
        checkpoint = Checkpoint(
            session=self.id, resume=token_hash(self.resume), owner=places.owner, prompt=self.start.prompt,
            seed=self.start.seed, behind=self.behind, paused=self.paused, rollout=self.rollout, block=block,
            file=path.name,
        )  # fmt: skip
        await asyncio.to_thread(places.add, checkpoint)
        self.saved_at = block

    async def _wait_for_turn(self) -> None:
        """Wait for a viewer, for room where its lag pauses the stream, and until the next block is due."""
        await self._attached.wait()
        if self.behind == "pause" and self.outbox.blocks >= self.outbox.room:
            since = time.perf_counter()
            await self.outbox.room_for_block()
            waited = time.perf_counter() - since
            self.outbox.put(Notice(kind="waited", message="the stream waited for its viewer", seconds=waited))
            self.pacer.restart()
        if self.video is None:  # whose pictures come no earlier than they are due
            await asyncio.sleep(self.pacer.wait(time.perf_counter()))
        await self._attached.wait()

    def _show(self, block: Block, requested: float | None, arrived: float | None = None) -> None:
        """Put a finished block with its receipts and the state after it into the outbox."""
        assert block.frames is not None
        now, fps, count = time.perf_counter(), self.hub.host.engine.fps, len(block.frames)
        slack = self.slack = self.pacer.delivered(now, requested, count / fps)
        late = None  # a stream's first block is not counted
        if self.times:
            late = slack is not None and slack < 0 and self.video is None  # which is not made ahead
        self.hub.real_time.note_block(block.record.spans["encode"][0], now, count / fps, late)
        receipts = self._receipts_of(block)
        self.times.append((now, count))
        frame, self.next_frame = self.next_frame, self.next_frame + count
        rewind_blocks = self.hub.host.engine.preset.context.rewind_blocks
        self.kept_from = max(self.kept_from, block.index + 1 - rewind_blocks)
        self.starts[block.index] = (frame, self.start.prompt)
        for old in [index for index in self.starts if index < self.kept_from - 1]:
            del self.starts[old]
        record = block.record
        state = State(
            block=block.index, frame=frame, frames=count, rollout=self.rollout, prompt=self.start.prompt,
            action=self.keys.action, seed=self.start.seed, position=self.next_frame / fps, rate=self._rate(),
            slack=slack, kept_from=self.kept_from, seconds=block.timings, waiting=0, skipped=0,
            overload=list(record.degradations), drift=record.drift,
            dropped=None if self.video is None else self.video.dropped,
        )  # fmt: skip
        live_block = LiveBlock(block.frames, state, receipts, arrived)
        self.newest = block.frames[-1].copy()
        if self.recording is not None:
            self.recording.add(live_block)
        skipped = self.outbox.put_block(live_block)
        if skipped:
            self.hub.metrics.skipped.inc(skipped)

    def _receipts_of(self, block: Block) -> list[Receipt]:
        receipts, self.next_receipts = self.next_receipts, []
        for ack in block.acks:
            receipt = self.pending.pop(ack.id, None)
            if receipt is None:
                continue
            if ack.refused is not None:
                self.refuse(receipt.id, Refusal("invalid", ack.refused))
                continue
            if receipt.prompt is not None:
                self.start.prompt = receipt.prompt
            receipts.append(receipt)
        return receipts

    def _rate(self) -> float:
        """Pictures per second over the last blocks."""
        elapsed = self.times[-1][0] - self.times[0][0]
        return sum(count for _, count in list(self.times)[1:]) / elapsed if elapsed > 0 else 0.0

    def end(self, code: str, message: str, world: str | None = None) -> None:
        """End the stream and free its memory; the viewer gets the reason after what waits for it."""
        if self.outbox.finished:
            return
        if code not in KEEP_CHECKPOINT:
            self.hub.checkpoints.remove(self.id)
        self.outbox.finish(Ended(code=code, message=message, world=world))
        if self._producer is not None and self._producer is not asyncio.current_task():
            self._producer.cancel()
        self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        try:
            for work in (self.hub.host.close(self.session), self._finish_recording()):
                try:
                    await work
                except InferixError as error:
                    LOG.warning("session %s: %s", self.id, one_line(error))
        finally:
            self._producer = self.newest = None
            self.hub.ended(self)

    async def closed(self) -> None:
        """Wait until an ended session has freed its memory."""
        if self._closing is not None:
            await self._closing

    async def drain(self) -> None:
        """Save the stream if that is asked for, and end it."""
        world = None
        async with self._still():
            with suppress(InferixError):  # such as one that is failing: it ends all the same
                await self._show_begun()
                if self.hub.settings.checkpoint_every and self.video is None:
                    await self._checkpoint()
                if self.hub.settings.save_on_exit and self.video is None:
                    world, _ = await self._save()
            self.end("draining", "the server is being stopped", world)

    async def _show_begun(self) -> None:
        """Show the blocks that were begun before the stream was to stand still."""
        count = await self.hub.host.call(lambda: len(self.session.output))
        if count:
            async with aclosing(self.session.astream(count)) as blocks:  # type: ignore[type-var]
                async for block in blocks:
                    self._show(block, None)

    # Controls

    async def apply(self, control: Control) -> None:
        """Apply a control. Its receipts, or a refusal, go to the outbox."""
        receipt = Receipt(control.id, getattr(control, "type", ""), time.perf_counter())
        if isinstance(control, Ping):
            return self.outbox.put(Pong(id=control.id))
        self.controlled_at = time.monotonic()
        self.outbox.put(Received(id=control.id))
        try:
            await VERBS[type(control)](self, control, receipt)
        except InferixError as error:
            self.refuse(control.id, refusal_of(error))

    def refuse(self, id: Any, refusal: Refusal) -> None:
        self.hub.metrics.refused(refusal)
        self.outbox.put(Refused(id=id, **refusal.as_dict()))

    async def _prompt(self, control: Prompt, receipt: Receipt) -> None:
        check_prompt(control.text, self.hub.settings)
        receipt.prompt = control.text
        self.pending[self.session.prompt(control.text, blend_blocks=control.transition)] = receipt

    async def _act(self, control: Act, receipt: Receipt) -> None:
        actions = self.hub.host.engine.spec.actions
        if control.action not in actions:
            self.session.act(control.action)  # raises the error that names the actions
        if control.pressed:
            self.keys.press(control.action)
            self.pressing = self._send_action(receipt)
            return
        self.keys.release(control.action)
        if self.pressing is None:
            self._send_action(receipt)
        else:
            self.releases.append(receipt)  # a press is to show, however short it was

    def _send_action(self, receipt: Receipt) -> int:
        """Put the action in force into the engine's queue; returns the engine's id of the control."""
        assert self.keys.action is not None
        number = self.session.act(self.keys.action)
        self.pending[number] = receipt
        return number

    async def _camera(self, control: Camera, receipt: Receipt) -> None:
        move = CameraMove(control.forward, control.right, control.yaw, control.pitch, control.turn)
        self.pending[self.session.move(move)] = receipt

    async def _pause(self, control: Pause, receipt: Receipt) -> None:
        self.paused = True
        self.pending[self.session.pause()] = receipt

    async def _resume(self, control: Resume, receipt: Receipt) -> None:
        self.paused = False
        self.pacer.restart()
        self.pending[self.session.resume()] = receipt

    async def _stop(self, control: Stop, receipt: Receipt) -> None:
        self.stopping = True
        self.pending[self.session.stop()] = receipt

    def _check_no_video(self) -> None:
        """Refusal for a session made from live video, which belongs to one connection."""
        if self.video is not None:
            raise Refusal("invalid", "a session made from live video cannot be forked, saved, or replaced by a world")

    async def _fork(self, control: Fork, receipt: Receipt) -> None:
        self._check_no_video()
        self.hub.take_place()
        try:
            session = await self.hub.host.make(self.session.fork)
        except BaseException:
            self.hub.release_place()
            raise
        entered = await self.hub.host.call(partial(entered_at, session))
        twin = LiveSession(self.hub, entered, Start(self.start.prompt, self.start.seed), self.behind)
        twin.kept_from = self.kept_from
        twin.starts = dict(self.starts)
        self.hub.add_twin(twin)
        self._applied(receipt, session=twin.id, resume=twin.resume)

    async def _rewind(self, control: Rewind, receipt: Receipt) -> None:
        async with self._still():
            await self.hub.host.call(partial(self.session.rewind, control.block))
            start = self.starts.get(control.block)
            if start is not None:
                self.next_frame = start[0]
            before = self.starts.get(control.block - 1)
            if before is not None:
                self.start.prompt = before[1]
            self._forget_shown()
            self.next_receipts = [receipt]
            if self.keys.action is not None:
                self.session.act(self.keys.action)

    async def _save_world(self, control: Save, receipt: Receipt) -> None:
        self._check_no_video()
        world, size = await self._save()
        self._applied(receipt, world=world, bytes=size)

    async def _save(self) -> tuple[str, int]:
        worlds = self.hub.worlds
        world, path = worlds.new()
        note = note_of(self.start.prompt, self.start.seed)
        await self.hub.host.call(partial(self.session.save, path, note))
        worlds.trim()
        return world, path.stat().st_size

    async def _restore(self, control: Restore, receipt: Receipt) -> None:
        self._check_no_video()
        path = self.hub.worlds.path(control.world)
        start = Start(*self.hub.worlds.about(control.world))
        await self._replace(partial(Session.restore, self.hub.host.engine, path), start, receipt)

    async def _seed(self, control: Reseed, receipt: Receipt) -> None:
        if self.start.prompt is None:
            raise Refusal("invalid", "the prompt of this world is not known; send prompt first")
        start = Start(self.start.prompt, control.seed, self.start.strength)
        engine, given = self.hub.host.engine, begins_with(self.hub.host.engine, self.hub.settings, start.strength)
        make = partial(engine.open, start.prompt, seed=control.seed, size=self.session.size, **given)
        await self._replace(make, start, receipt)

    async def _record(self, control: Record, receipt: Receipt) -> None:
        if control.on:
            if self.recording is not None:
                raise Refusal("wrong_order", "the session is being recorded; end that recording first")
            recordings, fps = self.hub.recordings, self.hub.host.engine.fps
            if (control.format == "rtmp") != (control.to is not None):
                raise Refusal("invalid", f"format is {control.format}; expected `to`, an address, with rtmp only")
            if control.format != "rtmp":
                self.recording = recordings.start(control.format, fps, self.session.size)
            else:
                assert control.to is not None
                self.recording = recordings.push(control.to, fps, self.session.size)
            return self._applied(receipt, url=self.recording.url)
        if self.recording is None:
            raise Refusal("wrong_order", "the session is not being recorded")
        url, size = self.recording.url, await self._finish_recording()
        self._applied(receipt, url=url, bytes=size)

    async def _snapshot(self, control: Snapshot, receipt: Receipt) -> None:
        if self.newest is None:
            raise Refusal("wrong_order", "the session has no picture yet")
        url, size = await asyncio.to_thread(self.hub.recordings.snapshot, self.newest)
        self._applied(receipt, url=url, bytes=size)

    async def _finish_recording(self) -> int:
        """End the recording, if there is one; returns its bytes."""
        recording, self.recording = self.recording, None
        return 0 if recording is None else await self.hub.recordings.finish(recording)

    async def _replace(self, make: Callable[[], Session], start: Start, receipt: Receipt) -> None:
        """Go on with another session of the engine, made once the present one has left its room."""
        async with self._still():
            old = self.session

            def replace() -> Session:
                old.close()
                return make()

            try:
                session = await self.hub.host.make(replace)
            except InferixError as error:
                if old.closed:
                    self.end("failed", message_of(error))
                raise
            self._enter(await self.hub.host.call(partial(entered_at, session)))
            self.start, self.rollout, self.paused = start, self.rollout + 1, False
            self._forget_shown()
            for pending in (*self.pending.values(), *self.releases):
                self.refuse(pending.id, Refusal("replaced", "the session went on from another place before it showed"))
            self.pending.clear()
            self.pressing, self.releases, self.next_receipts = None, [], [receipt]
            if self.keys.pressed and self.keys.action is not None:
                self.session.act(self.keys.action)

    def _forget_shown(self) -> None:
        """Drop what waits for the viewer, and refuse controls that only dropped blocks would have shown."""
        dropped = self.outbox.drop_blocks()
        begun = [number for number, receipt in self.pending.items() if receipt.begun]
        dropped += [self.pending.pop(number) for number in begun]
        for receipt in dropped:
            self.refuse(receipt.id, Refusal("rewound", "the session went back before it showed"))
        self.pacer.restart()
        self.times.clear()
        self.saved_at = -math.inf  # the last checkpoint is of what was left behind

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """Request no blocks meanwhile."""
        async with self._changing:
            if self._producer is not None:
                self._producer.cancel()
                await asyncio.wait({self._producer})
                self._producer = None
            try:
                yield
            finally:
                if not self.outbox.finished:
                    self._produce()

    def _applied(self, receipt: Receipt, **fields: Any) -> None:
        """Send the receipt of a control that no block shows."""
        seconds = time.perf_counter() - receipt.received
        block = self.session.next_block
        self.outbox.put(
            Applied(id=receipt.id, verb=receipt.verb, block=block, frame=self.next_frame, seconds=seconds, **fields)
        )

    def control_applied(self, record: dict[str, Any]) -> None:
        """Note that the engine has applied a control."""
        number = record["control"]
        receipt = self.pending.get(number)
        if receipt is not None and receipt.verb in ("pause", "stop"):
            del self.pending[number]
            self._applied(receipt)
        elif receipt is not None:
            receipt.begun = True
        if number == self.pressing:
            self.pressing = None
            releases, self.releases = self.releases, []
            try:
                for release in releases:
                    self._send_action(release)
            except InferixError as error:
                for release in releases:
                    self.refuse(release.id, refusal_of(error))


VERBS: dict[type[Control], Callable[[LiveSession, Any, Receipt], Awaitable[None]]] = {
    Prompt: LiveSession._prompt,
    Act: LiveSession._act,
    Camera: LiveSession._camera,
    Pause: LiveSession._pause,
    Resume: LiveSession._resume,
    Stop: LiveSession._stop,
    Fork: LiveSession._fork,
    Rewind: LiveSession._rewind,
    Save: LiveSession._save_world,
    Restore: LiveSession._restore,
    Reseed: LiveSession._seed,
    Record: LiveSession._record,
    Snapshot: LiveSession._snapshot,
}


def check_prompt(text: str, settings: ServeSettings) -> None:
    """Refusal for a prompt that is too long."""
    most = settings.prompt_characters
    if len(text) > most:
        message = f"the prompt has {len(text)} characters; expected at most {most}"
        raise Refusal("too_long", message, 413, limit=("prompt_characters", most))


def check_size(size: tuple[int, int], engine: Engine, settings: ServeSettings) -> None:
    """UsageError for a size that the model cannot make, Refusal for one that is too large for this server."""
    width, height = engine.default_size
    most = settings.picture_pixels or width * height
    if size[0] * size[1] > most:
        message = f"size is {size[0]}x{size[1]}; expected at most {most} pixels"
        raise Refusal("too_long", message, 400, limit=("picture_pixels", most))
    engine.spec.latent_size(size)
    if engine.parts.size not in (None, size):
        raise Refusal("invalid", f"size is {size[0]}x{size[1]}; this engine makes {width}x{height} only")


def entered_at(session: Session) -> Entered:
    """Where a session of the engine goes on; called in the engine's thread."""
    state = session.current
    latent = state.flight[0].span.frames.start if state.flight else state.timeline.next_frame
    stride = session.manager.resources.spec.vae_stride[0]
    return Entered(session, state.next_block, 0 if latent == 0 else (latent - 1) * stride + 1)


def begins_with(engine: Engine, settings: ServeSettings, strength: float | None = None) -> dict[str, Any]:
    """Arguments of `open` besides the prompt: an image and a camera at rest, for models that need them.

    strength: of live video in place of an image; None for none.
    """
    if strength is not None:
        return {"live": True, "strength": strength}
    given: dict[str, Any] = {"image": settings.image} if engine.spec.condition_channels else {}
    return given | ({"camera": CameraStart()} if engine.spec.camera_channels is not None else {})


async def open_session(
    host: EngineHost, control: Open, world: Path | None, settings: ServeSettings, strength: float | None = None
) -> Entered:
    """A session of the engine for an `open`, made from live video where there is a strength."""
    if world is not None:
        make = partial(Session.restore, host.engine, world)
    else:
        given = begins_with(host.engine, settings, strength)
        make = partial(host.engine.open, control.prompt, seed=control.seed, size=control.size, **given)
    session = await host.make(make)
    return await host.call(partial(entered_at, session))
