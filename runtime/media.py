"""Pictures and videos on disk: an H.264 writer, a contact sheet, and readers.

Every output is written to `<path>.part` and moved to its place when it is complete, so a file that exists is
playable. PyAV and Pillow are imported where they are used: running a model needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, nearest
from .files import check_output, part_of, write_atomically, write_failed

if TYPE_CHECKING:
    from PIL.Image import Image

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
CELL_WIDTH = 240  # widest thumbnail of a contact sheet, in pixels
LABEL_HEIGHT = 14  # room for one line of Pillow's built-in font, in pixels

Frames = NDArray[np.uint8]


class VideoWriter:
    """H.264 (yuv420p) video file, as a context manager.

    path: ends in .mp4, .mov or .mkv; its folder is made. fps: frames per second, > 0. size: even (W, H).
    scale: how many times wider and higher than `size` the file's pictures are.
    The constructor raises UsageError for what cannot be written. On a clean exit, and on KeyboardInterrupt,
    the frames added so far become a playable `path` (none: no file); any other error leaves no file.
    A write that fails raises InferixError with the path and the reason.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int], scale: int = 1) -> None:
        width, height = size
        if Path(path).suffix.lower() not in CONTAINERS:
            hint = nearest(Path(path).suffix.lower(), CONTAINERS)
            raise UsageError(f"video {str(path)!r} must end in one of {', '.join(CONTAINERS)}{hint}")
        if not fps > 0:
            raise UsageError(f"fps is {fps}; expected a number above 0")
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise UsageError(f"video size is {width}x{height}; H.264 in yuv420p needs even width and height")
        self.path = check_output(path)
        self.fps = Fraction(fps).limit_denominator(1001)  # keeps 30000/1001 exact
        self.size, self.scale = size, scale
        self.frames = 0
        self._part = part_of(self.path)
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        import av

        try:
            self._container = av.open(str(self._part), "w", format=CONTAINERS[self.path.suffix.lower()])
            self._stream = self._container.add_stream("libx264", rate=self.fps)
        except OSError as error:
            self._discard()
            raise write_failed(self.path, error) from error
        self._stream.width, self._stream.height = (side * self.scale for side in self.size)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "18"}
        return self

    def add(self, frames: Frames) -> None:
        """Append uint8 RGB frames [T, H, W, 3]."""
        import av

        width, height = self.size
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (height, width, 3):
            raise ValueError(
                f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, {height}, {width}, 3]: "
                "convert them, or open the writer with their size"
            )
        try:
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                if self.scale > 1:
                    picture = picture.reformat(width * self.scale, height * self.scale)
                self._container.mux(self._stream.encode(picture))
                self.frames += 1
        except OSError as error:
            raise write_failed(self.path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.frames and (kind is None or issubclass(kind, KeyboardInterrupt)):
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        """Flush the encoder, write the index, and move the file to its place."""
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._part, self.path)
        except OSError as error:
            raise write_failed(self.path, error) from error

    def _discard(self) -> None:
        """Close what is open and remove the unfinished file; after `_finish` there is nothing left to do."""
        if self._container is not None:
            with suppress(OSError):  # closing writes the index, which fails again on a full disk
                self._container.close()
        self._part.unlink(missing_ok=True)


def contact_sheet(
    frames_list: Sequence[Frames], path: str | Path, columns: int = 6, labels: Sequence[str] | None = None
) -> Path:
    """Write a PNG of thumbnails, `columns` in a row, each under its label; small frames are enlarged.

    frames_list: uint8 frames [H, W, 3] of one size, at least one. labels: one each; indices if None.
    Raises UsageError for bad lists or an unwritable place, InferixError if writing fails.
    """
    from PIL import Image, ImageDraw

    names = [str(index) for index in range(len(frames_list))] if labels is None else list(labels)
    if not frames_list or len(names) != len(frames_list):
        raise UsageError(
            f"contact sheet got {len(frames_list)} frames and {len(names)} labels; expected as many"
        )
    if columns < 1:
        raise UsageError(f"columns is {columns}; expected 1 or more")
    height, width = frames_list[0].shape[:2]
    scale = CELL_WIDTH / width if width > CELL_WIDTH else max(1, CELL_WIDTH // width)
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    across = min(columns, len(frames_list))
    down = -(-len(frames_list) // across)
    sheet = Image.new("RGB", (across * cell[0], down * (cell[1] + LABEL_HEIGHT)))
    draw = ImageDraw.Draw(sheet)
    for index, (frame, name) in enumerate(zip(frames_list, names, strict=True)):
        left, top = index % across * cell[0], index // across * (cell[1] + LABEL_HEIGHT)
        draw.text((left + 2, top), name, fill="white")
        sheet.paste(Image.fromarray(frame).resize(cell), (left, top + LABEL_HEIGHT))
    return write_atomically(check_output(path), lambda part: sheet.save(part, format="PNG"))


def read_image(path: str | Path, size: tuple[int, int]) -> Frames:
    """The picture at `path`, stretched to size (W, H), as uint8 RGB [H, W, 3]; UsageError if unreadable."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright: Image.Image = ImageOps.exif_transpose(image)
            return stretched(upright, size)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's errors for broken files
        raise UsageError(f"cannot read image {str(path)!r}: {error}; expected a PNG or JPEG file") from error


def stretched(image: Image, size: tuple[int, int]) -> Frames:
    return np.array(image.convert("RGB").resize(size), dtype=np.uint8)


def read_video(path: str | Path, size: tuple[int, int]) -> Frames:
    """All frames of the video at `path`, at its own rate, stretched to (W, H), as uint8 RGB [T, H, W, 3].

    Raises UsageError if the file cannot be read or holds no picture.
    """
    import av

    width, height = size
    try:
        with av.open(str(path)) as container:
            frames = [
                frame.to_ndarray(format="rgb24", width=width, height=height)
                for stream in container.streams.video[:1]
                for frame in container.decode(stream)
            ]
    except (OSError, av.error.FFmpegError) as error:
        raise UsageError(f"cannot read video {str(path)!r}: {error}; expected an mp4 or mkv") from error
    if not frames:
        raise UsageError(f"video {str(path)!r} holds no frame; expected a file with a video stream")
    return np.stack(frames)
