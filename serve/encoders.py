"""Encoders of live media: pictures of a block to the payloads that a viewer gets.

Each viewer has its own, so that a codec's state follows the blocks that were sent, not those that were made. They run
in the server's pool of threads. PyAV and Pillow are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO, RawIOBase
from typing import Any, Protocol

from ..runtime.sinks import Frames
from .protocol import MediaFormat
from .refusals import Refusal

JPEG_QUALITY = 90
BITS_PER_PIXEL = 0.35  # of video, at the default quality of a live stream
GROUP = 64  # pictures from one key picture to the next
BT709, LIMITED = 1, 1  # numbers of H.273


@dataclass(frozen=True)
class Payload:
    """Encoded pictures. key: decodable without those before. frames: number of pictures."""

    data: bytes
    key: bool
    frames: int = 1


class Encoder(Protocol):
    """Encodes the pictures of one stream in order."""

    format: MediaFormat

    def encode(self, frames: Frames) -> list[Payload]:
        """Encode uint8 frames [T, H, W, 3]."""

    def close(self) -> None:
        """Free the codec. Its memory is a C library's, of which Python's collector knows nothing."""


class RawPictures:
    """RGB bytes, row by row."""

    def __init__(self, size: tuple[int, int], fps: float) -> None:
        self.format = MediaFormat(name="raw", width=size[0], height=size[1], fps=fps)

    def encode(self, frames: Frames) -> list[Payload]:
        return [Payload(frame.tobytes(), key=True) for frame in frames]

    def close(self) -> None:
        """Nothing is open."""


class JpegPictures(RawPictures):
    """One JPEG file for each picture, with chroma in full resolution."""

    def __init__(self, size: tuple[int, int], fps: float) -> None:
        self.format = MediaFormat(name="jpeg", width=size[0], height=size[1], fps=fps)

    def encode(self, frames: Frames) -> list[Payload]:
        from PIL import Image

        payloads = []
        for frame in frames:
            file = BytesIO()
            Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            payloads.append(Payload(file.getvalue(), key=True))
        return payloads


CODECS = {"h264": "libx264", "vp9": "libvpx-vp9"}


class VideoChunks:
    """Chunks for a WebCodecs VideoDecoder: H.264 (Annex B) or VP9, no picture held back."""

    def __init__(self, name: str, size: tuple[int, int], fps: float) -> None:
        import av

        check_even(size)
        self.format = MediaFormat(
            name=name, width=size[0], height=size[1], fps=fps, codec=codec_string(name, size, fps)
        )
        context: Any = av.CodecContext.create(CODECS[name], "w")
        configure(context, name, size, fps)
        self.context, self.count = context, 0

    def encode(self, frames: Frames) -> list[Payload]:
        packets = []
        for frame in frames:
            picture = video_frame(frame, self.count)
            self.count += 1
            packets += self.context.encode(picture)
        return [Payload(bytes(packet), bool(packet.is_keyframe)) for packet in packets]

    def close(self) -> None:
        self.context.encode(None)
        self.context = None


class Collected(RawIOBase):
    """A file that collects what is written until it is taken."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data, self.parts = b"".join(self.parts), []
        return data


class Fragments:
    """Fragmented MP4 with H.264 for MediaSource: a header before the first block, and a fragment for each picture."""

    def __init__(self, size: tuple[int, int], fps: float) -> None:
        import av

        check_even(size)
        codec = codec_string("h264", size, fps)
        self.format = MediaFormat(name="fmp4", width=size[0], height=size[1], fps=fps, codec=codec)
        self.file = Collected()
        options = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
        self.container: Any = av.open(self.file, "w", format="mp4", options=options)
        self.stream: Any = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        configure(self.stream.codec_context, "h264", size, fps)
        self.count = 0

    def encode(self, frames: Frames) -> list[Payload]:
        first = self.count == 0
        for frame in frames:
            self.container.mux(self.stream.encode(video_frame(frame, self.count)))
            self.count += 1
        return [Payload(self.file.take(), key=first, frames=len(frames))]

    def close(self) -> None:
        self.container.close()
        self.container = self.stream = None


def configure(context: Any, name: str, size: tuple[int, int], fps: float) -> None:
    """Set a codec up for one-hop low delay: a picture in, a packet out."""
    rate = Fraction(fps).limit_denominator(1001)
    context.width, context.height, context.pix_fmt = *size, "yuv420p"
    context.framerate, context.time_base, context.gop_size = rate, 1 / rate, GROUP
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED
    if name == "h264":
        context.profile = "Baseline"
        context.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "20"}
    else:
        context.bit_rate = max(200_000, int(BITS_PER_PIXEL * size[0] * size[1] * fps))
        context.options = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "error-resilient": "1"}


def video_frame(frame: Any, count: int) -> Any:
    import av

    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED
    )
    picture.pts = count
    return picture


def codec_string(name: str, size: tuple[int, int], fps: float) -> str:
    """The codec as browsers name it, with the lowest level that the size and rate fit into."""
    per_second = size[0] * size[1] * fps
    if name == "h264":
        levels = ((380_160, 0x0B), (3_041_280, 0x15), (10_368_000, 0x1E), (27_648_000, 0x1F), (62_914_560, 0x28))
        return f"avc1.42C0{next((level for most, level in levels if per_second <= most), 0x33):02X}"
    levels = ((829_440, 10), (4_608_000, 20), (20_736_000, 30), (83_558_400, 40), (311_951_360, 50))
    return f"vp09.00.{next((level for most, level in levels if per_second <= most), 61)}.08"


def check_even(size: tuple[int, int]) -> None:
    if size[0] % 2 or size[1] % 2:
        raise Refusal("invalid", f"media of {size[0]}x{size[1]} pictures cannot be video; choose jpeg or raw")


ENCODERS: dict[str, Callable[[tuple[int, int], float], Encoder]] = {
    "h264": lambda size, fps: VideoChunks("h264", size, fps),
    "vp9": lambda size, fps: VideoChunks("vp9", size, fps),
    "fmp4": Fragments,
    "jpeg": JpegPictures,
    "raw": RawPictures,
}


def make_encoder(wanted: Sequence[str], size: tuple[int, int], fps: float) -> Encoder:
    """The encoder of the first of some formats that can hold pictures of `size`; Refusal if there is none."""
    last: Refusal | None = None
    for name in wanted:
        try:
            return ENCODERS[name](size, fps)
        except Refusal as refusal:
            last = refusal
    assert last is not None
    raise last
