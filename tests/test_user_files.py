"""Small files of a user's: what is read, and that hostile ones end in a short UsageError."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import inferix
from inferix.bench.result import foreign_files, read_folder
from inferix.errors import UsageError, quoted
from inferix.evaluate.prompt_lists import videos_in
from inferix.export.plan import read_plan
from inferix.models.registry import read_checkpoint
from inferix.models.wan.lora import read_lora
from inferix.schemes.camera_file import read_camera
from inferix.user_files import LARGEST_TEXT, check_reachable, check_regular, read_json, read_text
from inferix.user_yaml import parse_yaml, read_yaml

ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)
ALIASES = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x" * 500] * 500, {"a": [[[[1] * 50] * 50] * 50] * 50}, 10**20_000, [10**20_000], ENDLESS],
    ids=["text", "list", "nested", "integer", "integers", "endless"],
)
def test_a_quoted_value_is_short(value: object) -> None:
    assert len(quoted(value)) <= 200


def test_a_short_value_is_quoted_whole() -> None:
    values = ("it's", 3, None, [1, "a"], math.nan)
    assert [quoted(value) for value in values] == [repr(value) for value in values]


def test_yaml_of_plain_values() -> None:
    assert parse_yaml("a: 1\nb: [1.5, true, null, text]\nc: 2001-99-99\nd: 1:30\n<<: x", "x") == {
        "a": 1, "b": [1.5, True, None, "text"], "c": "2001-99-99", "d": 90, "<<": "x",
    }  # fmt: skip
    assert parse_yaml("", "x") is None
    assert parse_yaml("[" * 32 + "]" * 32, "x")


@pytest.mark.parametrize(
    "text",
    [
        ALIASES, "&a [*a]", "- " + "[" * 100_000, "{a: " * 50_000, "- " * 50_000, "? " * 50_000,
        "[%s]" % ("1," * 20_000), "a: 1\na: 2", "!!int x", "!!int ''", "!!int 0b", "!!bool x", "!!float x",
        "!!timestamp 2001-99-99", "!!binary x",
        "!!python/object/apply:os.system [ls]", "!!map x", "? [a]\n: b", "\x00", "\ud800", "a: b: c", "--- a\n--- b",
        "k: " + "9" * 5000, "k: 0x" + "f" * 500_000, "k: 1" + ":59" * 100_000, "a" * (LARGEST_TEXT + 1),
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="story") as caught:
        parse_yaml(text, "story")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", ["[" * 200_000, "9" * 5000, "{", "\ufeff\ufeff[]", "[NaN"], ids=range(5))
def test_json_that_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "in.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UsageError, match=r"in\.json"):
        read_json(path, "actions")


def test_text_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "in.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\r\n")  # a byte-order mark and CRLF
    assert read_yaml(path, "config") == {"a": "é"}
    path.write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match=r"in\.yaml"):
        read_yaml(path, "config")


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "in.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UsageError, match=str(LARGEST_TEXT)):
        read_text(path, "config")


@pytest.mark.parametrize(
    "name", ["folder", "fifo", "missing", "a\0b", "x" * 5000, "/dev/zero", "http://host/x"], ids=range(7)
)
def test_only_regular_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="image"):
        check_regular(tmp_path / name, "image")


LONG = "x" * 300


@pytest.mark.parametrize("name", [LONG, f"{LONG}/file", "y/" * 3000, "a\0b"], ids=range(4))
def test_paths_that_cannot_be_looked_up(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="lora"):
        check_reachable(tmp_path / name, "lora")


def test_a_path_that_is_not_there_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "missing", "missing/too", "file/below"):
        assert check_reachable(tmp_path / name, "out") == tmp_path / name


@pytest.mark.parametrize("argument", ["model", "base", "vae", "text_encoder", "lora", "graphs", "names", "engine"])
def test_names_that_are_too_long_are_refused_by_load(argument: str) -> None:
    model = {} if argument in ("model", "engine") else {"model": "wan-tiny", "device": "cpu"}
    with pytest.raises(UsageError, match=argument):
        inferix.load(**model, **{argument: LONG})


@pytest.mark.parametrize(
    "read", [read_checkpoint, read_lora, read_plan, read_folder, foreign_files, videos_in, read_camera]
)
def test_names_that_are_too_long_are_refused_by_readers(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="xxx"):
        read(tmp_path / LONG)


def test_a_link_to_a_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert check_regular(tmp_path / "link", "image") == tmp_path / "link"
