"""The stream benchmark on a CPU: what a viewer would see of given arrivals, and a small run of every part."""

import json
import threading
from collections import defaultdict
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
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.load import load
from inferix.runtime.sessions.batch_profile import BatchProfile

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
    assert all(point["longest_wait"] <= point["waited"] for point in [*result.facts["sessions"], result.facts["long"]])
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
    times = load("wan-tiny", device="cpu", batches=path, local_attn_size=6).manager.scheduler.batch_profiles
    assert times == {SMALL.size: BatchProfile({point["sessions"]: point["batch"] for point in found})}


def test_a_batch_that_was_split_has_no_time(tmp_path, monkeypatch):
    def split(engine, wanted, count, tell):
        engine.manager.metrics.count("batches_split", count - 1)
        return 0.5

    monkeypatch.setattr(bench, "batch_seconds", split)
    path, said = tmp_path / "times.json", []
    found = bench.batches(open_engine(SMALL), Wanted(SMALL, sessions=3, batches=path), said.append)
    assert [point["sessions"] for point in found] == [1] and "2 sessions did not fit" in said[-1]
    assert json.loads(path.read_text())[0]["seconds"] == {"1": 0.5}


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ({"executor": "fused"}, {"sessions": 2, "batches": Path("t.json")}, "executor fused runs no batches"),
        ({"executor": "eager", "overrides": {"lowp": "fp8"}}, {}, "executor eager in fewer bits is a slow reference"),
        ({"overrides": {"kv_dtype": "fp8"}}, {}, "executor eager in fewer bits is a slow reference"),
        ({"executor": "fussed"}, {}, "did you mean 'fused'"),
        ({"preset": "no-preset"}, {}, "no-preset"),
        ({"frames_in_window": None, "overrides": {"local_attn_size": -1}}, {}, "never full"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_begun(change, more, said, monkeypatch):
    monkeypatch.setattr(bench, "cold_starts", None)
    with pytest.raises(UsageError, match=said):
        run(Wanted(replace(SMALL, **change), **more), lambda told: None)


@pytest.mark.parametrize("kind", ["block", "stream"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_measured(kind, tmp_path):
    failed = CliRunner().invoke(app, ["bench", kind, "--device", "cpu", "--size", "32x32", "--out", str(tmp_path)])
    assert failed.exit_code == 2 and "is a folder" in failed.stderr and "measuring" not in failed.stderr


def test_starts_come_before_the_engine(monkeypatch):
    def opened(subject):
        raise InferixError("opened")

    begun = []
    monkeypatch.setattr(bench, "cold_starts", lambda wanted, tell: begun.append(wanted) or {})
    monkeypatch.setattr(bench, "open_engine", opened)
    with pytest.raises(InferixError, match="opened"):
        run(Wanted(SMALL), lambda said: None)
    assert len(begun) == 1


@pytest.mark.parametrize("part", ["watch", "controls", "long_run"])
def test_a_block_is_read_while_the_next_is_made_also_the_last(part, monkeypatch):
    """No block's passes end here before the block before it was read, so a clock that waits for them is found out."""
    read, in_time, last = defaultdict(threading.Event), {}, []
    denoise, shown = Engine.denoise, bench.shown

    def waiting(self, session):
        block = session.next_block
        in_time[block] = block == 0 or read[block - 1].wait(1)
        return denoise(self, session)

    def seen(block):
        read[block.index].set()
        last[:] = [block.index]
        return shown(block)

    monkeypatch.setattr(Engine, "denoise", waiting)
    monkeypatch.setattr(bench, "shown", seen)
    wanted = Wanted(SMALL, blocks=2, controls=1, minutes=0.01)
    given = (1,) if part == "watch" else (lambda said: None,)
    getattr(bench, part)(open_engine(SMALL), wanted, *given)
    assert last[0] >= 3 and all(in_time[block] for block in range(last[0] + 2))


def test_a_control_that_fails_or_never_shows_ends_the_run(monkeypatch):
    def fails(session):
        raise UsageError("no such action")

    wanted = Wanted(SMALL, controls=1)
    monkeypatch.setattr(bench, "steering", lambda engine, index: fails)
    with pytest.raises(UsageError, match="no such action"):
        bench.controls(open_engine(SMALL), wanted, lambda said: None)
    monkeypatch.setattr(bench, "steering", lambda engine, index: lambda session: 99)
    with pytest.raises(InferixError, match="0 of 1 controls showed within 10 blocks"):
        bench.controls(open_engine(SMALL), wanted, lambda said: None)


def test_a_watched_stream_that_differs_is_thrown_away(monkeypatch):
    made_of = bench.made_of
    monkeypatch.setattr(bench, "made_of", lambda block: replace(made_of(block), latents=block.latents * 1.1))
    with pytest.raises(InferixError, match="executor eager is refused, and what was timed thrown away: the latents of"):
        run(Wanted(SMALL, blocks=2, starts=0), lambda said: None)


def test_an_executor_that_is_wrong_is_not_timed(monkeypatch):
    right = GraphExecutor.block
    monkeypatch.setattr(GraphExecutor, "block", lambda self, *given: 1.1 * right(self, *given))
    with pytest.raises(InferixError, match="executor fused is refused and nothing was timed: the latents of block 0"):
        run(Wanted(replace(SMALL, executor="fused"), starts=0, controls=0), lambda said: None)
