"""Files written whole or not at all, never over an input, by names that nobody else has."""

import os
import stat
import warnings
from pathlib import Path

import pytest

from inferix.errors import InferixError, UsageError
from inferix.runtime.files import PartFile, abandoned_parts, check_output, check_paths, write_atomically


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """cat.png; the same by a symbolic and a hard link; and a model."""
    (tmp_path / "cat.png").write_bytes(b"cat")
    (tmp_path / "soft.png").symlink_to("cat.png")
    os.link(tmp_path / "cat.png", tmp_path / "hard.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "model" / "vae").mkdir(parents=True)
    names = ("model.safetensors", "config.json", "vae/config.json", "vae/weights.pth", "model.safetensors.index.json")
    for name in names:
        (tmp_path / "model" / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize("output", ["cat.png", "soft.png", "hard.png", "sub/../cat.png", "./cat.png", "{}/cat.png"])
@pytest.mark.parametrize("source", ["cat.png", "soft.png", "hard.png"])
def test_an_output_that_is_an_input(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, source: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"--out.*--image"):
        check_paths({"--image": source, "--video": None}, {"--out": output.format(folder)})


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("model", "model/config.json"), ("model", "model/vae/weights.pth"), ("model", "model/model.safetensors"),
        ("model", "model/vae/config.json"), ("model/model.safetensors", "model/config.json"),
        ("model/model.safetensors", "model/model.safetensors.index.json"), ("model", "linked.json"),
    ],
)  # fmt: skip
def test_an_output_that_is_part_of_a_model(folder: Path, source: str, output: str) -> None:
    (folder / "linked.json").symlink_to("model/config.json")
    with pytest.raises(UsageError, match="--model"):
        check_paths({"--model": folder / source}, {"record": folder / output})


def test_two_outputs_of_one_name(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"record and --records"):
        check_paths({}, {"--out": folder / "a.mp4", "record": folder / "a.json", "--records": folder / "sub/../a.json"})
    (folder / "b.mp4").touch()
    os.link(folder / "b.mp4", folder / "b.json")
    with pytest.raises(UsageError, match=r"--out and record"):
        check_paths({}, {"--out": folder / "b.mp4", "record": folder / "b.json"})


def test_outputs_beside_inputs_are_fine(folder: Path) -> None:
    (folder / "model" / "out.mp4").touch()
    (folder / "model" / "out.json").touch()
    inputs = {"--model": folder / "model", "--image": folder / "cat.png", "--base": "no such", "--vae": "taehv"}
    check_paths(inputs, {"--out": folder / "model" / "out.mp4", "record": folder / "model" / "out.json"})
    check_paths({"--model": folder / "model/model.safetensors"}, {"record": folder / "model" / "out.json"})
    check_paths({"--image": "a\0b"}, {"--out": folder / "new.mp4"})


def test_writers_of_one_name_both_end_well(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def first(part: Path) -> None:
        part.write_text("first")
        write_atomically(path, lambda other: other.write_text("second"))
        assert path.read_text() == "second"

    write_atomically(path, first)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_part_is_new_and_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    monkeypatch.setattr("inferix.runtime.files.secrets.token_hex", lambda count: "0" * 2 * count)
    for name in ("a.txt.part", "a.txt.00000000.part"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(InferixError, match=r"a\.txt"):
        write_atomically(tmp_path / "a.txt", lambda part: part.write_text("new"))
    assert precious.read_text() == "precious" and not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask_or_of_the_file_that_was_there(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        new = write_atomically(tmp_path / "new", lambda part: part.write_text("x"))
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o604)
        old = write_atomically(tmp_path / "old", lambda part: part.write_text("x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE(old.stat().st_mode) == 0o604


def test_a_part_left_by_a_killed_run_is_told_of_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    left = tmp_path / "a.mp4.0123abcd.part"
    left.write_text("left")
    (tmp_path / "a.mp4.note.part").write_text("a user's")
    part = PartFile(path)
    assert abandoned_parts(path) == [left]
    with pytest.warns(UserWarning, match="0123abcd"):
        check_output(path)
    part.keep()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_output(tmp_path / "b.mp4")
    assert left.read_text() == "left"


@pytest.mark.parametrize(
    "name", ["10:30.txt", "-x", "file:a", "é ü", "a b", "x" * 255, "é" * 127, "%d*[a]?"], ids=range(8)
)
def test_names(tmp_path: Path, name: str) -> None:
    path = write_atomically(check_output(tmp_path / name), lambda part: part.write_text("x"))
    assert path.read_text() == "x" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fifo", "folder", "a\0b", "x" * 300], ids=range(4))
def test_places_that_are_no_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"output|cannot write"):
        check_output(tmp_path / name)
    with pytest.raises(UsageError):
        check_output("/dev/null")
