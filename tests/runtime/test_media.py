"""Media files: what is written can be read back, and a failure keeps what was whole.

The full disk is a file-size limit in a subprocess, so that no mount or privilege is needed.
"""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from inferix.errors import InferixError, UsageError
from inferix.runtime.files import check_output, write_atomically
from inferix.runtime.media import VideoWriter, contact_sheet
from inferix.runtime.media_input import read_video

SIZE = (64, 48)


def clip(count: int) -> np.ndarray:
    """Flat frames [T, 48, 64, 3] that brighten with time, so that order and colour survive compression."""
    frames = np.zeros((count, SIZE[1], SIZE[0], 3), np.uint8)
    frames[..., 0] = np.linspace(20, 220, count).astype(np.uint8)[:, None, None]
    frames[..., 2] = 90
    return frames


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_video_round_trip(tmp_path: Path, suffix: str) -> None:
    path, frames = tmp_path / f"out{suffix}", clip(13)
    with VideoWriter(path, 16, SIZE) as writer:
        writer.add(frames[:5])
        writer.add(frames[5:])
        assert not path.exists()
    assert writer.frames == 13
    back = read_video(path, SIZE)
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames.astype(int)).max() <= 8  # 8 of 255: YUV rounding and crf 18
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_video_stream_facts(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", 30000 / 1001, SIZE) as writer:
        writer.add(clip(4))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == SIZE
        assert stream.average_rate is not None and stream.average_rate.as_integer_ratio() == (30000, 1001)


def test_folder_is_made(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a" / "b" / "out.mp4", 16, SIZE) as writer:
        writer.add(clip(1))
    assert len(read_video(tmp_path / "a" / "b" / "out.mp4", SIZE)) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_keeps_the_frames_before_it(tmp_path: Path, suffix: str, error: type[BaseException]) -> None:
    path = tmp_path / f"out{suffix}"
    with pytest.raises(error), VideoWriter(path, 16, SIZE) as writer:
        writer.add(clip(7))
        raise error
    assert len(read_video(path, SIZE)) == writer.frames == 7
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_without_frames_keeps_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", 16, SIZE):
        raise RuntimeError
    assert (tmp_path / "out.mp4").read_bytes() == b"earlier"


def test_two_writers_of_one_name_end_well(tmp_path: Path) -> None:
    """The first one's file is whole while the second still writes, and the second's replaces it."""
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 16, SIZE) as second:
        second.add(clip(40))
        with VideoWriter(path, 16, SIZE) as first:
            first.add(clip(9))
        assert len(read_video(path, SIZE)) == 9
        second.add(clip(40))
    assert len(read_video(path, SIZE)) == 80 and list(tmp_path.iterdir()) == [path]


def test_interrupt_while_finishing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inferix.runtime.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", 16, SIZE) as writer:
        writer.add(clip(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_no_frames_no_file(tmp_path: Path, error: type[BaseException] | None) -> None:
    try:
        with VideoWriter(tmp_path / "out.mp4", 16, SIZE):
            if error:
                raise error
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
import numpy as np
from inferix.errors import InferixError, UsageError
from inferix.runtime.media import VideoWriter
path, limit, frames = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
noise = np.random.default_rng(0).integers(0, 64, (frames, 64, 64, 3), dtype=np.uint8)
writer = VideoWriter(path, 16, (64, 64))
try:
    with writer:
        for start in range(0, frames, 12):
            writer.add(noise[start : start + 12])
except InferixError as error:
    assert not isinstance(error, UsageError) and path in str(error), error
    print(writer.frames)
"""


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("share", "frames", "least"), [(0.5, 120, 30), (0.95, 120, 80), (0.1, 4, 0)]
)  # in add, on closing, before anything is whole
def test_a_full_disk_keeps_what_fits(tmp_path: Path, suffix: str, share: float, frames: int, least: int) -> None:
    pytest.importorskip("resource")
    path = tmp_path / f"out{suffix}"
    noise = np.random.default_rng(0).integers(0, 64, (frames, 64, 64, 3), dtype=np.uint8)
    with VideoWriter(path, 16, (64, 64)) as writer:
        writer.add(noise)
    size = path.stat().st_size
    path.unlink()
    command = [sys.executable, "-c", FULL_DISK, str(path), str(int(size * share)), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = int(done.stdout)
    assert least <= written < frames
    if written:
        assert len(read_video(path, (64, 64))) == written and path.stat().st_size <= size * share
    assert list(tmp_path.iterdir()) == [path] * bool(written)


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_the_index_is_in_front_and_times_begin_at_nothing(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    with VideoWriter(path, 30000 / 1001, SIZE) as writer:
        writer.add(clip(70))
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat") and b"moof" not in content
    with av.open(str(path)) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(1001 * index, 30000) for index in range(70)]


def test_without_room_for_a_second_copy_the_fragments_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inferix.runtime.media.copy_packets", full)
    path = tmp_path / "out.mp4"
    with pytest.warns(UserWarning, match="fragments"), VideoWriter(path, 16, SIZE) as writer:
        writer.add(clip(40))
    assert len(read_video(path, SIZE)) == 40 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("size", "scale", "matrix"),
    [((64, 48), 1, 6), ((1278, 718), 1, 6), ((96, 720), 1, 1), ((1280, 64), 1, 1), ((96, 80), 9, 1)],
)
def test_colours_are_tagged_and_are_those_that_a_player_shows(
    tmp_path: Path, size: tuple[int, int], scale: int, matrix: int
) -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)], np.uint8)
    frame = np.repeat(colours[None], size[1], 0).repeat(-(-size[0] // 6), 1)[:, : size[0]]
    with VideoWriter(tmp_path / "out.mp4", 16, size, scale) as writer:
        writer.add(np.stack([frame] * 2))
    with av.open(str(tmp_path / "out.mp4")) as container:
        tags = container.streams.video[0].codec_context
        assert (tags.colorspace, tags.color_primaries, tags.color_trc, tags.color_range) == (matrix, 1, 1, 1)
        picture = next(container.decode(video=0))
        planes = [np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size) for plane in picture.planes]
    red, blue = {6: (0.299, 0.114), 1: (0.2126, 0.0722)}[matrix]  # of BT.601 and BT.709
    for index, (r, g, b) in enumerate(colours / 255):
        luma = red * r + (1 - red - blue) * g + blue * b
        right = 16 + 219 * luma, 128 + 112 * (b - luma) / (1 - blue), 128 + 112 * (r - luma) / (1 - red)
        across = int((index + 0.5) / 6 * size[0] * scale)
        there = [plane[len(plane) // 2, across // half] for plane, half in zip(planes, (1, 2, 2), strict=True)]
        assert np.abs(np.array(there) - right).max() <= 3  # crf 18
    back = read_video(tmp_path / "out.mp4", size)
    assert np.abs(back[0, size[1] // 2, size[0] // 12 :: size[0] // 6][:6].astype(int) - colours).max() <= 6


@pytest.mark.parametrize(
    "name", ["10:30.mp4", "file:a.mp4", "-out.mp4", "http:x é.mp4", "a b%d.mkv", "é" * 120 + ".mov"]
)
def test_names_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name, 16, SIZE) as writer:
        writer.add(clip(3))
    assert len(read_video(name, SIZE)) == 3 and [path.name for path in tmp_path.iterdir()] == [name]


def test_frames_are_copied_before_they_are_encoded(tmp_path: Path) -> None:
    frames = clip(40)
    with VideoWriter(tmp_path / "out.mp4", 16, SIZE) as writer:
        for start in range(0, 40, 4):
            part = frames[start : start + 4].copy()
            writer.add(part)
            part[:] = 0
    assert np.abs(read_video(tmp_path / "out.mp4", SIZE).astype(int) - frames).max() <= 10


@pytest.mark.parametrize(
    ("name", "fps", "size", "message"),
    [
        ("out.mp5", 16, SIZE, "did you mean '.mp4'"),
        ("out", 16, SIZE, "must end in"),
        ("out.mp4", 0, SIZE, "fps is 0"),
        ("out.mp4", 16, (63, 48), "even width"),
        ("file/out.mp4", 16, SIZE, "cannot write"),
    ],
)
def test_writer_refuses_before_work(
    tmp_path: Path, name: str, fps: float, size: tuple[int, int], message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=message):
        VideoWriter(tmp_path / name, fps, size)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path)


@pytest.mark.parametrize("frames", [clip(2)[:, :40], clip(2)[0], clip(2).astype(np.float32)])
def test_add_refuses_other_frames(tmp_path: Path, frames: np.ndarray) -> None:
    with (
        pytest.raises(ValueError, match=r"expected uint8 \[T, 48, 64, 3\]"),
        VideoWriter(tmp_path / "out.mp4", 16, SIZE) as writer,
    ):
        writer.add(frames)
    assert list(tmp_path.iterdir()) == []


def test_write_atomically_failure(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InferixError, match="No space left"):
        write_atomically(tmp_path / "out.json", fail)
    assert list(tmp_path.iterdir()) == []


def test_contact_sheet(tmp_path: Path) -> None:
    path = contact_sheet(list(clip(8)), tmp_path / "new" / "sheet.png", columns=3)
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    sheet = np.asarray(Image.open(path))
    width, height, gap = 3 * 64, 3 * 48, 4  # small frames are enlarged
    assert sheet.shape == (3 * (height + 14 + gap) - gap, 3 * (width + gap) - gap, 3)
    assert tuple(sheet[14 + height // 2, width // 2]) == (20, 0, 90)  # middle of the first frame
    assert sheet[:14, :width].min() < 60  # its label is drawn
    assert sheet[2 * (height + 14 + gap) :, 2 * (width + gap) :].min() == 255  # the ninth cell is empty


def test_contact_sheet_keeps_pixels_and_fills_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (8, 10, 3), np.uint8) for _ in range(21)]
    sheet = np.asarray(Image.open(contact_sheet(frames, tmp_path / "sheet.png")))
    assert sheet.shape[1] == 7 * 244 - 4
    assert (sheet[14 : 14 + 192, :240] == frames[0].repeat(24, 0).repeat(24, 1)).all()


def test_contact_sheet_shrinks_and_takes_labels(tmp_path: Path) -> None:
    frame = np.full((480, 960, 3), 7, np.uint8)
    path = contact_sheet([frame], tmp_path / "sheet.png", labels=["frame 12"])
    assert Image.open(path).size == (240, 120 + 14)


@pytest.mark.parametrize(("count", "columns", "labels"), [(0, 6, None), (2, 6, ["a"]), (2, 0, None)])
def test_contact_sheet_refuses(tmp_path: Path, count: int, columns: int, labels: list[str] | None) -> None:
    with pytest.raises(UsageError, match="expected"):
        contact_sheet(list(clip(count)), tmp_path / "sheet.png", columns, labels)


def test_small_pictures_are_written_larger(tmp_path: Path) -> None:
    frames = np.full((3, *SIZE[::-1], 3), (30, 60, 90), np.uint8)
    frames[:, :, : SIZE[0] // 2] = (200, 100, 50)
    with VideoWriter(tmp_path / "out.mp4", 16, SIZE, scale=3) as writer:
        writer.add(frames)
    large = read_video(tmp_path / "out.mp4", (3 * SIZE[0], 3 * SIZE[1]))
    assert np.abs(large.astype(int) - frames.repeat(3, 1).repeat(3, 2)).mean() < 8
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].width == 3 * SIZE[0]


@pytest.mark.parametrize("suffix", [".webm", ".gif"])
def test_other_containers_hold_the_same_pictures(tmp_path: Path, suffix: str) -> None:
    frames = clip(7)
    with VideoWriter(tmp_path / f"out{suffix}", 8, SIZE, scale=2) as writer:
        writer.add(frames[:3])
        writer.add(frames[3:])
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 7
    assert np.abs(np.stack(shown).astype(int) - frames.repeat(2, 1).repeat(2, 2)).mean() < 8
