"""The stream benchmark on a CPU: a viewer's waits for given arrivals, and a small run of every part."""

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
from inferix.bench.stream import Options, Playout, TimedStream, play_out, run, tenths
from inferix.bench.subject import Subject, open_engine
from inferix.cli.main import app
from inferix.errors import InferixError, UsageError
from inferix.runtime.block_loop import BlockLoop
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.executor_specs import EXECUTORS, ExecutorSpec
from inferix.runtime.load import load
from inferix.runtime.sessions.batch_profile import BatchProfile
from inferix.runtime.sinks import Pump

SMALL = Subject("wan-tiny", frames_in_window=6, size=(32, 32), device="cpu")


def test_a_viewer_waits_for_late_blocks():
    assert play_out([0.0, 0.5, 1.5, 2.0], [1.0] * 4) == Playout(0, 0.0, 0.0)
    # The second arrives half a second late and shifts the rest; the third is then in time, the fourth is not.
    assert play_out([10.0, 11.5, 12.25, 14.0], [1.0] * 4) == Playout(2, 1.0, 0.5)


def test_speed_is_frames_after_the_first_block_by_the_time_since_it():
    watched = TimedStream((1.0, 2.0, 4.0), (9, 12, 12))
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
    single, pair = result.facts["batches"]
    assert (single["sessions"], pair["sessions"]) == (1, 2)
    assert pair["turns"] == 2 * single["turns"] == 2 * single["batch"]
    (entry,) = json.loads(times.read_text())
    assert entry["size"] == [32, 32] and entry["seconds"] == {"1": single["batch"], "2": pair["batch"]}
    long = result.facts["long"]
    assert len(long["intervals"]) == len(long["process_memory"]) == long["blocks"] == 22
    assert len(long["interval_by_tenth"]) == 10 and long["device_memory"] is None
    text = page({"stream.json": result}, "results", "page.md", {})
    assert "| a block each in turns, ms |" in text
    assert "Long run: 0.27 minutes" in text and "| CPU time, median, ms |" in text


@pytest.mark.slow
def test_a_second_start_uses_the_stored_graphs_of_the_first():
    options = Options(replace(SMALL, executor="fused"), starts=1)
    marks = bench.cold_starts(options, lambda message: None)
    assert {name: len(starts) for name, starts in marks.items()} == {"cold": 1, "stored": 1}
    series = bench.start_series("stored", marks["stored"])
    assert all(one.median > 0 for one in series.values()) and "start/first frame, stored" in series


def test_a_start_that_fails_ends_the_run(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "false")
    with pytest.raises(InferixError, match="start failed"):
        run(Options(SMALL, starts=1), lambda message: None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"blocks": 1}, "blocks is 1; expected 2"),
        ({"sessions": 0}, "sessions is 0"),
        ({"minutes": 0.0}, "minutes is 0.0"),
        ({"sink": "screen"}, "sink is 'screen'"),
        ({"batches": Path("times.json")}, "sessions is 1.*batches"),
    ],
)
def test_options_out_of_range_are_refused(change, expected):
    with pytest.raises(UsageError, match=expected):
        replace(Options(SMALL), **change)


def test_an_engine_reads_the_measured_batch_times(tmp_path):
    """An engine of the same configuration reads the file."""
    path, engine = tmp_path / "times.json", open_engine(SMALL)
    points = bench.time_batches(engine, Options(SMALL, blocks=2, sessions=2, batches=path), lambda message: None)
    times = load("wan-tiny", device="cpu", batches=path, local_attn_size=6).manager.scheduler.batch_profiles
    assert times == {SMALL.size: BatchProfile({point["sessions"]: point["batch"] for point in points})}


def test_a_batch_that_was_split_has_no_time(tmp_path, monkeypatch):
    def split(engine, options, count, log):
        engine.manager.metrics.count("batches_split", count - 1)
        return 0.5

    monkeypatch.setattr(bench, "batch_seconds", split)
    path, messages = tmp_path / "times.json", []
    points = bench.time_batches(open_engine(SMALL), Options(SMALL, sessions=3, batches=path), messages.append)
    assert [point["sessions"] for point in points] == [1] and "2 sessions" in messages[-1]
    assert json.loads(path.read_text())[0]["seconds"] == {"1": 0.5}


@pytest.mark.parametrize(
    ("change", "more", "expected"),
    [
        ({"executor": "single"}, {"sessions": 2, "batches": Path("t.json")}, "executor 'single'.*batches"),
        ({"executor": "eager", "overrides": {"lowp": "fp8"}}, {}, "executor 'eager'.*fused"),
        ({"overrides": {"kv_dtype": "fp8"}}, {}, "executor 'eager'.*fused"),
        ({"executor": "fussed"}, {}, "'fussed'.*'fused'"),
        ({"preset": "no-preset"}, {}, "no-preset"),
        ({"frames_in_window": None, "overrides": {"local_attn_size": -1}}, {}, "frames_in_window"),
    ],
)
def test_invalid_options_are_refused_before_any_measurement(change, more, expected, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "single", ExecutorSpec(about="", make="nowhere:make"))
    monkeypatch.setattr(bench, "cold_starts", None)
    with pytest.raises(UsageError, match=expected):
        run(Options(replace(SMALL, **change), **more), lambda message: None)


@pytest.mark.parametrize("kind", ["block", "stream"])
def test_a_folder_in_place_of_a_file_is_refused_before_any_measurement(kind, tmp_path):
    failed = CliRunner().invoke(app, ["bench", kind, "--device", "cpu", "--size", "32x32", "--out", str(tmp_path)])
    assert failed.exit_code == 2 and str(tmp_path) in failed.stderr and "measuring" not in failed.stderr


def test_starts_come_before_the_engine(monkeypatch):
    def opened(subject):
        raise InferixError("opened")

    started = []
    monkeypatch.setattr(bench, "cold_starts", lambda options, log: started.append(options) or {})
    monkeypatch.setattr(bench, "open_engine", opened)
    with pytest.raises(InferixError, match="opened"):
        run(Options(SMALL), lambda message: None)
    assert len(started) == 1


@pytest.mark.parametrize("part", ["time_streams", "time_controls", "long_run"])
def test_each_block_is_read_while_the_next_is_computed(part, monkeypatch):
    """No block's passes end before the block before it was read, so a clock that waits for them is detected."""
    read, in_time, last = defaultdict(threading.Event), {}, []
    denoise, next_block = BlockLoop.denoise, Pump.__next__

    def waiting(self, state, record):
        block = state.next_block
        in_time[block] = block == 0 or read[block - 1].wait(1)
        return denoise(self, state, record)

    def seen(pump):
        block = next_block(pump)
        read[block.index].set()
        last[:] = [block.index]
        return block

    monkeypatch.setattr(BlockLoop, "denoise", waiting)
    monkeypatch.setattr(Pump, "__next__", seen)
    options = Options(SMALL, blocks=2, controls=1, minutes=0.01)
    argument = (1,) if part == "time_streams" else (lambda message: None,)
    getattr(bench, part)(open_engine(SMALL), options, *argument)
    assert last[0] >= 3 and all(in_time[block] for block in range(last[0] + 2))


def test_a_control_that_fails_or_never_shows_ends_the_run(monkeypatch):
    def fails(session):
        raise UsageError("no such action")

    options = Options(SMALL, controls=1)
    monkeypatch.setattr(bench, "control_sender", lambda engine, index: fails)
    with pytest.raises(UsageError, match="no such action"):
        bench.time_controls(open_engine(SMALL), options, lambda message: None)
    monkeypatch.setattr(bench, "control_sender", lambda engine, index: lambda session: 99)
    with pytest.raises(InferixError, match=r"0 of 1 controls.* 10 blocks"):
        bench.time_controls(open_engine(SMALL), options, lambda message: None)


def test_the_times_of_a_stream_that_differs_are_discarded(monkeypatch):
    block_output = bench.block_output
    monkeypatch.setattr(bench, "block_output", lambda block: replace(block_output(block), latents=block.latents * 1.1))
    with pytest.raises(InferixError, match=r"'eager'.*latents of block"):
        run(Options(SMALL, blocks=2, starts=0), lambda message: None)


def test_an_executor_that_is_wrong_is_not_timed(monkeypatch):
    right = GraphExecutor.run_block
    monkeypatch.setattr(GraphExecutor, "run_block", lambda self, *inputs: 1.1 * right(self, *inputs))
    with pytest.raises(InferixError, match=r"'fused'.*latents of block 0"):
        run(Options(replace(SMALL, executor="fused"), starts=0, controls=0), lambda message: None)
