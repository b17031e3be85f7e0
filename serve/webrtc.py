"""WebRTC out, by WHEP: a video track of one session, and a data channel with the live protocol.

The offer opens a session or attaches one; the answer's Location ends it. aiortc is imported when the first offer comes
(the extra `webrtc`). Signalling has the server's token; ICE servers are none, so that no other host is asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import InferixError, quoted
from ..runtime.sinks import Frames
from .control_reader import Closed, ControlReader
from .live_session import LiveSession
from .live_sessions import LiveSessions
from .outbox import LiveBlock
from .protocol import Attach, Codec, Event, MediaFormat, Open, Refused
from .refusals import Refusal, refusal_of

if TYPE_CHECKING:
    from aiortc import RTCDataChannel, RTCPeerConnection

LOG = logging.getLogger("inferix.serve")
CLOCK = 90000  # ticks per second of RTP video
LONGEST_SDP = 65536  # characters
LATEST = 2.0  # seconds of pictures that wait for the track; older ones are dropped
CONNECTING = 30.0  # seconds that a peer may take to connect


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
    """A viewer by WebRTC."""

    def __init__(self, hub: LiveSessions, live: LiveSession, connection: RTCPeerConnection) -> None:
        self.hub, self.live, self.connection = hub, live, connection
        self.codec = Codec("inferix.json")
        self.reader = ControlReader(self.codec, hub.settings.messages_per_second)
        self.channel: RTCDataChannel | None = None
        self.pictures = Pictures(hub.host.engine.fps)
        self.messages: asyncio.Queue[str | bytes] = asyncio.Queue(maxsize=256)
        self.connected = asyncio.Event()
        self.over = asyncio.Event()
        connection.on("connectionstatechange", self._look)
        connection.on("datachannel", self._take_channel)

    def displace(self) -> None:
        """Have the peer end: another viewer has its session."""
        self.over.set()

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
        """Show the session until the peer or the session ends."""
        works = [
            asyncio.create_task(work)
            for work in (self._feed(), self._take_controls(), self.over.wait(), self._check_connected())
        ]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            self.live.detach(self)
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

    async def _feed(self) -> None:
        """Give the session's pictures to the track, and its events to the data channel."""
        while (item := await self.live.outbox.take()) is not None:
            if isinstance(item, LiveBlock):
                for receipt in item.applied(time.perf_counter(), self.hub.metrics):
                    self._send(receipt)
                self.pictures.add(item.frames)
                self._send(self.live.state_for_viewer(item.state))
            else:
                self._send(item)

    async def _take_controls(self) -> None:
        while True:
            message = await self.messages.get()
            try:
                control = self.reader.read(message)
                if isinstance(control, Open | Attach):
                    raise Refusal("wrong_order", "a session is open; make another offer")
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


class Whep:
    """The WebRTC viewers of a server, by their sessions' ids."""

    def __init__(self, hub: LiveSessions) -> None:
        self.hub = hub
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def offer(self, sdp: str, begin: Open | Attach) -> tuple[str, str]:
        """Answer an offer; returns the answer's SDP and the session's id. Refusal where there can be none."""
        if find_spec("aiortc") is None:
            raise Refusal("not_available", "this server has no WebRTC; install inferix-runtime[webrtc] there", 501)
        if len(sdp) > LONGEST_SDP:
            raise Refusal("too_long", f"the offer has {len(sdp)} characters; expected at most {LONGEST_SDP}", 413)
        from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

        connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        live = None
        try:
            try:
                await connection.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            except Exception as error:  # the parser raises errors of every kind for what is no SDP
                raise Refusal("invalid", "the body is no SDP offer that can be answered") from error
            if not any(transceiver.kind == "video" for transceiver in connection.getTransceivers()):
                raise Refusal("invalid", "the offer asks for no video")
            if isinstance(begin, Attach):
                live = await self.hub.attach(begin)
            else:
                live = await self.hub.open(begin, lambda _: None)
            peer = Peer(self.hub, live, connection)
            connection.addTrack(make_track(peer.pictures))
            await connection.setLocalDescription(await connection.createAnswer())
        except BaseException as error:
            if live is not None and isinstance(begin, Open):
                refusal = refusal_of(error) if isinstance(error, InferixError) else None
                live.end("failed", str(refusal or "the offer was not answered"))
            await connection.close()
            raise
        live.attach(peer)
        task = asyncio.create_task(peer.run())
        self.tasks[live.id] = task
        task.add_done_callback(lambda done: self._forget(live.id, done))
        return connection.localDescription.sdp, live.id

    def _forget(self, id: str, task: asyncio.Task[None]) -> None:
        if self.tasks.get(id) is task:
            del self.tasks[id]

    def end(self, id: str) -> None:
        """End the session of an offer; Refusal where there is none."""
        live = self.hub.sessions.get(id)
        if live is None or id not in self.tasks:
            raise Refusal("not_found", f"there is no session {quoted(id, 64)} by WebRTC", 404)
        live.end("stopped", "its client ended it")

    async def close(self) -> None:
        for task in tuple(self.tasks.values()):
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


def make_track(pictures: Pictures) -> Any:
    """A video track that shows pictures."""
    from aiortc import MediaStreamTrack

    class Track(MediaStreamTrack):
        kind = "video"

        async def recv(self) -> Any:
            return await pictures.next()

    return Track()
