"""A short run of the fuzzer over every reader, and faults of each kind that it must see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz.mutations import FORMATS, ODD_VALUES, change_value, json_text, mutate
from fuzz.readers import READERS, Reader, make_text
from fuzz.workers import BAD, Limits, Sample, Tally, run

from inferix.errors import InferixError, UsageError


@pytest.mark.parametrize("inputs", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_read(inputs: int, tmp_path: Path) -> None:
    """In a process of its own, which has no threads of other tests when it forks."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--inputs", str(inputs), "--processes", "1"]
    command += ["--minutes", "60", "--out", str(tmp_path), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)
    assert rows.keys() == READERS.keys()
    for row in rows.values():
        assert not any(row[kind] for kind in BAD)
        assert row["accepted"] + row["refused"] == row["inputs"] == inputs == 2 * row["structured"]


def fuzz(reader: Reader, home: Path, inputs: int, limits: Limits = Limits()) -> Tally:  # noqa: B008
    return run([Sample.make(reader, home)], 0, limits, inputs, None, 1)[reader.name]


def planted(fault: Callable[[Path], object]) -> Reader:
    """A reader of a small text with a fault in it."""
    return Reader("planted", make_text("x.json", '{"a": 1}'), fault)


def damaged(folder: Path) -> bool:
    return (folder / "x.json").read_text("utf-8", "replace") != '{"a": 1}'


def raw_error(folder: Path) -> None:
    try:
        json.loads((folder / "x.json").read_bytes())["a"]
    except ValueError as error:
        raise UsageError("no JSON") from error


def long_message(folder: Path) -> None:
    if damaged(folder):
        raise InferixError("x" * 5000)


def loop(folder: Path) -> None:
    while damaged(folder):
        pass


def wait_for_ever(folder: Path) -> None:
    if damaged(folder):
        signal.pause()


def crash(folder: Path) -> None:
    if damaged(folder):
        os.kill(os.getpid(), signal.SIGSEGV)


def flood(folder: Path) -> bytes | None:
    return bytes(range(256)) * (1 << 20) if damaged(folder) else None  # 256 MiB, all of them written


def claim(folder: Path) -> None:
    try:
        bytearray((1 << 40) * damaged(folder))
    except MemoryError as error:
        raise InferixError("too large") from error


def make_file(folder: Path) -> None:
    if damaged(folder):
        Path("made").write_text("x")


def make_file_in_passing(folder: Path) -> None:
    if damaged(folder):
        (folder / "cache").write_text("x")
        (folder / "cache").unlink()


def run_command(folder: Path) -> None:
    if damaged(folder):
        subprocess.run(["true"], check=True)


def run_text(folder: Path) -> None:
    if damaged(folder):
        exec("1 + 1")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(raw_error, "raw"), (long_message, "raw"), (crash, "raw"), (loop, "hang"), (wait_for_ever, "hang"),
     (flood, "memory"), (claim, "memory"), (make_file, "file"), (make_file_in_passing, "file"), (run_command, "code"),
     (run_text, "code")],
)  # fmt: skip
def test_a_planted_fault_is_seen(fault: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    wall = 0.3 if fault is wait_for_ever else 300.0
    tally = fuzz(planted(fault), tmp_path, 3, Limits(seconds=0.2 if fault is loop else 60, wall=wall, nbytes=1 << 27))
    assert tally.inputs == 3 and {seen for seen in tally.outcomes if seen in BAD} == {kind}
    assert {failure.kind for failure in tally.failures.values()} == {kind}


def test_a_right_reader_has_no_failures(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        if damaged(folder):
            raise UsageError("x")

    tally = fuzz(planted(read), tmp_path, 20)
    assert tally.outcomes["refused"] and not tally.failures


def test_a_sample_that_its_reader_refuses_is_an_error(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        raise UsageError("x")

    with pytest.raises(RuntimeError, match="planted"):
        fuzz(planted(read), tmp_path, 1)


def test_an_input_depends_on_its_number_alone(tmp_path: Path) -> None:
    sample = Sample.make(READERS["adapter"], tmp_path)
    inputs = [sample.input(5, number) for number in range(20)]
    assert inputs == [sample.input(5, number) for number in range(20)]
    assert inputs != [sample.input(6, number) for number in range(20)]
    assert [structured for _, structured in inputs] == [True, False] * 10


def test_damage_keeps_the_structure_of_json_every_second_time() -> None:
    files = {"x.json": b'{"a": [1, {"b": "c"}], "d": null}'}
    damaged = [mutate(files, ("x.json",), True, Random(number))["x.json"] for number in range(200)]
    valid = sum(is_json(content) for content in damaged)
    assert valid > 120 and len(set(damaged)) > 100


def is_json(content: bytes) -> Any:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def test_values_that_json_cannot_write() -> None:
    texts = {json_text(change_value({"a": 1}, Random(number), ODD_VALUES)) for number in range(600)}
    assert any(text.count(b'"a"') == 2 for text in texts)
    assert any(b"[" * 50_000 in text for text in texts) and any(b"9" * 5000 in text for text in texts)


def test_every_reader_of_a_known_format_is_damaged_by_it() -> None:
    assert FORMATS.keys() >= {".json", ".yaml", ".safetensors", ".pt", ".pth", ".png", ".jpg", ".mp4", ".txt"}
