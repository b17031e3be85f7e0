"""Videos and contact sheets on disk: a writer of H.264, VP9 and GIF, and a picture of thumbnails.

A file that exists is whole; what was written before an error is kept. PyAV and Pillow are imported where they are
used: running a model needs neither.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from ..errors import InferixError, UsageError, nearest, quoted
from .files import PartFile, check_output, write_atomically, write_failed
from .media_input import untagged_matrix
from .sinks import Frames

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".gif": "gif"}
FRAGMENTS = ("mp4", "mov")  # containers that are written in fragments first
CODECS = {  # (encoder, pixel format, options) of containers without H.264
    "webm": ("libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "5", "row-mt": "1"}),
    "gif": ("gif", "pal8", {}),
}
H264: tuple[str, str, dict[str, str]] = ("libx264", "yuv420p", {"crf": "18"})
FRAGMENTED = {"movflags": "delay_moov+default_base_moof", "frag_duration": "1000000"}  # of a second each
WAITING = 2  # groups of frames that may wait for the encoder
BT709, BT601, LIMITED = 1, 6, 1  # numbers of H.273; 1 is BT.709 for primaries and transfer, too
CELL_WIDTH = 240  # widest thumbnail of a contact sheet, in pixels
SHEET_GAP = 4  # pixels between thumbnails
LABEL_HEIGHT = 14  # room for one line of Pillow's built-in font, in pixels

class VideoWriter:
    """Video file, a `Sink`: H.264 in .mp4, .mov and .mkv, VP9 in .webm, GIF; a thread of its own encodes.

    path: ends in one of `CONTAINERS`; its folder is made. fps: frames per second, > 0. size: even (W, H).
    scale: how many times wider and higher than `size` the file's pictures are; each pixel becomes a square.
    A GIF has a palette of 256 colours per picture.
    Colours have the matrix of BT.709 from 1280 pixels across or 720 lines on, else that of BT.601, and are tagged.
    The constructor raises UsageError for what cannot be written. At the end, also by an error, the frames added so
    far become a playable `path` (none: no file). A write that fails raises InferixError with the path and the reason,
    and what fits on the disk is kept: `frames` is then how many that are.
    """

    when_full: Final = "wait"

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int], scale: int = 1) -> None:
        width, height = size
        if Path(path).suffix.lower() not in CONTAINERS:
            hint = nearest(Path(path).suffix.lower(), CONTAINERS)
            raise UsageError(f"video {quoted(path)} must end in one of {', '.join(CONTAINERS)}{hint}")
        if not fps > 0:
            raise UsageError(f"fps is {fps}; expected a number above 0")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise UsageError(f"video size is {width}x{height}; H.264 in yuv420p needs even width and height")
        self.path = check_output(path)
        self.fps = Fraction(fps).limit_denominator(1001)  # keeps 30000/1001 exact
        self.size, self.scale = size, scale
        self.frames = 0
        self._matrix = untagged_matrix(width * scale, height * scale)
        self._part: PartFile | None = None
        self._palette: Any = None
        self._container: Any = None
        self._stream: Any = None
        self._worker: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        try:
            self._part = PartFile(self.path)
            codec, pixels, settings = CODECS.get(self._format, H264)
            self._container = open_output(self._part.part, self._format, FRAGMENTED if self._in_fragments else {})
            self._stream = self._container.add_stream(codec, rate=self.fps)
        except OSError as error:
            self._discard()
            raise write_failed(self.path, error) from error
        self._stream.width, self._stream.height = (side * self.scale for side in self.size)
        self._stream.pix_fmt, self._stream.options = pixels, settings
        context = self._stream.codec_context
        if pixels == "yuv420p":
            context.colorspace = BT709 if self._matrix == BT709 else BT601
            context.color_primaries = context.color_trc = BT709  # those of sRGB and of its nearest curve
            context.color_range = LIMITED
        else:
            self._palette = palette_graph(self._stream.width, self._stream.height, self.fps)
        self._worker = ThreadPoolExecutor(1, "video encoder")
        return self

    @property
    def _format(self) -> str:
        return CONTAINERS[self.path.suffix.lower()]

    @property
    def _in_fragments(self) -> bool:
        return self._format in FRAGMENTS

    @property
    def full(self) -> bool:
        return sum(not waiting.done() for waiting in self._waiting) >= WAITING

    def add(self, frames: Frames) -> None:
        """Append uint8 RGB frames [T, H, W, 3]; they are copied. An earlier frame's error may be raised here."""
        width, height = self.size
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (height, width, 3):
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, {height}, {width}, 3]: "
                "convert them, or open the writer with their size"
            )
        assert self._worker is not None
        self._wait(WAITING - 1)
        self._waiting.append(self._worker.submit(self._encode, np.array(frames, order="C")))
        self.frames += len(frames)

    def _wait(self, most: int) -> None:
        """Wait until at most so many groups of frames are not encoded; InferixError if that failed."""
        try:
            while len(self._waiting) > most:
                self._waiting.popleft().result()
        except OSError as error:
            raise write_failed(self.path, error) from error

    def _encode(self, frames: Frames) -> None:
        import av

        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.repeat(self.scale, 0).repeat(self.scale, 1), format="rgb24")
            if self._palette is not None:
                self._palette.push(picture)
                picture = self._palette.pull()
                picture.pts = None  # the encoder counts
            else:
                picture = picture.reformat(
                    format="yuv420p", dst_colorspace=self._matrix, dst_color_range=LIMITED
                )
            self._container.mux(self._stream.encode(picture))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        added, failed = self.frames, None
        try:
            try:
                self._wait(0)
                self._finish()
            except InferixError as wrong:
                failed = wrong
                self._save_fragments()
        finally:
            self._discard()
        if failed is not None and kind is None:
            kept = f"the first {self.frames} of {added} frames are kept" if self.frames else "no frame is kept"
            raise InferixError(f"{failed}; {kept}") from failed

    def _finish(self) -> None:
        """Flush the encoder, write the index, and give the file its name; InferixError if it is not all there."""
        if not self.frames:
            return
        assert self._part is not None
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            written = count_packets(self._part.part)  # FFmpeg does not report every write that fails
            if written < self.frames:
                raise InferixError(f"writing {quoted(self.path)} failed: not all of it is there; free some space")
            if not self._in_fragments or not self._index_in_front():
                self._part.keep()
        except OSError as error:
            raise write_failed(self.path, error) from error

    def _index_in_front(self) -> bool:
        """Copy the fragments into a file that starts at once everywhere; False if there is no room for it."""
        assert self._part is not None
        whole = None
        try:
            whole = PartFile(self.path)
            copy_packets(self._part.part, whole.part, self._format)
            if count_packets(whole.part) == self.frames:
                whole.keep()
                return True
        except OSError:
            pass  # the fragments are whole, and are kept
        finally:
            if whole is not None:
                whole.discard()
        warnings.warn(f"no room for the index of {quoted(self.path)} in front; it is in fragments", stacklevel=2)
        return False

    def _save_fragments(self) -> None:
        """After a failed write: keep the whole seconds that are on the disk."""
        assert self._part is not None
        self._close()
        if self._in_fragments:
            os.truncate(self._part.part, fragments_end(self._part.part))
        self.frames = count_packets(self._part.part)
        if self.frames:
            self._part.keep()

    def _close(self) -> None:
        """Stop the encoder's thread and close the container."""
        for waiting in self._waiting:
            waiting.cancel()
        if self._worker is not None:
            self._worker.shutdown()
        if self._container is not None:
            with suppress(OSError):  # closing writes the index, which fails again on a full disk
                self._container.close()

    def _discard(self) -> None:
        """Close what is open and remove the unfinished file; after it has its name there is nothing left to do."""
        self._close()
        if self._part is not None:
            self._part.discard()


def open_output(path: Path, form: str, options: dict[str, str]) -> Any:
    """A container to write to; `file:` since FFmpeg takes names with a colon for addresses."""
    import av

    return av.open(f"file:{path.absolute()}", "w", format=form, container_options=options)


def palette_graph(width: int, height: int, fps: Fraction) -> Any:
    """A filter from RGB pictures to pictures of 256 colours, each with a palette of its own."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / fps)
    split, made = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    used, sink = graph.add("paletteuse", "new=1:dither=sierra2_4a"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(used, 0, 0)
    split.link_to(made, 1, 0)
    made.link_to(used, 0, 1)
    used.link_to(sink)
    graph.configure()
    return graph


def copy_packets(source: Path, target: Path, form: str) -> None:
    """Write the encoded pictures of a video into another file, its index in front."""
    import av

    front = {"movflags": "faststart"}
    with source.open("rb") as file, av.open(file, "r") as read, open_output(target, form, front) as out:
        stream = out.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.size:  # the last one only says that this is the end
                packet.stream = stream
                out.mux(packet)


def count_packets(path: Path) -> int:
    """Number of pictures in a video file; 0 if it is none."""
    import av

    try:
        with path.open("rb") as file, av.open(file, "r") as container:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    except av.error.FFmpegError:
        return 0


def fragments_end(path: Path) -> int:
    """Bytes up to the end of the last whole fragment of an MP4 file: of the boxes of a `moof` and its `mdat`."""
    end = place = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        while place + 8 <= size:
            file.seek(place)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length < 8:
                break
            place += length
            if kind == b"mdat" and place <= size:
                end = place
    return end


def sheet_columns(count: int) -> int:
    """Columns of a contact sheet: of 4 to 8, those that leave the fewest cells empty, rather more than fewer."""
    return min(count, min(range(8, 3, -1), key=lambda columns: -count % columns))


def contact_sheet(
    frames_list: Sequence[Frames],
    path: str | Path,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a PNG of thumbnails on white, each under its label; pixels of small frames become squares.

    frames_list: uint8 frames [H, W, 3] of one size, at least one. columns: None for as many as fill the sheet.
    labels: one each; indices if None. Raises UsageError for bad lists or an unwritable place, InferixError if writing
    fails.
    """
    from PIL import Image, ImageDraw

    names = [str(index) for index in range(len(frames_list))] if labels is None else list(labels)
    if not frames_list or len(names) != len(frames_list):
        raise UsageError(f"contact sheet got {len(frames_list)} frames and {len(names)} labels; expected as many")
    if columns is not None and columns < 1:
        raise UsageError(f"columns is {columns}; expected 1 or more")
    height, width = frames_list[0].shape[:2]
    scale = CELL_WIDTH / width if width > CELL_WIDTH else max(1, CELL_WIDTH // width)
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    across = min(columns or sheet_columns(len(frames_list)), len(frames_list))
    down = -(-len(frames_list) // across)
    step = cell[0] + SHEET_GAP, cell[1] + LABEL_HEIGHT + SHEET_GAP
    sheet = Image.new("RGB", (across * step[0] - SHEET_GAP, down * step[1] - SHEET_GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (frame, name) in enumerate(zip(frames_list, names, strict=True)):
        left, top = index % across * step[0], index // across * step[1]
        draw.text((left + 2, top), name, fill="black")
        sheet.paste(Image.fromarray(frame).resize(cell, resample), (left, top + LABEL_HEIGHT))
    return write_atomically(check_output(path), lambda part: sheet.save(part, format="PNG"))
