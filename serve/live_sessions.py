"""The live sessions of a server: places, a queue for them, coming back, and the end of those that nobody uses."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import InferixError
from ..runtime.sessions.session import Session
from .checkpoints import Checkpoint, Checkpoints, knows
from .engine_host import EngineHost
from .live_session import LiveSession, Start, check_prompt, check_size, entered_at, open_session
from .metrics import ServerMetrics
from .protocol import Attach, Open
from .real_time import RealTime, obstacle
from .recording import Recordings
from .refusals import RETRY_AFTER, Refusal
from .settings import ServeSettings
from .trace import Trace
from .video_in import VideoIn
from .worlds import Worlds

LOG = logging.getLogger("inferix.serve")
SWEEP_SECONDS = 1.0  # between two looks for sessions that nobody uses


class LiveSessions:
    """All live sessions, by id. draining: none is opened any more."""

    def __init__(
        self,
        host: EngineHost,
        settings: ServeSettings,
        worlds: Worlds,
        recordings: Recordings,
        metrics: ServerMetrics,
        checkpoints: Checkpoints,
        trace: Trace,
    ) -> None:
        self.host, self.settings, self.metrics = host, settings, metrics
        self.worlds, self.recordings, self.checkpoints, self.trace = worlds, recordings, checkpoints, trace
        self.real_time = RealTime(shared=host.engine.device.type == "cpu")
        self.sessions: dict[str, LiveSession] = {}
        self.draining = False
        metrics.load.set_function(lambda: self.load)
        self._places = 0  # taken, by sessions or on their behalf
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._continuing = asyncio.Lock()  # one client at a time goes on from a checkpoint

    # Opening and coming back

    async def open(
        self, control: Open, queued: Callable[[int], object], strength: float | None = None
    ) -> LiveSession:
        """Open a session. queued: called with the number of clients before this one, where it has to wait.

        strength: of a session that is made from live video, from pictures that its `video` gets; None for another one.
        Refusal where there is no room, or the session cannot be opened.
        """
        if control.prompt is not None:
            check_prompt(control.prompt, self.settings)
        if control.size is not None:
            check_size(control.size, self.host.engine, self.settings)
        world, start = None, Start(control.prompt, control.seed, strength)
        if control.world is not None:
            world, start = self.worlds.path(control.world), Start(*self.worlds.about(control.world))
        elif control.prompt is None:
            raise Refusal("invalid", "open has neither prompt nor world; send one of them")
        await self._wait_for_place(queued)
        try:
            entered = await open_session(self.host, control, world, self.settings, strength)
        except BaseException:
            self.release_place()
            raise
        live = LiveSession(self, entered, start, control.behind or self.settings.behind)
        if strength is not None:
            engine = self.host.engine
            room = engine.preset.num_frame_per_block * engine.spec.vae_stride[0] + engine.spec.first_pictures
            live.video = VideoIn(live.session.size, engine.fps, room, self.settings.upload_pixels)
        self._add(live)
        return live

    async def attach(self, control: Attach) -> LiveSession:
        """The session that a client comes back to, from its checkpoint where another server has had it.

        Refusal unless the client knows its resume token.
        """
        async with self._continuing:
            live = self.sessions.get(control.session)
            known = "" if live is None else live.resume
            if hmac.compare_digest(known.encode(), control.resume.encode("utf-8", "replace")) and live is not None:
                return live
            checkpoint = self.checkpoints.find(control.session) if live is None else None
            if checkpoint is None or not knows(checkpoint, control.resume):
                raise Refusal("not_found", "there is no such session, or it has another resume token", 404, close=4404)
            return await self._continue_from(checkpoint, control.resume)

    async def _continue_from(self, checkpoint: Checkpoint, resume: str) -> LiveSession:
        """Go on with a session of another server; Refusal where there is no place."""
        if (obstacle := self._full()) is not None:
            raise obstacle
        self._places += 1
        try:
            restore = partial(Session.restore, self.host.engine, self.checkpoints.path(checkpoint))
            session = await self.host.make(restore)
            entered = await self.host.call(partial(entered_at, session))
        except BaseException:
            self.release_place()
            raise
        start, names = Start(checkpoint.prompt, checkpoint.seed), (checkpoint.session, resume)
        live = LiveSession(self, entered, start, checkpoint.behind, names)
        live.rollout = checkpoint.rollout + 1
        if checkpoint.paused:
            live.paused = True
            live.session.pause()
        self.checkpoints.add(replace(checkpoint, owner=self.checkpoints.owner, rollout=live.rollout))
        self._add(live)
        LOG.info("session %s goes on from its checkpoint at block %d", live.id, checkpoint.block)
        return live

    async def _wait_for_place(self, queued: Callable[[int], object]) -> None:
        self._admit_waiting()
        obstacle = self._obstacle()
        if obstacle is None:
            self._places += 1
            return
        if obstacle.code == "draining" or len(self._waiting) >= self.settings.queue:
            raise obstacle
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        queued(len(self._waiting) - 1)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release_place()
            elif place in self._waiting:
                self._waiting.remove(place)
            raise

    def _obstacle(self) -> Refusal | None:
        """The reason why no session can be opened now."""
        if (full := self._full()) is not None:
            return full
        late = obstacle(self._places, self.load, self.real_time.late) if self.settings.realtime else None
        if late is not None:
            return self._no_room(late, ("realtime", True))
        return None

    def _full(self) -> Refusal | None:
        """The reason why not even a session that another server has had can go on here."""
        if self.draining:
            return Refusal("draining", "the server is being stopped", 503, None, RETRY_AFTER, close=1013)
        if self._places >= self.settings.sessions:
            return self._no_room(f"{self._places} sessions are open", ("sessions", self.settings.sessions))
        return None

    def _no_room(self, message: str, limit: tuple[str, Any]) -> Refusal:
        waiting = f", and {len(self._waiting)} clients wait" if self._waiting else ""
        return Refusal("at_capacity", message + waiting, 503, limit, RETRY_AFTER, close=1013)

    @property
    def places_taken(self) -> int:
        """Places of sessions, those that are being opened included."""
        return self._places

    @property
    def load(self) -> float:
        """Share of real time that the sessions take."""
        return self.real_time.load(self._places)

    # What sessions call

    def take_place(self) -> None:
        """Take a place for a fork; Refusal where there is none."""
        if (obstacle := self._obstacle()) is not None:
            raise obstacle
        self._places += 1

    def release_place(self) -> None:
        self._places -= 1
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        """Give places to clients that wait, in order, as far as there is room."""
        while self._waiting and self._obstacle() is None:
            place = self._waiting.popleft()
            if not place.done():
                self._places += 1
                place.set_result(None)

    def add_twin(self, twin: LiveSession) -> None:
        self._add(twin)

    def _add(self, live: LiveSession) -> None:
        self.sessions[live.id] = live
        self.metrics.live.set(len(self.sessions))
        LOG.info("session %s opened", live.id)

    def ended(self, live: LiveSession) -> None:
        """Forget a session that has freed its memory."""
        if self.sessions.pop(live.id, None) is not None:
            self.metrics.live.set(len(self.sessions))
            self.release_place()
            LOG.info("session %s ended", live.id)

    def control_applied(self, record: dict[str, Any]) -> None:
        """Pass the record of an applied control on to its session."""
        for live in self.sessions.values():
            if live.session.id == record["session"]:
                return live.control_applied(record)

    # Ends

    async def sweep(self) -> None:
        """End sessions whose clients are gone or idle, for as long as the server runs."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.real_time.forget_old(time.perf_counter())
            self._admit_waiting()
            now = time.monotonic()
            for live in tuple(self.sessions.values()):
                away = 0.0 if live.detached_at is None else now - live.detached_at
                if away > self.settings.resume_seconds:
                    live.end("gone", f"its client was away for more than {self.settings.resume_seconds:g} s")
                elif now - live.controlled_at > self.settings.idle_seconds:
                    live.end("idle", f"it had no control for more than {self.settings.idle_seconds:g} s")

    async def drain(self) -> None:
        """Open nothing more, and end all sessions; those that wait for a place are refused."""
        self.draining = True
        for place in self._waiting:
            place.set_exception(Refusal("draining", "the server is being stopped", 503, None, RETRY_AFTER, close=1013))
        self._waiting.clear()
        lives = tuple(self.sessions.values())
        results = await asyncio.gather(*(live.drain() for live in lives), return_exceptions=True)
        for live, result in zip(lives, results, strict=True):
            if isinstance(result, InferixError):
                LOG.warning("session %s was not drained: %s", live.id, result)
            elif isinstance(result, BaseException):
                raise result
        for live in lives:
            await live.closed()
