"""Recordings of live sessions: an MP4 file, or an HLS stream that is there while it grows.

A recording feeds any `Sink` by `Pump`, in a thread of its own. It gets the blocks that are made, whatever the viewer
sees of them; those that the sink is too slow for are left out and counted.
"""

from __future__ import annotations

import asyncio
import queue
import re
import secrets
import shutil
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from ..errors import InferixError, quoted
from ..runtime.media import VideoWriter
from ..runtime.sinks import DecodedBlock, Frames, Pump, Sink
from .encoders import BT709, LIMITED, video_frame
from .refusals import Refusal

WAITING = 8  # blocks that may wait for a sink
SEGMENT_SECONDS = 1  # of an HLS stream
FILES = {  # names of a recording's files, and their media types
    r"video\.mp4": "video/mp4", r"index\.m3u8": "application/vnd.apple.mpegurl", r"init\.mp4": "video/mp4",
    r"index[0-9]{1,9}\.m4s": "video/iso.segment",
}  # fmt: skip


class HlsWriter:
    """H.264 as HLS in a folder, a `Sink`: a playlist and fragments of about a second each. size: even (W, H)."""

    when_full: Final = "wait"
    full: Final = False

    def __init__(self, folder: Path, fps: float, size: tuple[int, int]) -> None:
        self.folder, self.fps, self.size = folder, Fraction(fps).limit_denominator(1001), size
        self.count = 0

    def __enter__(self) -> Self:
        import av

        options = {"hls_time": str(SEGMENT_SECONDS), "hls_list_size": "0", "hls_segment_type": "fmp4"}
        options |= {"hls_playlist_type": "event", "hls_flags": "independent_segments"}
        options["hls_fmp4_init_filename"] = "init.mp4"
        self._container: Any = av.open(str(self.folder / "index.m3u8"), "w", format="hls", options=options)
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


class Recording:
    """One recording. id and name: of its main file. frames_left: pictures that it may still take."""

    def __init__(self, id: str, path: Path, sink: Sink, frames_left: int) -> None:
        self.id, self.path, self.sink, self.frames_left = id, path, sink, frames_left
        self.dropped = 0
        self._blocks: queue.Queue[DecodedBlock | None] = queue.Queue(WAITING)
        self._task = asyncio.create_task(asyncio.to_thread(self._run))

    @property
    def url(self) -> str:
        return f"/v1/recordings/{self.id}/{self.path.name}"

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
        return sum(file.stat().st_size for file in self.path.parent.iterdir())


class Recordings:
    """The recordings of a server, each in a folder of its own; the oldest finished ones are removed first."""

    def __init__(self, folder: Path, running: int, kept: int, seconds: float) -> None:
        self.folder, self.running, self.kept, self.seconds = folder, running, kept, seconds
        self.open: dict[str, Recording] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, form: Literal["mp4", "hls"], fps: float, size: tuple[int, int]) -> Recording:
        """Begin a recording; Refusal where there are too many, or pictures that no video can have."""
        if len(self.open) >= self.running:
            limit = ("recordings", self.running)
            raise Refusal("at_capacity", f"{len(self.open)} recordings are running", 503, limit, retry_after=5)
        if size[0] % 2 or size[1] % 2:
            raise Refusal("invalid", f"pictures of {size[0]}x{size[1]} cannot be video: its sides are even")
        self.trim()
        id = secrets.token_hex(16)
        place = self.folder / id
        place.mkdir()
        path = place / ("video.mp4" if form == "mp4" else "index.m3u8")
        sink: Sink = VideoWriter(path, fps, size) if form == "mp4" else HlsWriter(place, fps, size)
        recording = self.open[id] = Recording(id, path, sink, round(self.seconds * fps))
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
        finished = [place for place in self.folder.iterdir() if place.is_dir() and place.name not in self.open]
        finished.sort(key=lambda place: place.stat().st_mtime)
        for place in finished[: max(0, len(finished) + 1 - self.kept)]:
            shutil.rmtree(place, ignore_errors=True)
