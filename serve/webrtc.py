"""WebRTC: WHEP, a video track of one session, and WHIP, the video of a client that a session is made from.

Both have a data channel with the live protocol. The offer opens a session or attaches one; the answer's Location ends
it. aiortc is imported when the first offer comes (the extra `webrtc`). Signalling has the server's token; ICE servers
are none, so that no other host is asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InferixError, message_of, quoted
from ..runtime.sinks import Frames
from .control_reader import Closed, ControlReader
from .live_session import LiveSession
from .live_sessions import LiveSessions
from .outbox import LiveBlock
from .protocol import Attach, Codec, Event, MediaFormat, Open, Refused
from .refusals import Refusal, refusal_of

if TYPE_CHECKING:
    from aiortc import RTCDataChannel, RTCPeerConnection

    from ..runtime.engine import Engine

LOG = logging.getLogger("inferix.serve")
CLOCK = 90000  # ticks per second of RTP video
LONGEST_SDP = 65536  # characters
LATEST = 2.0  # seconds of pictures that wait for the track; older ones are dropped
CONNECTING = 30.0  # seconds that a peer may take to connect

Way = Literal["whep", "whip"]


class Pictures:
    """Pictures that wait for a track, which takes one every `1 / fps` seconds."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.waiting: deque[Any] = deque(maxlen=max(1, int(LATEST * fps)))
        self.last: Any = None
        self.count = 0
        self.start: float | None = None

    def add(self, frames: Frames) -> None:
        self.waiting.extend(frames)

    async def next(self) -> Any:
        """The next picture as a frame of PyAV, once it is due; the last one again where there is none."""
        import av

        while self.last is None and not self.waiting:
            await asyncio.sleep(1 / self.fps / 4)
        now = time.monotonic()
        self.start = now if self.start is None else self.start
        await asyncio.sleep(max(0.0, self.start + self.count / self.fps - now))
        if self.waiting:
            self.last = self.waiting.popleft()
        frame = av.VideoFrame.from_ndarray(self.last, format="rgb24")
        frame.pts, frame.time_base = round(self.count * CLOCK / self.fps), Fraction(1, CLOCK)
        self.count += 1
        return frame


class Peer:
    """A client by WebRTC. track: its video, that its session is made from; None for a viewer alone.

    shows: it gets the session's pictures; otherwise another connection is the viewer.
    """

    def __init__(
        self, hub: LiveSessions, live: LiveSession, connection: RTCPeerConnection, pictures: Pictures, track: Any
    ) -> None:
        self.hub, self.live, self.connection = hub, live, connection
        self.codec = Codec("inferix.json")
        self.reader = ControlReader(self.codec, hub.settings.messages_per_second)
        self.channel: RTCDataChannel | None = None
        self.pictures, self.track, self.shows = pictures, track, True
        self.messages: asyncio.Queue[str | bytes] = asyncio.Queue(maxsize=256)
        self.feeding: asyncio.Task[None] | None = None
        self.connected = asyncio.Event()
        self.over = asyncio.Event()
        connection.on("connectionstatechange", self._look)
        connection.on("datachannel", self._take_channel)

    def displace(self) -> None:
        """Have the peer end: another viewer has its session. One that sends video only shows no pictures any more."""
        if self.track is None:
            self.over.set()
        elif self.feeding is not None:
            self.shows = False
            self.feeding.cancel()

    def _look(self) -> None:
        if self.connection.connectionState == "connected":
            self.connected.set()
        elif self.connection.connectionState in ("failed", "closed"):
            self.over.set()

    def _take_channel(self, channel: RTCDataChannel) -> None:
        self.channel = channel
        channel.on("message", self._queue_message)
        width, height = self.live.session.size
        media = MediaFormat(name="webrtc", width=width, height=height, fps=self.hub.host.engine.fps)
        self._send(self.live.greeting(0, media))

    def _queue_message(self, message: str | bytes) -> None:
        if self.messages.full():
            self.over.set()  # it sends faster than controls are applied
        else:
            self.messages.put_nowait(message)

    async def run(self) -> None:
        """Take the peer's video and show the session, until the peer or the session ends."""
        works: list[Coroutine[Any, Any, object]] = [
            self._show(), self._take_controls(), self.over.wait(), self._check_connected()
        ]  # fmt: skip
        if self.track is not None:
            assert self.live.video is not None
            works += [self.live.video.receive(self.track), self.live.video.sample()]
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            self.live.detach(self)
            if self.track is not None:
                reasons = [message_of(result) for result in results if isinstance(result, Refusal)]
                self.live.end("stopped", reasons[0] if reasons else "its video has ended")
            await self.connection.close()

    async def _check_connected(self) -> None:
        """End where the peer does not connect in time."""
        try:
            async with asyncio.timeout(CONNECTING):
                await self.connected.wait()
        except TimeoutError:
            LOG.info("a peer of session %s did not connect", self.live.id)
            return
        await self.over.wait()

    async def _show(self) -> None:
        """Show the session, as long as this peer is its viewer, and wait for its end."""
        if self.shows:
            self.feeding = asyncio.create_task(self._feed())
            try:
                await asyncio.wait({self.feeding})
            finally:
                self.feeding.cancel()
            if not self.feeding.cancelled():
                return self.feeding.result()
        await self.live.outbox.wait_finished()

    async def _feed(self) -> None:
        """Give the session's pictures to the track, and its events to the data channel."""
        while (item := await self.live.outbox.take()) is not None:
            if isinstance(item, LiveBlock):
                for receipt in item.applied(time.perf_counter(), self.hub.metrics):
                    self._send(receipt)
                self.pictures.add(item.frames)
                self._send(self.live.state_for_viewer(item))
            else:
                self._send(item)

    async def _take_controls(self) -> None:
        while True:
            message = await self.messages.get()
            try:
                control = self.reader.read(message)
                if isinstance(control, Open | Attach):
                    raise Refusal("wrong_order", "a session is open; make another offer")
                if not self.shows:
                    raise Refusal("wrong_order", "another connection shows the session, and takes its controls")
            except Refusal as refusal:
                self._send(Refused(**refusal.as_dict()))
                try:
                    self.reader.count_mistake(refusal)
                except Closed:
                    return
                continue
            await asyncio.shield(asyncio.ensure_future(self.live.apply(control)))

    def _send(self, event: Event) -> None:
        if self.channel is not None and self.channel.readyState == "open":
            self.channel.send(self.codec.write(event))


@dataclass(frozen=True)
class Answered:
    """An answer to an offer: its SDP, and the session's id and resume token."""

    sdp: str
    session: str
    resume: str


class WebRtc:
    """The WebRTC peers of a server, by way and session."""

    def __init__(self, hub: LiveSessions) -> None:
        self.hub = hub
        self.tasks: dict[tuple[Way, str], asyncio.Task[None]] = {}

    async def watch(self, sdp: str, begin: Open | Attach) -> Answered:
        """Answer the offer of a viewer (WHEP). Refusal where there can be no answer."""
        return await self._answer("whep", sdp, begin)

    async def publish(self, sdp: str, begin: Open, strength: float) -> Answered:
        """Answer the offer of a client that sends video (WHIP), which a new session is made from."""
        return await self._answer("whip", sdp, begin, strength)

    async def _answer(self, way: Way, sdp: str, begin: Open | Attach, strength: float | None = None) -> Answered:
        if find_spec("aiortc") is None:
            raise Refusal("not_available", "this server has no WebRTC; install inferix-runtime[webrtc] there", 501)
        if len(sdp) > LONGEST_SDP:
            raise Refusal("too_long", f"the offer has {len(sdp)} characters; expected at most {LONGEST_SDP}", 413)
        from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

        connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        tracks: list[Any] = []
        connection.on("track", lambda track: tracks.append(track) if track.kind == "video" else None)
        live = None
        try:
            try:
                await connection.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            except Exception as error:  # the parser raises errors of every kind for what is no SDP
                raise Refusal("invalid", "the body is no SDP offer that can be answered") from error
            if not any(transceiver.kind == "video" for transceiver in connection.getTransceivers()):
                raise Refusal("invalid", "the offer asks for no video")
            if way == "whip" and not tracks:
                raise Refusal("invalid", "the offer sends no video; expected sendonly or sendrecv")
            if isinstance(begin, Attach):
                live = await self.hub.attach(begin)
            else:
                live = await self.hub.open(begin, lambda _: None, strength)
            taken = tracks[:1] if way == "whip" else []
            for transceiver in connection.getTransceivers():  # frames of a track that nobody reads would pile up
                if transceiver.receiver.track not in taken:
                    transceiver.direction = "sendonly" if transceiver.kind == "video" else "inactive"
            pictures = Pictures(self.hub.host.engine.fps)
            peer = Peer(self.hub, live, connection, pictures, tracks[0] if way == "whip" else None)
            connection.addTrack(make_track(pictures))
            await connection.setLocalDescription(await connection.createAnswer())
        except BaseException as error:
            if live is not None and isinstance(begin, Open):
                refusal = refusal_of(error) if isinstance(error, InferixError) else None
                live.end("failed", str(refusal or "the offer was not answered"))
            await connection.close()
            raise
        directions = [one.currentDirection for one in connection.getTransceivers() if one.kind == "video"]
        peer.shows = any(direction in ("sendonly", "sendrecv") for direction in directions)
        if peer.shows:
            live.attach(peer)
        task = asyncio.create_task(peer.run())
        self.tasks[way, live.id] = task
        task.add_done_callback(lambda done: self._forget((way, live.id), done))
        return Answered(connection.localDescription.sdp, live.id, live.resume)

    def _forget(self, key: tuple[Way, str], task: asyncio.Task[None]) -> None:
        if self.tasks.get(key) is task:
            del self.tasks[key]

    def end(self, way: Way, id: str) -> None:
        """End the session of an offer; Refusal where there is none."""
        live = self.hub.sessions.get(id)
        if live is None or (way, id) not in self.tasks:
            raise Refusal("not_found", f"there is no session {quoted(id, 64)} by {way.upper()}", 404)
        live.end("stopped", "its client ended it")

    async def close(self) -> None:
        for task in tuple(self.tasks.values()):
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def takes_video(engine: Engine) -> bool:
    """True if sessions of an engine can be made from live video here."""
    spec, preset = engine.spec, engine.preset
    plain = spec.condition_channels == 0 and spec.camera_channels is None
    encodes = engine.parts.vae.spec.encodes and preset.window_blocks == 1 and preset.sampler.takes_strength
    return plain and encodes and find_spec("aiortc") is not None


def make_track(pictures: Pictures) -> Any:
    """A video track that shows pictures."""
    from aiortc import MediaStreamTrack

    class Track(MediaStreamTrack):
        kind = "video"

        async def recv(self) -> Any:
            return await pictures.next()

    return Track()
