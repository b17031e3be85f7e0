"""Recordings of live sessions: an MP4 file, an HLS stream that is there while it grows, or a push to an RTMP server.

A recording feeds any `Sink` by `Pump`, in a thread of its own. It gets the blocks that are made, whatever the viewer
sees of them; those that the sink is too slow for are left out and counted.
"""

from __future__ import annotations

import asyncio
import queue
import re
import secrets
import shutil
import threading
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from ..errors import InferixError, message_of, quoted
from ..runtime.media import VideoWriter
from ..runtime.sinks import DecodedBlock, Frames, Pump, Sink
from .encoders import BT709, LIMITED, video_frame
from .refusals import Refusal

WAITING = 8  # blocks that may wait for a sink
SEGMENT_SECONDS = 1  # of an HLS stream
PUSH_SECONDS = 10.0  # that an RTMP server may take no data
FILES = {  # names of a recording's files, and their media types
    r"video\.mp4": "video/mp4", r"index\.m3u8": "application/vnd.apple.mpegurl", r"init\.mp4": "video/mp4",
    r"index[0-9]{1,9}\.m4s": "video/iso.segment", r"picture\.png": "image/png",
}  # fmt: skip


class H264Writer:
    """H.264 in a container of PyAV, a `Sink`. target: file or address. size: even (W, H)."""

    when_full: Final = "wait"
    full: Final = False

    def __init__(
        self, target: str, container: str, options: dict[str, str], fps: float, size: tuple[int, int]
    ) -> None:
        self.target, self.container, self.options = target, container, options
        self.fps, self.size = Fraction(fps).limit_denominator(1001), size
        self.count = 0

    def __enter__(self) -> Self:
        import av

        self._container: Any = av.open(self.target, "w", format=self.container, options=self.options)
        self._stream: Any = self._container.add_stream("libx264", rate=self.fps)
        self._stream.width, self._stream.height = self.size
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.gop_size = max(1, round(self.fps * SEGMENT_SECONDS))
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        self._stream.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
        return self

    def add(self, frames: Frames) -> None:
        for frame in frames:
            self._container.mux(self._stream.encode(video_frame(frame, self.count)))
            self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


def hls_writer(folder: Path, fps: float, size: tuple[int, int]) -> H264Writer:
    """HLS in a folder: a playlist and fragments of about a second each."""
    options = {"hls_time": str(SEGMENT_SECONDS), "hls_list_size": "0", "hls_segment_type": "fmp4"}
    options |= {"hls_playlist_type": "event", "hls_flags": "independent_segments"}
    options["hls_fmp4_init_filename"] = "init.mp4"
    return H264Writer(str(folder / "index.m3u8"), "hls", options, fps, size)


def rtmp_writer(address: str, fps: float, size: tuple[int, int]) -> H264Writer:
    """A push to a server; one that takes nothing for `PUSH_SECONDS` ends it."""
    options = {"rw_timeout": str(int(PUSH_SECONDS * 1e6)), "flvflags": "no_duration_filesize"}
    return H264Writer(address, "flv", options, fps, size)


class Recording:
    """One recording. url: where it is. folder: of its files, None for a push. frames_left: pictures still to take."""

    def __init__(self, id: str, url: str, folder: Path | None, sink: Sink, frames_left: int) -> None:
        self.id, self.url, self.folder, self.sink, self.frames_left = id, url, folder, sink, frames_left
        self.dropped = 0
        self._blocks: queue.Queue[DecodedBlock | None] = queue.Queue(WAITING)
        self._task = asyncio.create_task(asyncio.to_thread(self._run))

    def add(self, block: DecodedBlock) -> None:
        """Add a block without waiting."""
        count = 0 if block.frames is None else len(block.frames)
        if self._task.done() or count > self.frames_left or self._blocks.full():
            self.dropped += 1
            return
        self.frames_left -= count
        self._blocks.put_nowait(block)

    def _run(self) -> None:
        import av

        try:
            with Pump(iter(self._blocks.get, None), self.sink) as blocks:
                for _ in blocks:
                    pass
        except (OSError, av.error.FFmpegError) as error:
            raise InferixError(f"the recording failed: {error}") from error

    async def finish(self) -> int:
        """Finish the file and return its bytes; raises what went wrong with it."""
        if not self._task.done():
            await asyncio.to_thread(self._blocks.put, None)
        await self._task
        return 0 if self.folder is None else sum(file.stat().st_size for file in self.folder.iterdir())


class Recordings:
    """The recordings of a server, each in a folder of its own; the oldest finished ones are removed first.

    push_to: beginning of the addresses of RTMP servers that may be pushed to; None for none.
    """

    def __init__(
        self, folder: Path, running: int, kept: int, seconds: float, push_to: str | None = None
    ) -> None:
        self.folder, self.running, self.kept, self.seconds = folder, running, kept, seconds
        self.push_to = push_to
        self.open: dict[str, Recording] = {}
        self.making: set[str] = set()  # folders of pictures that are being written
        self.changing = threading.RLock()  # held while folders are made and removed, not while one is filled
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, form: Literal["mp4", "hls"], fps: float, size: tuple[int, int]) -> Recording:
        """Begin a recording; Refusal where there are too many, or pictures that no video can have."""
        self._check(size)
        id = secrets.token_hex(16)
        place = self.folder / id
        name = "video.mp4" if form == "mp4" else "index.m3u8"
        with self.changing:
            self.trim()
            place.mkdir()
            sink: Sink = VideoWriter(place / name, fps, size) if form == "mp4" else hls_writer(place, fps, size)
            return self._add(Recording(id, f"/v1/recordings/{id}/{name}", place, sink, round(self.seconds * fps)))

    def snapshot(self, picture: Frames) -> tuple[str, int]:
        """Write a picture [H, W, 3] to a folder of its own; returns its url and its bytes."""
        from PIL import Image

        id = secrets.token_hex(16)
        path = self.folder / id / "picture.png"
        with self.changing:
            self.trim()
            path.parent.mkdir()
            self.making.add(id)
        try:
            Image.fromarray(picture).save(path)
            return f"/v1/recordings/{id}/{path.name}", path.stat().st_size
        except OSError as error:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise InferixError(f"the picture could not be written: {message_of(error)}; free some space") from error
        finally:
            self.making.discard(id)

    def push(self, address: str, fps: float, size: tuple[int, int]) -> Recording:
        """Begin to send pictures to an RTMP server; Refusal for an address that is not allowed."""
        self._check(size)
        if self.push_to is None or not address.startswith(self.push_to):
            raise Refusal(
                "not_allowed", f"to is {quoted(address)}; expected one that begins with the setting push_to", 403,
                ("push_to", self.push_to),
            )  # fmt: skip
        writer = rtmp_writer(address, fps, size)
        return self._add(Recording(secrets.token_hex(16), address, None, writer, round(self.seconds * fps)))

    def _check(self, size: tuple[int, int]) -> None:
        """Refusal where too many recordings run, or for pictures that no video can have."""
        if len(self.open) >= self.running:
            limit = ("recordings", self.running)
            raise Refusal("at_capacity", f"{len(self.open)} recordings are running", 503, limit, retry_after=5)
        if size[0] % 2 or size[1] % 2:
            raise Refusal("invalid", f"pictures of {size[0]}x{size[1]} cannot be video: its sides are even")

    def _add(self, recording: Recording) -> Recording:
        self.open[recording.id] = recording
        return recording

    async def finish(self, recording: Recording) -> int:
        """End a recording; returns its bytes."""
        try:
            return await recording.finish()
        finally:
            self.open.pop(recording.id, None)

    def file(self, id: str, name: str) -> tuple[Path, str]:
        """Path and media type of a file of a recording; Refusal where there is none."""
        kind = next((kind for pattern, kind in FILES.items() if re.fullmatch(pattern, name)), None)
        path = self.folder / id / name
        if kind is None or re.fullmatch(r"[0-9a-f]{32}", id) is None or not path.is_file():
            raise Refusal("not_found", f"there is no file {quoted(name, 64)} of a recording {quoted(id, 64)}", 404)
        return path, kind

    def trim(self) -> None:
        """Remove the oldest finished recordings beyond `kept`."""
        with self.changing:
            running = self.making.union(self.open)
            finished = [place for place in self.folder.iterdir() if place.is_dir() and place.name not in running]
            finished.sort(key=lambda place: place.stat().st_mtime)
            for place in finished[: max(0, len(finished) + 1 - self.kept)]:
                shutil.rmtree(place, ignore_errors=True)
