"""Stages of the GPU check resume where they were stopped; tested without running their units."""

import subprocess

import pytest
from recording import FakeGraphs
from typer.testing import CliRunner

from inferix.bench import gpu_check, report
from inferix.bench.gpu_check import STAGES, Place, check_captures, room_for_two, run_stage
from inferix.bench.result import read_failures, read_folder, write_result
from inferix.bench.subject import Subject, open_engine, random_prompt, with_executor
from inferix.bench.work import blocks_until_full
from inferix.errors import InferixError, UsageError
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor

from .example_results import block_result

UNITS = list(STAGES["block"])


def test_a_stage_resumes_where_it_was_stopped(tmp_path):
    place, ran = Place(tmp_path), []

    def begin(unit, seconds):
        ran.append(unit)
        if len(ran) == 3:
            raise subprocess.TimeoutExpired("unit", seconds)
        if unit == UNITS[1]:
            return "it is wrong"
        place.file(unit).write_text("{}")
        return None

    assert run_stage("block", place, begin, 100) == UNITS[2:]  # the third timed out: it remains, and has not failed
    assert place.failure(UNITS[1]).read_text() == "it is wrong\n"
    assert run_stage("block", place, begin, 0) == UNITS[2:]
    assert run_stage("block", place, begin, 100) == []
    assert ran == [*UNITS[:3], *UNITS[2:]]


def test_a_unit_that_takes_the_whole_budget_has_failed(tmp_path):
    def begin(unit, seconds):
        raise subprocess.TimeoutExpired("unit", seconds)

    assert run_stage("block", Place(tmp_path), begin, 7) == UNITS[1:]
    assert "7 s" in Place(tmp_path).failure(UNITS[0]).read_text()


def test_a_report_skips_files_without_measurements(tmp_path):
    (tmp_path / "tests").mkdir()
    gpu_check.write_check(tmp_path / "tests" / "adaln.json", {"checked": 3, "wrong": {}})
    with pytest.raises(UsageError, match="inferix bench block --out"):
        read_folder(tmp_path)
    write_result(block_result({"eager/block": [0.2]}), tmp_path / "block.json")
    assert list(read_folder(tmp_path)) == ["block.json"]


def test_a_report_lists_failed_units(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    write_result(block_result({"eager/block": [0.2]}), tmp_path / "block" / "krea.json")
    place = Place(tmp_path / "block")
    gpu_check.write_text(place.failure("longlive"), "Traceback:\n  raise\nInferixError: no | kernel for it\n")
    report.write_report(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text().partition("## On a CPU")[0]
    assert "| `block/longlive.failed.txt` | InferixError: no \\| kernel for it |" in text
    place.failure("longlive").unlink()
    assert read_failures(tmp_path) == {}


@pytest.mark.skipif(gpu_check.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(InferixError, match="GPU"):
        gpu_check.main("block", tmp_path)
    with pytest.raises(UsageError, match=r"'blok'.*'block'"):
        gpu_check.main("blok", tmp_path)
    with pytest.raises(UsageError, match=r"'kreaa'.*'krea'"):
        gpu_check.main("block", tmp_path, unit="kreaa")


def test_its_help_says_how_to_run_a_failed_unit_again():
    app = gpu_check.typer.Typer()
    app.command()(gpu_check.main)
    assert "UNIT.failed.txt" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("self-forcing", {"local_attn_size": 6, "kv_dtype": "fp8"}),
        ("longlive", {"local_attn_size": 9}),
        pytest.param("krea", {}, marks=pytest.mark.slow),
        pytest.param("causvid", {"segment_frames": 6}, marks=pytest.mark.slow),
    ],
)
def test_a_good_executor_passes_the_graph_check(preset, settings, monkeypatch):
    """With fake CUDA graphs; an executor that captures again for each session does not pass."""
    subject = Subject("wan-tiny", preset, size=(32, 32), device="cpu", executor="fused", overrides=settings)
    engine = open_engine(subject)
    full, backend = blocks_until_full(engine.preset), FakeGraphs(idle=True)

    def launches(stream, device):
        before = backend.replays
        stream.step(decode=False)
        return {"graphs": backend.replays - before, "kernels": 0}

    monkeypatch.setattr(gpu_check, "launches_of", launches)
    for room, faults in ((room_for_two(engine, subject), 0), (None, 1)):
        twin = with_executor(engine, "fused", kv_memory=room)
        executor = GraphExecutor(twin.config, twin.preset, twin.parts, backend)
        twin = Engine(twin.config, twin.preset, twin.parts, executor=executor)
        facts, wrong = check_captures(twin, random_prompt(twin, 0), subject, full)
        assert len(wrong) == faults and facts["captures"] > 0 and bool(facts["captures later"]) == bool(faults)
