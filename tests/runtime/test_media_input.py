"""Pictures and videos as users have them: upright, fitted, in the right colours, at the model's rate, bounded."""

import io
import os
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from inferix.errors import UsageError
from inferix.runtime import media_input
from inferix.runtime.media_input import BACKDROP, decoded, read_image, read_video, video_frames

QUARTERS = np.zeros((64, 96, 3), np.uint8)  # red, green / blue, yellow
QUARTERS[:32, :48], QUARTERS[:32, 48:], QUARTERS[32:, :48], QUARTERS[32:, 48:] = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0),
)  # fmt: skip
TURNS: dict[int, Callable[[Any], Any]] = {  # EXIF orientation -> the stored picture of an upright one
    1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: np.swapaxes(p, 0, 1),
    6: lambda p: np.rot90(p, 1), 7: lambda p: np.swapaxes(np.rot90(p, 2), 0, 1), 8: lambda p: np.rot90(p, 3),
}  # fmt: skip
MATRICES = {  # of the display, for the same orientations: a, b, c, d in (x, y) -> (a x + c y, b x + d y)
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1), 5: (0, 1, 1, 0), 6: (0, 1, -1, 0),
    7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


def near(actual: np.ndarray, right: object, bound: float = 8) -> bool:
    return bool(np.abs(actual.astype(float) - np.asarray(right, float)).max() <= bound)


def corners(pixels: np.ndarray) -> list[list[int]]:
    """Upper left, upper right, lower left, lower right, a little inside."""
    return [pixels[row, column].tolist() for row in (4, -5) for column in (4, -5)]


def save(path: Path, frames: list[np.ndarray], rate: Any = 16, times: list[int] | None = None, **tags: Any) -> Path:
    """A video of RGB frames, at `rate` or at times in milliseconds."""
    with av.open(str(path), "w") as container:
        codec, form = tags.pop("codec", "libx264"), tags.pop("form", "yuv420p")
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], form
        if codec == "libx264":
            stream.options = {"crf": "1"}
        matrix = tags.pop("matrix", 5)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for place, frame in enumerate(frames):
            shape = "rgba" if frame.shape[2] == 4 else "rgb24"
            full = tags.get("color_range", 1)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=shape)
            picture = picture.reformat(format=form, dst_colorspace=matrix, dst_color_range=full)
            if times:
                picture.pts, picture.time_base = times[place], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def greys(values: Any) -> list[np.ndarray]:
    return [np.full((32, 32, 3), value, np.uint8) for value in values]


def levels(path: Path, fps: float | None) -> list[int]:
    """The grey of each frame read."""
    return [int(frame.mean().round()) for frame in read_video(path, (32, 32), fps)]


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_image_lies_as_its_tag_says(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(TURNS[orientation](QUARTERS))).save(tmp_path / "in", kind, exif=exif)
    assert near(read_image(tmp_path / "in", (96, 64))[8:-8:48, 8:-8:72], QUARTERS[8:-8:48, 8:-8:72], 12)


@pytest.mark.parametrize("orientation", MATRICES)
def test_a_video_lies_as_its_display_matrix_says(tmp_path: Path, orientation: int) -> None:
    stored = np.ascontiguousarray(TURNS[orientation](QUARTERS))
    content = bytearray(save(tmp_path / "flat.mp4", [stored] * 3).read_bytes())
    start = content.find(b"tkhd")
    place = start + 8 + (32 if content[start + 4] == 1 else 20) + 16
    a, b, c, d = (value << 16 for value in MATRICES[orientation])
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    frames = read_video(tmp_path / "turned.mp4", (96, 64))
    assert frames.shape == (3, 64, 96, 3) and near(np.array(corners(frames[0])), corners(QUARTERS))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 64), (64, 32)])
def test_fits(tmp_path: Path, size: tuple[int, int]) -> None:
    """A circle stays one, and what is cut or added is what the rule says."""
    high = np.zeros((120, 60, 3), np.uint8)
    high[:, :, 1] = np.linspace(0, 255, 120).astype(np.uint8)[:, None]
    high[40:80, 10:50, 0] = 255  # a square in the middle
    Image.fromarray(high).save(tmp_path / "in.png")
    for fit in ("crop", "pad", "stretch"):
        frames = read_image(tmp_path / "in.png", size, fit)
        assert frames.shape == (size[1], size[0], 3)
        red = frames[:, :, 0] > 128
        wide, tall = int(red.any(0).sum()), int(red.any(1).sum())
        square = {"crop": max(size[0] / 60, size[1] / 120), "pad": min(size[0] / 60, size[1] / 120)}
        right = (40 * square[fit],) * 2 if fit in square else (size[0] * 40 / 60, size[1] * 40 / 120)
        assert abs(wide - min(right[0], size[0])) <= 2 and abs(tall - min(right[1], size[1])) <= 2
        top = {"crop": 255 * (120 - min(120, size[1] / square["crop"])) / 240, "pad": 0, "stretch": 0}[fit]
        assert near(frames[0, size[0] // 2, 1], top, 6)
        bars = {"crop": 0, "stretch": 0, "pad": size[0] - round(60 * square["pad"])}[fit]
        assert int((frames[-1, :, 1] < 5).sum()) == pytest.approx(bars, abs=1)
    assert (read_image(tmp_path / "in.png", size) == read_image(tmp_path / "in.png", size, "crop")).all()


def test_videos_are_fitted_as_pictures_are(tmp_path: Path) -> None:
    path = save(tmp_path / "in.mkv", [QUARTERS], codec="ffv1", form="bgr0")
    Image.fromarray(QUARTERS).save(tmp_path / "in.png")
    for fit in ("crop", "pad", "stretch"):
        assert near(read_video(path, (32, 64), fit=fit)[0], read_image(tmp_path / "in.png", (32, 64), fit), 1)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    """DVD-like: 96 stored columns are shown 192 wide, so that a square of 64x64 shows the middle third."""
    path = save(tmp_path / "in.mp4", [QUARTERS], sample_aspect_ratio=Fraction(2, 1))
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], (64, 1, 3))
    save(path, [ramp], sample_aspect_ratio=Fraction(2, 1))
    frames = read_video(path, (64, 64))[0, 32, :, 0]
    assert near(frames[[0, -1]], [255 / 3, 255 * 2 / 3], 6)


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 65536, 1024, np.uint16), (64, 1))
    for name in ("in.png", "in.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert (read_image(tmp_path / name, (64, 64))[..., 0] == ramp >> 8).all()
    (tmp_path / "in.pgm").write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    assert near(read_image(tmp_path / "in.pgm", (64, 64))[..., 0], ramp >> 8, 0)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of raw rows, each with its filter's byte."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    whole = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        whole += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return whole


@pytest.mark.parametrize("channels", [3, 4, 2])
def test_colour_of_16_bits_keeps_its_upper_8(tmp_path: Path, channels: int) -> None:
    pixels = np.full((8, 8, channels), 65535, ">u2")
    pixels[..., 0] = np.arange(8) * 8192
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    (tmp_path / "in.png").write_bytes(png(8, 8, 16, {3: 2, 4: 6, 2: 4}[channels], rows))
    frames = read_image(tmp_path / "in.png", (8, 8))
    assert near(frames[0, :, 0], np.arange(8) * 32, 1)
    assert (frames[..., 1] == (frames[..., 0] if channels == 2 else 255)).all()


def test_grey_of_16_bits_with_a_transparent_value(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + np.array([1000] * 4 + [32768] * 4, ">u2").tobytes() for _ in range(8))
    (tmp_path / "in.png").write_bytes(png(8, 8, 16, 0, rows, (b"tRNS", struct.pack(">H", 1000))))
    frames = read_image(tmp_path / "in.png", (8, 8))
    assert frames[0, 0].tolist() == list(BACKDROP) and frames[0, 7].tolist() == [128] * 3


def test_floating_point_from_0_to_1(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "in.tiff")
    assert near(read_image(tmp_path / "in.tiff", (64, 64))[0, :, 0], np.linspace(0, 255, 64), 1)
    for last in (255.0, -1.0, np.nan, np.inf):
        ramp[-1, -1] = last
        Image.fromarray(ramp).save(tmp_path / "in.tiff")
        with pytest.raises(UsageError, match="values from"):
            read_image(tmp_path / "in.tiff", (64, 64))
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "in.tiff")
    with pytest.raises(UsageError, match="70000"):
        read_image(tmp_path / "in.tiff", (64, 64))


@pytest.mark.parametrize(
    "kind", ["RGBA.png", "RGBA.webp", "RGBA.tiff", "LA.png", "P.png", "P.gif", "L+.png", "RGB+.png"]
)
def test_transparent_pixels_lie_over_the_backdrop(tmp_path: Path, kind: str) -> None:
    """Left is transparent with green or 150 under it, right is opaque red or 76."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (0, 255, 0, 0), (255, 0, 0, 255)
    mode, _, name = kind.partition(".")
    image, path = Image.fromarray(pixels), tmp_path / f"in.{name}"
    if mode == "P":
        index = np.repeat(np.array([[0] * 32 + [1] * 32], np.uint8), 64, 0)
        palette = Image.fromarray(index, "P")
        palette.putpalette([0, 255, 0, 255, 0, 0])
        palette.save(path, transparency=0)
    elif mode.endswith("+"):
        plain = image.convert("RGB").convert(mode[:-1])
        plain.save(path, transparency=plain.getpixel((0, 0)))
    else:
        image.convert(mode).save(path, **({"lossless": True} if name == "webp" else {}))
    frames = read_image(path, (64, 64))
    assert (frames[:, :30] == BACKDROP).all()
    assert near(frames[32, 50], [76] * 3 if mode in ("LA", "L+") else (255, 0, 0), 1)
    assert not ((frames[..., 1] > 40) & (frames[..., 0] < 40)).any()  # no green at the edge


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 128)).save(tmp_path / "in.png")
    assert near(read_image(tmp_path / "in.png", (16, 16))[0, 0], (227, 127, 127), 1)


def test_a_transparent_video_lies_over_the_backdrop(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16], pixels[:, 16:] = (0, 255, 0, 0), (255, 0, 0, 255)
    path = save(tmp_path / "in.mov", [pixels] * 2, codec="qtrle", form="argb")
    frames = read_video(path, (32, 32))[0]
    assert frames[16, 4].tolist() == list(BACKDROP) and frames[16, 28].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_modes_of_colour(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(QUARTERS).convert(mode)
    image.save(tmp_path / "in.tiff")
    right = image.convert("RGB")
    assert near(np.array(corners(read_image(tmp_path / "in.tiff", (96, 64)))), corners(np.array(right)), 3)


def test_a_colour_profile_is_converted(tmp_path: Path) -> None:
    """A profile with red and blue exchanged."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "in.png", icc_profile=bytes(srgb))
    assert read_image(tmp_path / "in.png", (8, 8))[0, 0].tolist() == [255, 0, 0]
    tags = {bytes(srgb[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(srgb[128:132]), 12)}
    srgb[tags[b"rXYZ"] : tags[b"rXYZ"] + 4], srgb[tags[b"bXYZ"] : tags[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    other = bytes(srgb).replace("sRGB".encode("utf-16-be"), "BRGs".encode("utf-16-be"))
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "in.png", icc_profile=other)
    assert near(read_image(tmp_path / "in.png", (8, 8))[0, 0], (0, 0, 255), 2)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "in.png", icc_profile=b"no profile")
    with pytest.warns(UserWarning, match="profile"):
        assert read_image(tmp_path / "in.png", (8, 8))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("tags", "side"),
    [
        ({"matrix": 5}, 64), ({"matrix": 1}, 720), ({"matrix": 1, "colorspace": 1}, 64),
        ({"matrix": 5, "colorspace": 6}, 720), ({"matrix": 5, "colorspace": 5}, 64),
        ({"matrix": 5, "colorspace": 6, "color_range": 2}, 64), ({"matrix": 9, "colorspace": 9}, 64),
    ],
)  # fmt: skip
def test_colours_of_a_video_are_read_by_its_tags(tmp_path: Path, tags: dict[str, int], side: int) -> None:
    frame = np.kron(QUARTERS[::16, ::24], np.ones((side // 4, side // 4, 1), np.uint8))
    path = save(tmp_path / "in.mp4", [frame] * 2, **tags)
    assert near(np.array(corners(read_video(path, (64, 64), fit="stretch")[0])), corners(QUARTERS), 6)


def test_hdr_is_warned_of(tmp_path: Path) -> None:
    path = save(tmp_path / "in.mp4", greys([90]), color_trc=16, color_primaries=9, colorspace=9, matrix=9)
    with pytest.warns(UserWarning, match="HDR"):
        read_video(path, (32, 32))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "mov"])
@pytest.mark.parametrize("rate", [8, 16, 24, 30, 60])
def test_a_video_is_sampled_at_the_rate_asked_for(tmp_path: Path, rate: int, suffix: str) -> None:
    """A second: each frame is the nearest in time; at the same rate they are taken one for one."""
    path = save(tmp_path / f"in.{suffix}", greys(4 * place for place in range(rate)), rate)
    actual = np.round(np.array(levels(path, 16)) / 4)
    assert len(actual) == 16
    assert np.abs(actual - np.arange(16) * rate / 16).max() <= 0.5
    if rate == 16:
        assert actual.tolist() == list(range(16))
    assert len(levels(path, None)) == rate


def test_rates_of_ntsc(tmp_path: Path) -> None:
    path = save(tmp_path / "in.mp4", greys(2 * place for place in range(60)), Fraction(30000, 1001))
    assert len(levels(path, 16)) == 32 and len(levels(path, 30000 / 1001)) == 60 and len(levels(path, 1)) == 2


def test_a_variable_rate(tmp_path: Path) -> None:
    """A still second, then ten pictures in half a second, then a still half: the still parts stay still."""
    times = [0, *range(1000, 1500, 50), 2000]
    path = save(tmp_path / "in.mkv", greys(range(0, 240, 20)), 30, times)
    actual = levels(path, 16)
    assert set(actual[:15]) == {0} and actual == sorted(actual) and 30 <= len(actual) <= 34
    assert set(actual[25:31]) == {200}


def test_times_that_begin_late_or_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "late.mkv", greys(range(0, 160, 10)), 16, [5000 + place * 1000 // 16 for place in range(16)])
    assert [round(level / 10) for level in levels(path, 16)] == list(range(16))
    jump = save(tmp_path / "jump.mkv", greys([0, 50]), 16, [0, 3_000_000_000])
    converted: list[int] = []
    whole = media_input.picture_pixels
    monkeypatch.setattr(media_input, "picture_pixels", lambda *rest: converted.append(1) or whole(*rest))
    assert len(read_video(jump, (32, 32), 16, first=40)) == 40 and len(converted) == 1
    with pytest.raises(UsageError, match=r"jump\.mkv"):
        read_video(jump, (832, 480), 16)


def test_only_the_frames_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "in.mp4", greys(range(200)))
    seen = []
    whole = media_input.picture_pixels
    monkeypatch.setattr(media_input, "picture_pixels", lambda *rest: seen.append(1) or whole(*rest))
    assert len(read_video(path, (32, 32), 16, first=5)) == len(seen) == 5
    frames = video_frames(path, (32, 32), 16)
    assert next(frames).shape == (32, 32, 3) and len(seen) == 6
    frames.close()


def test_a_long_video_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "in.mp4", greys([0] * 200))
    monkeypatch.setattr(media_input, "LARGEST_CLIP", 100 * 32 * 32 * 3)
    decoded: list[int] = []
    monkeypatch.setattr(media_input, "timed", lambda *rest: decoded.append(1))
    with pytest.raises(UsageError, match=r"200 frames.*at most 100"):
        read_video(path, (32, 32), 16)
    assert not decoded
    monkeypatch.undo()
    assert len(read_video(path, (32, 32), 16, first=100)) == 100


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_a_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    """A few kilobytes that say they are 50,000 pixels a side; no row of them is decoded."""
    before = peak()
    (tmp_path / "in.png").write_bytes(png(50_000, 50_000, 8, 2, bytes(100)))
    with pytest.raises(UsageError, match="2500000000"):
        read_image(tmp_path / "in.png", (32, 32))
    (tmp_path / "in.pgm").write_bytes(b"P5 60000 50000 255\n")
    with pytest.raises(UsageError, match="3000000000"):
        read_image(tmp_path / "in.pgm", (32, 32))
    assert peak() - before < 1 << 28


def test_a_large_sparse_file(tmp_path: Path) -> None:
    with (tmp_path / "in.png").open("wb") as file:
        file.truncate(1 << 40)
    for read in (read_image, read_video):
        with pytest.raises(UsageError, match=r"in\.png"):
            read(tmp_path / "in.png", (32, 32))


@pytest.mark.parametrize("content", [None, b"", b"not a picture" * 50], ids=["missing", "empty", "text"])
def test_what_is_no_picture(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "in.bin").write_bytes(content)
    for read in (read_image, read_video):
        with pytest.raises(UsageError, match=r"in\.bin"):
            read(tmp_path / "in.bin", (32, 32))


@pytest.mark.parametrize(
    "name", ["fifo", "folder", "/dev/zero", "http://127.0.0.1:1/a.mp4", "lavfi:testsrc", "data:,x"]
)
def test_only_local_regular_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("folder").mkdir()
    for read in (read_image, read_video):
        with pytest.raises(UsageError, match=name.rpartition("/")[2] or name):
            read(name, (32, 32))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:secret.ts\n#EXT-X-ENDLIST\n"),
        ("in.ffconcat", b"ffconcat version 1.0\nfile secret.ts\n"),
        ("in.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"),
        ("in.sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n"),
    ],
)
def test_formats_that_open_other_things_are_not_read(tmp_path: Path, name: str, content: bytes) -> None:
    save(tmp_path / "secret.ts", greys([7] * 8))
    (tmp_path / name).write_bytes(content)
    for read in (read_image, read_video):
        with pytest.raises(UsageError, match=name):
            read(tmp_path / name, (32, 32))


def test_a_stream_that_begins_within_a_file_is_an_error_of_the_file() -> None:
    def decode(stream: object) -> Iterator[object]:
        yield from ()
        raise IndexError("list index out of range")  # as PyAV does for a packet of that stream

    with pytest.raises(OSError, match="begins"):
        list(decoded(SimpleNamespace(decode=decode), None))


def test_a_cover_picture_and_sound_alone_are_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UsageError, match="no frame"):
        read_video(tmp_path / "in.mp4", (32, 32))


def test_files_that_are_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    (tmp_path / "cut.png").write_bytes(content.getvalue()[:2000])
    with pytest.raises(UsageError, match=r"cut\.png"):
        read_image(tmp_path / "cut.png", (64, 48))
    whole = save(tmp_path / "whole.mp4", [noise] * 9).read_bytes()
    for length in (600, len(whole) // 2):
        (tmp_path / "cut.mp4").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"cut\.mp4"):
            read_video(tmp_path / "cut.mp4", (64, 48))


@pytest.mark.parametrize("fit", ["fill", "", None, "x" * 10_000], ids=range(4))
def test_a_fit_that_is_none(tmp_path: Path, fit: Any) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    with pytest.raises(UsageError, match="crop, pad, stretch") as caught:
        read_image(tmp_path / "in.png", (32, 32), fit)
    assert len(str(caught.value)) < 400
