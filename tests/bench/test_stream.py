"""The stream benchmark on a CPU: what a viewer would see of given arrivals, and a small run of every part."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inferix.bench import stream as bench
from inferix.bench.report import page
from inferix.bench.result import read_result
from inferix.bench.stream import Playout, Wanted, Watched, play_out, run, tenths
from inferix.bench.subject import Subject, open_engine
from inferix.cli.main import app
from inferix.errors import InferixError, UsageError
from inferix.runtime.batch_times import BatchTimes
from inferix.runtime.engine import load
from inferix.runtime.executors import GraphExecutor

SMALL = Subject("wan-tiny", frames_in_window=6, size=(32, 32), device="cpu")


def test_a_viewer_waits_for_what_comes_late():
    assert play_out([0.0, 0.5, 1.5, 2.0], [1.0] * 4) == Playout(0, 0.0, 0.0)
    # The second comes half a second late and shifts what follows; the third is then in time, the fourth is not.
    assert play_out([10.0, 11.5, 12.25, 14.0], [1.0] * 4) == Playout(2, 1.0, 0.5)


def test_speed_is_frames_after_the_first_block_by_the_time_since_it():
    watched = Watched((1.0, 2.0, 4.0), (9, 12, 12))
    assert watched.intervals == [1.0, 2.0]
    assert watched.fps == 8.0


def test_tenths_are_even_and_lose_nothing():
    parts = tenths(list(range(37)))
    assert [value for part in parts for value in part] == list(range(37))
    assert {len(part) for part in parts} == {3, 4}


def test_a_small_run_of_every_part(tmp_path):
    out, times = tmp_path / "stream.json", tmp_path / "batches.json"
    done = CliRunner().invoke(
        app, ["bench", "stream", "--size", "32x32", "--frames-in-window", "6", "--device", "cpu", "--starts", "1",
              "--blocks", "2", "--controls", "2", "--sessions", "2", "--minutes", "0.27", "--sink", "mp4", "--json",
              "--batches", str(times), "--out", str(out)]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = read_result(out)
    assert json.loads(done.stdout) == json.loads(out.read_text())
    assert result.facts["stream"]["frames"] == 24 and result.facts["stream"]["blocks"] == 2
    starts = {name: series for name, series in result.series.items() if name.startswith("start/")}
    assert "start/first frame, warm" in starts and not any("stored" in name for name in starts)  # nothing is compiled
    whole = starts["start/first frame, cold"].median
    assert sum(series.median for name, series in starts.items() if "cold:" in name) <= whole
    assert [point["sessions"] for point in result.facts["sessions"]] == [1, 2]
    assert [len(point["intervals"]) for point in result.facts["sessions"]] == [2, 4]
    alone, pair = result.facts["batches"]
    assert (alone["sessions"], pair["sessions"]) == (1, 2) and pair["turns"] == 2 * alone["turns"] == 2 * alone["batch"]
    (entry,) = json.loads(times.read_text())
    assert entry["size"] == [32, 32] and entry["seconds"] == {"1": alone["batch"], "2": pair["batch"]}
    long = result.facts["long"]
    assert len(long["intervals"]) == len(long["process_memory"]) == long["blocks"] == 22
    assert len(long["interval_by_tenth"]) == 10 and long["device_memory"] is None
    text = page({"stream.json": result}, "results", "page.md", {})
    assert "| a block each in turns, ms |" in text
    assert "Long run: 0.27 minutes" in text and "| processor's time, median, ms |" in text


def test_a_second_start_finds_what_the_first_has_stored():
    wanted = Wanted(replace(SMALL, executor="fused"), starts=1)
    marks = bench.cold_starts(wanted, lambda said: None)
    assert {name: len(found) for name, found in marks.items()} == {"cold": 1, "stored": 1}
    series = bench.start_series("stored", marks["stored"])
    assert all(one.median > 0 for one in series.values()) and "start/first frame, stored" in series


def test_a_start_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "false")
    with pytest.raises(InferixError, match="a start from nothing failed"):
        run(Wanted(SMALL, starts=1), lambda said: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks": 1}, "--blocks is 1; expected 2 or more"),
        ({"sessions": 0}, "--sessions is 0"),
        ({"minutes": 0.0}, "--minutes is 0.0"),
        ({"sink": "screen"}, "--sink is 'screen'"),
        ({"batches": Path("times.json")}, "--batches keeps times of several sessions, and --sessions is 1"),
    ],
)
def test_numbers_of_the_command(change, said):
    with pytest.raises(UsageError, match=said):
        replace(Wanted(SMALL), **change)


def test_measured_times_are_those_that_an_engine_goes_by(tmp_path):
    """What is kept is found by an engine of the same kind; executors without batches have nothing to keep."""
    path, engine = tmp_path / "times.json", open_engine(SMALL)
    found = bench.batches(engine, Wanted(SMALL, blocks=2, sessions=2, batches=path), lambda said: None)
    times = load("wan-tiny", device="cpu", batches=path, local_attn_size=6).host.scheduler.batch_times
    assert times == {SMALL.size: BatchTimes({point["sessions"]: point["batch"] for point in found})}
    fused = replace(SMALL, executor="fused")
    with pytest.raises(UsageError, match="executor fused runs no batches"):
        bench.batches(open_engine(fused), Wanted(fused, sessions=2, batches=path), lambda said: None)


def test_an_executor_that_is_wrong_is_not_timed(monkeypatch):
    right = GraphExecutor.block
    monkeypatch.setattr(GraphExecutor, "block", lambda self, *given: 1.1 * right(self, *given))
    with pytest.raises(InferixError, match="executor fused is refused and nothing was timed: the latents of block 0"):
        run(Wanted(replace(SMALL, executor="fused"), starts=0, controls=0), lambda said: None)
