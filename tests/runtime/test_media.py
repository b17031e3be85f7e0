"""Media files: what is written can be read back, and a failure leaves nothing half-written.

The full disk is a file-size limit in a subprocess, so that no mount or privilege is needed.
"""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from inferix.errors import InferixError, UsageError
from inferix.runtime.files import check_output, write_atomically
from inferix.runtime.media import VideoWriter, contact_sheet, read_image, read_video

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


def test_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broke"), VideoWriter(tmp_path / "out.mp4", 16, SIZE) as writer:
        writer.add(clip(120))  # more than the encoder looks ahead, so that something is on disk
        assert (tmp_path / "out.mp4.part").exists()
        raise RuntimeError("model broke")
    assert list(tmp_path.iterdir()) == []


def test_error_keeps_the_file_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"earlier")
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "out.mp4", 16, SIZE) as writer:
        writer.add(clip(3))
        raise RuntimeError
    assert (tmp_path / "out.mp4").read_bytes() == b"earlier"


def test_interrupt_keeps_a_playable_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", 16, SIZE) as writer:
        writer.add(clip(7))
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "out.mp4", SIZE)) == 7
    assert not (tmp_path / "out.mp4.part").exists()


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
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
noise = np.random.default_rng(0).integers(0, 256, (int(sys.argv[3]), 128, 128, 3), dtype=np.uint8)
try:
    with VideoWriter(sys.argv[1], 16, (128, 128)) as writer:
        writer.add(noise)
        print("added")
except InferixError as error:
    assert not isinstance(error, UsageError)
    print(error)
"""


@pytest.mark.parametrize(("limit", "frames"), [(100_000, 200), (20_000, 4)])  # in add, on closing
def test_full_disk_names_path_and_reason(tmp_path: Path, limit: int, frames: int) -> None:
    pytest.importorskip("resource")
    path = tmp_path / "out.mp4"
    command = [sys.executable, "-c", FULL_DISK, str(path), str(limit), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("added" in done.stdout) == (frames == 4)
    assert str(path) in done.stdout and "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "fps", "size", "said"),
    [
        ("out.mp5", 16, SIZE, "did you mean '.mp4'"),
        ("out", 16, SIZE, "must end in"),
        ("out.mp4", 0, SIZE, "fps is 0"),
        ("out.mp4", 16, (63, 48), "even width"),
        ("file/out.mp4", 16, SIZE, "cannot write to folder"),
    ],
)
def test_writer_refuses_before_work(
    tmp_path: Path, name: str, fps: float, size: tuple[int, int], said: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=said):
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
    width, height = 3 * 64, 3 * 48  # small frames are enlarged
    assert sheet.shape == (3 * (height + 14), 3 * width, 3)
    assert tuple(sheet[14 + height // 2, width // 2]) == (20, 0, 90)  # middle of the first frame
    assert sheet[:14, :width].max() > 200  # its label is drawn
    assert sheet[2 * (height + 14) :, 2 * width :].max() == 0  # the ninth cell is empty


def test_contact_sheet_shrinks_and_takes_labels(tmp_path: Path) -> None:
    frame = np.full((480, 960, 3), 7, np.uint8)
    path = contact_sheet([frame], tmp_path / "sheet.png", labels=["frame 12"])
    assert Image.open(path).size == (240, 120 + 14)


@pytest.mark.parametrize(("count", "columns", "labels"), [(0, 6, None), (2, 6, ["a"]), (2, 0, None)])
def test_contact_sheet_refuses(tmp_path: Path, count: int, columns: int, labels: list[str] | None) -> None:
    with pytest.raises(UsageError, match="expected"):
        contact_sheet(list(clip(count)), tmp_path / "sheet.png", columns, labels)


def test_read_image_stretches(tmp_path: Path) -> None:
    Image.new("RGBA", (10, 30), (200, 100, 50, 255)).save(tmp_path / "in.png")
    image = read_image(tmp_path / "in.png", SIZE)
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert (image == [200, 100, 50]).all()


def test_small_pictures_are_written_larger(tmp_path: Path) -> None:
    frames = np.full((3, *SIZE[::-1], 3), (30, 60, 90), np.uint8)
    frames[:, :, : SIZE[0] // 2] = (200, 100, 50)
    with VideoWriter(tmp_path / "out.mp4", 16, SIZE, scale=3) as writer:
        writer.add(frames)
    large = read_video(tmp_path / "out.mp4", (3 * SIZE[0], 3 * SIZE[1]))
    assert np.abs(large.astype(int) - frames.repeat(3, 1).repeat(3, 2)).mean() < 8
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].width == 3 * SIZE[0]


def test_read_video_stretches(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "in.mp4", 16, SIZE) as writer:
        writer.add(clip(3))
    assert read_video(tmp_path / "in.mp4", (32, 16)).shape == (3, 16, 32, 3)


@pytest.mark.parametrize("read", [read_image, read_video])
@pytest.mark.parametrize("content", [None, b"", b"not a picture" * 50])
def test_unreadable_file(tmp_path: Path, read: object, content: bytes | None) -> None:
    path = tmp_path / "in.bin"
    if content is not None:
        path.write_bytes(content)
    assert callable(read)
    with pytest.raises(UsageError, match="cannot read") as caught:
        read(path, SIZE)
    assert str(path) in str(caught.value)


def test_truncated_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(UsageError, match=r"cut\.png"):
        read_image(tmp_path / "cut.png", SIZE)
    with VideoWriter(tmp_path / "whole.mp4", 16, SIZE) as writer:
        writer.add(clip(9))
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    with pytest.raises(UsageError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4", SIZE)
