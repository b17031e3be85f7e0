"""A few kills of every writer, and faults that the check must see."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from endurance.kills import WRITERS, Writer, again, check_picture, check_result, kill, result, run

from inferix.bench.result import write_result

QUICK = ["session", "video", "sheet", "records", "profiles", "result"]


def test_files_are_whole_after_kills() -> None:
    faults = [one for one in run(2 * len(QUICK), 0, QUICK) if one.fault]
    assert not faults, faults[0]


@pytest.mark.slow
def test_files_of_every_writer_are_whole_after_kills() -> None:
    faults = [one for one in run(4 * len(WRITERS), 1, list(WRITERS)) if one.fault]
    assert not faults, faults[0]


def torn(folder: Path, number: int) -> None:
    """A writer that makes its file in place, slowly."""
    whole = folder / "whole.json"
    write_result(result(), whole)
    content = whole.read_bytes()
    with (folder / "r.json").open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(60)


def test_a_torn_file_is_seen(tmp_path: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        writer = Writer("torn", again(torn), check_result, prepare=result)
        while not (tmp_path / "r.json").exists():
            found = kill(writer, number, 0.5, tmp_path)
        assert found.fault is not None
        (tmp_path / "r.json").unlink()


def test_a_picture_cut_short_is_seen(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    writer = Writer("cut", lambda folder, begun: begun(), check_picture)
    assert kill(writer, signal.SIGKILL, 0.0, tmp_path).fault is not None
