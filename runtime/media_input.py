"""Pictures and videos of a user's, as uint8 RGB frames of the size that a stream has.

Only the formats listed here and only regular local files are opened, and the size of a picture is known before it is
decoded. Orientation tags and display matrices are applied, transparent pixels lie over white, and a video is sampled
by the times of its frames. Pillow and PyAV are imported where they are used.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, cut, nearest, quoted
from ..user_files import check_regular

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("crop", "pad", "stretch")
BACKDROP = (255, 255, 255)  # under transparent pixels
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")  # Pillow's names
VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,ogg,gif"  # FFmpeg's names
LARGEST_PICTURE = 1 << 26  # pixels of a picture or of a frame
LARGEST_IMAGE_FILE = 1 << 29  # bytes
LARGEST_CLIP = 1 << 30  # bytes of frames kept of a video
MOST_FRAMES = 1 << 16  # an hour at 16 a second; a picture that a damaged file shows for days is repeated
HIGH_DEFINITION = (1280, 720)  # from this width or height on, videos without a tag have the matrix of BT.709
HDR_CURVES = {16: "PQ", 18: "HLG"}  # numbers of H.273
BROKEN_IMAGE = (  # what Pillow raises for damaged files
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError,
    OverflowError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip

Frames = NDArray[np.uint8]


def read_image(path: str | Path, size: tuple[int, int], fit: str = "crop") -> Frames:
    """The picture at `path`, upright, fitted to `size` (width, height), as uint8 RGB [H, W, 3].

    Of 16 bits the upper 8 are taken; floating-point values go from 0, black, to 1, white. An embedded colour profile
    is converted to sRGB. Of several pictures in a file the first is read. For `fit` see `fitted`.
    Raises UsageError if it cannot be read, or is larger than 2^26 pixels.
    """
    from PIL import Image

    check_fit(fit)
    path = check_regular(path, "image")
    if (length := path.stat().st_size) > LARGEST_IMAGE_FILE:
        raise UsageError(f"image {quoted(path)} has {length} bytes; expected at most {LARGEST_IMAGE_FILE}")
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        with path.open("rb") as file, Image.open(file, formats=formats) as image:
            check_pixels("image", path, *image.size)
            return upright_pixels(image, size, fit)
    except UsageError:
        raise
    except (*BROKEN_IMAGE, Image.DecompressionBombError) as error:
        known = ", ".join(IMAGE_FORMATS)
        raise UsageError(f"cannot read image {quoted(path)}: {cut(str(error))}; expected {known}") from error


def upright_pixels(image: Image, size: tuple[int, int], fit: str) -> Frames:
    """An open picture as frames are: turned as its tag says, fitted, over the backdrop, in sRGB."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    image.load()  # Pillow turns TIFF files itself, here
    orientation = image.getexif().get(0x0112, 1)
    target = size if orientation not in (5, 6, 7, 8) else (size[1], size[0])
    profile = image.info.get("icc_profile")
    small = fitted(with_eight_bits(image), target, fit)
    small = to_srgb(over_backdrop(small), profile)
    if orientation in turns:
        small = small.transpose(turns[orientation])
    return np.array(small, dtype=np.uint8)


def with_eight_bits(image: Image) -> Image:
    """A picture in L, RGB, RGBA or CMYK, which resizing can average; UsageError for values without a scale."""
    from PIL import Image as images

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        top = 1 if image.mode == "F" else 65535
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= top):  # not for NaN either
            raise UsageError(f"the image has values from {low} to {high}; expected 0 to {top}, which is white")
        eight = np.round(values * 255) if image.mode == "F" else values >> 8
        grey = images.fromarray(eight.astype(np.uint8))
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey.putalpha(images.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return grey if clear is None else grey.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def over_backdrop(image: Image) -> Image:
    """The picture without transparency."""
    from PIL import Image as images

    if image.mode != "RGBA":
        return image
    backdrop = images.new("RGBA", image.size, (*BACKDROP, 255))
    return images.alpha_composite(backdrop, image).convert("RGB")


def to_srgb(image: Image, profile: bytes | None) -> Image:
    """The picture in RGB, converted from its colour profile where it has one that fits; a bad one is warned of."""
    from PIL import ImageCms

    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None  # it is, unless done in place
                return converted
        except (ImageCms.PyCMSError, OSError) as error:
            warnings.warn(f"the image's colour profile is not applied: {cut(str(error))}", stacklevel=2)
    return image.convert("RGB")


def check_fit(fit: str) -> None:
    if fit not in FITS:
        raise UsageError(f"fit is {quoted(fit)}{nearest(str(fit), FITS)}; expected one of {', '.join(FITS)}")


def check_pixels(kind: str, path: Path, width: int, height: int) -> None:
    if not 0 < width * height <= LARGEST_PICTURE:
        raise UsageError(
            f"{kind} {quoted(path)} is {width}x{height}, {width * height} pixels; "
            f"expected 1 to {LARGEST_PICTURE}: make it smaller"
        )


def fitted(image: Image, size: tuple[int, int], fit: str, aspect: float = 1.0) -> Image:
    """A picture resized to `size` (width, height).

    fit: crop fills it and cuts off what is beyond, the middle kept; pad shows all of the picture between black bars;
    stretch changes its proportions. aspect: width of a pixel by its height.
    """
    from PIL import Image as images

    width, height = image.size
    across, down = size[0] / (width * aspect), size[1] / height
    if fit == "stretch" or across == down:
        return image.resize(size)
    if fit == "crop":
        scale = max(across, down)
        wide, high = min(width, size[0] / scale / aspect), min(height, size[1] / scale)
        left, top = (width - wide) / 2, (height - high) / 2
        return image.resize(size, box=(left, top, left + wide, top + high))
    scale = min(across, down)
    inner = (max(1, round(width * aspect * scale)), max(1, round(height * scale)))
    small = image.resize(inner)
    black: Any = {"CMYK": (0, 0, 0, 255), "RGBA": (0, 0, 0, 255), "RGB": (0, 0, 0), "L": 0}[image.mode]
    whole = images.new(image.mode, size, black)
    whole.paste(small, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return whole


def read_video(
    path: str | Path, size: tuple[int, int], fps: float | None = None, fit: str = "crop", first: int | None = None
) -> Frames:
    """Frames of the video at `path`, as uint8 RGB [T, H, W, 3]; see `video_frames`.

    first: how many are read, all if None. Raises UsageError if they are more than 2^16, or 2^30 bytes.
    """
    width, height = size
    most = min(LARGEST_CLIP // (width * height * 3), MOST_FRAMES)
    frames = bytearray()  # grows in place, unlike a list that is stacked
    if first is None or first > most:
        check_duration(path, size, fps, most)
    for count, frame in enumerate(islice(video_frames(path, size, fps, fit), first)):
        if count == most:
            raise too_long(path, f"more than {most} frames", size, most)
        frames += frame.tobytes()
    return np.frombuffer(frames, np.uint8).reshape(-1, height, width, 3)


def check_duration(path: str | Path, size: tuple[int, int], fps: float | None, most: int) -> None:
    """UsageError for a video that says of itself that it is too long; others are found out while they are read."""
    with opened_video(path) as (container, stream):
        seconds = container.duration / 1e6 if container.duration else 0.0
        rate = fps or float(stream.average_rate or 0)
        if math.floor(seconds * rate) > most + 1:
            raise too_long(path, f"{seconds:.1f} s, {math.floor(seconds * rate)} frames at {rate:g} FPS", size, most)


def too_long(path: str | Path, length: str, size: tuple[int, int], most: int) -> UsageError:
    return UsageError(
        f"video {quoted(path)} has {length}; expected at most {most} of {size[0]}x{size[1]}: cut it"
    )


def video_frames(
    path: str | Path, size: tuple[int, int], fps: float | None = None, fit: str = "crop"
) -> Iterator[Frames]:
    """Frames uint8 RGB [H, W, 3] of the first video stream of a file, one at a time, fitted to `size`.

    With `fps`, frame k is the picture shown at k / fps seconds, to within half the time of one of the file's frames;
    so a video of 30 frames a second loses some, and a slow one repeats some. Without, each picture is a frame.
    Display matrix, shape of pixels, colour matrix, range and transparency are applied; HDR is warned of.
    Raises UsageError if the file cannot be read, holds no picture, or is larger than 2^26 pixels.
    """
    check_fit(fit)
    with opened_video(path) as (container, stream):
        pictures = timed(container, stream)
        first = next(pictures, None)
        if first is None:
            raise UsageError(f"video {quoted(path)} holds no frame; expected a file with a video stream")
        if first[1].color_trc in HDR_CURVES:
            warnings.warn(f"video {quoted(path)} is HDR; its colours are taken without tone mapping", stacklevel=2)
        last, pixels = None, np.empty((0, 0, 3), np.uint8)
        for picture in sampled(first, pictures, stream, fps):
            if picture is not last:  # one that is repeated is converted once
                check_pixels("video", Path(path), picture.width, picture.height)
                last, pixels = picture, picture_pixels(picture, size, fit, stream)
            yield pixels.copy()


def video_facts(path: str | Path) -> tuple[tuple[int, int], float]:
    """Size (width, height) of a video as it is shown, and its mean frame rate; UsageError if it cannot be read.

    The display matrix and the shape of pixels are applied, as `video_frames` does.
    """
    with opened_video(path) as (container, stream):
        picture = next(container.decode(stream), None)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if picture is None:
            raise UsageError(f"video {quoted(path)} holds no frame; expected a file with a video stream")
        if not rate > 0:
            raise UsageError(f"video {quoted(path)} has no frame rate; write it again with one")
        size = max(1, round(picture.width * float(stream.sample_aspect_ratio or 1))), picture.height
        turn = display_turn(picture)
        return (size if turn is None or not turn_swaps(turn) else (size[1], size[0])), rate


def video_seconds(path: str | Path) -> float:
    """Length of a video in seconds, by its header or else by its packets; UsageError if it cannot be read."""
    with opened_video(path) as (container, stream):
        if container.duration:
            return float(container.duration) / 1e6
        return float(sum(packet.size > 0 for packet in container.demux(stream)) * frame_time(stream))


class opened_video:
    """A container and its first video stream, as a context manager; errors of FFmpeg's become UsageError."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any]:
        import av

        self.file = check_regular(self.path, "video").open("rb")
        try:
            # A file object, not a name: FFmpeg takes names with a colon for addresses.
            self.container = av.open(
                self.file, metadata_errors="replace", container_options={"format_whitelist": VIDEO_FORMATS}
            )
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
            if not streams:
                raise UsageError(f"video {quoted(self.path)} holds no frame; expected a file with a video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise UsageError(f"video {quoted(self.path)} is in an unknown codec; expected one of FFmpeg's")
            check_pixels("video", Path(self.path), stream.width, stream.height)
            stream.codec_context.options = {"max_pixels": str(LARGEST_PICTURE)}
            stream.thread_type = "AUTO"
        except BaseException as error:  # raised again, or as a UsageError; the file is closed in any case
            self.file.close()
            self._refuse(error)
            raise
        return self.container, stream

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.container.close()
        self.file.close()
        self._refuse(error)

    def _refuse(self, error: BaseException | None) -> None:
        import av

        if isinstance(error, OSError | av.error.FFmpegError):
            reason = cut(str(error.strerror or error))
            raise UsageError(
                f"cannot read video {quoted(self.path)}: {reason}; "
                "expected mp4, mov, mkv, webm, avi, ts, ogg or gif"
            ) from error


def timed(container: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
    """Pictures and the seconds at which they are shown, which never go back."""
    before, step = Fraction(0), frame_time(stream)
    start = None
    for picture in decoded(container, stream):
        if picture.pts is None or picture.time_base is None:
            time = Fraction(0) if start is None else before + step
        else:
            time = picture.pts * picture.time_base
            start = time if start is None else start
            time -= start
        start = Fraction(0) if start is None else start
        before = max(before, time)
        yield before, picture


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Pictures of a stream; OSError for a file in which another stream begins, whose packets PyAV does not take."""
    try:
        yield from container.decode(stream)
    except IndexError as error:
        raise OSError("a stream begins within the file") from error


def frame_time(stream: Any) -> Fraction:
    """Seconds that a picture of a stream is shown, on average; 0 where the file does not tell."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(0)


def sampled(
    first: tuple[Fraction, Any], rest: Iterator[tuple[Fraction, Any]], stream: Any, fps: float | None
) -> Iterator[Any]:
    """Pictures at k / fps seconds, of pictures with their times."""
    if fps is None:
        yield first[1]
        yield from (picture for _, picture in rest)
        return
    step = frame_time(stream)
    rate = Fraction(fps).limit_denominator(1001)
    # Times in files are rounded, so a moment lies between two pictures' times, not on one.
    half = min(step, 1 / rate) / 2
    made = 0
    shown_from, shown = first
    for time, picture in rest:
        while made / rate + half < time:
            yield shown
            made += 1
        shown_from, shown = time, picture
    last = shown.duration * shown.time_base if shown.duration and shown.time_base else step
    while made < max(1, round((shown_from + last) * rate)):
        yield shown
        made += 1


def picture_pixels(picture: Any, size: tuple[int, int], fit: str, stream: Any) -> Frames:
    """A decoded picture as uint8 RGB [H, W, 3]."""
    from PIL import Image

    turn, aspect = display_turn(picture), float(stream.sample_aspect_ratio or 1)
    target = size if turn is None or not turn_swaps(turn) else (size[1], size[0])
    clear = any(component.is_alpha for component in picture.format.components)
    form = "rgba" if clear else "rgb24"
    matrix = {} if picture.colorspace != 2 else {"src_colorspace": untagged_matrix(picture.width, picture.height)}
    pixels = picture.to_ndarray(format=form, **matrix)
    small = over_backdrop(fitted(Image.fromarray(pixels), target, fit, aspect))
    return np.array(small if turn is None else small.transpose(turn), dtype=np.uint8)


def untagged_matrix(width: int, height: int) -> int:
    """The colour matrix of a video without a tag for it: BT.709 from 1280 across or 720 lines on, else BT.601."""
    from av.video.reformatter import Colorspace

    high = width >= HIGH_DEFINITION[0] or height >= HIGH_DEFINITION[1]
    return Colorspace.ITU709 if high else Colorspace.ITU601


def display_turn(picture: Any) -> Any:
    """Pillow transpose of a display matrix, in steps of 90 degrees; None if there is none."""
    from PIL.Image import Transpose

    matrix = next((data for data in picture.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None or len(bytes(matrix)) < 36:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])  # (x, y) goes to (a x + c y, b x + d y)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        turns = {
            (True, False): Transpose.FLIP_LEFT_RIGHT, (False, True): Transpose.FLIP_TOP_BOTTOM,
            (True, True): Transpose.ROTATE_180,
        }  # fmt: skip
        return turns.get((a < 0, d < 0))
    return {
        (False, True): Transpose.ROTATE_270, (True, False): Transpose.ROTATE_90,
        (False, False): Transpose.TRANSPOSE, (True, True): Transpose.TRANSVERSE,
    }[(b < 0, c < 0)]  # fmt: skip


def turn_swaps(turn: Any) -> bool:
    """Return True if a transpose swaps width and height."""
    from PIL.Image import Transpose

    return turn in (Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSPOSE, Transpose.TRANSVERSE)
