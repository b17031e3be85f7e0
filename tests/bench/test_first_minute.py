"""The first minute: it runs end to end on a CPU, a line that breaks costs no other, and results have a commit."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from inferix.bench import first_minute, machine
from inferix.bench.first_minute import LINES, Run, run_lines, unproved
from inferix.bench.form_check import unproved_forms
from inferix.bench.subject import Subject


def tiny() -> Run:
    return Run(Subject("wan-tiny", "self-forcing", random_weights=True, device="cpu", executor="fused"), "cpu")


def test_a_line_that_breaks_is_written_down_and_the_next_runs(tmp_path, monkeypatch):
    run, file, seen = tiny(), tmp_path / "minute.json", []
    monkeypatch.setattr(Run, "dims", {})

    def broken(run):
        raise AttributeError("no such form\nmore")

    def later(run):
        seen.extend(json.loads(file.read_text("utf-8"))["lines"])  # the file is there before the next line begins
        return {"ms": 1.5}

    assert not run_lines(run, file, {"first": (broken, 1), "second": (later, 2)})
    lines = json.loads(file.read_text("utf-8"))["lines"]
    assert lines["first"]["error"] == "AttributeError: no such form"
    assert lines["second"]["values"] == {"ms": 1.5}
    assert seen == ["first"]


def test_lines_state_the_time_they_should_take():
    assert sum(seconds for _, seconds in LINES.values()) <= 120


def test_a_form_that_no_card_has_run_costs_no_other_line(monkeypatch):
    def hangs(command, timeout, **options):
        assert command[1:4] == ["-m", "inferix.bench.form_check", "block_attention"]
        raise subprocess.TimeoutExpired(command, timeout)

    def fails(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: an illegal memory access\n")

    def ends(command, **options):
        facts = {"checked": 3, "wrong": {"a case": "out is off by 1"}, "ms": {"full window": 1.5}}
        return subprocess.CompletedProcess(command, 0, "a warning\n" + json.dumps(facts) + "\n", "")

    run = replace(tiny(), device="cuda")
    monkeypatch.setattr(first_minute, "architecture", lambda device: 90)
    monkeypatch.setattr(subprocess, "run", hangs)
    assert "no end within 120 s" in unproved(run)["block_attention, hopper"]
    monkeypatch.setattr(subprocess, "run", fails)
    assert "illegal memory access" in unproved(run)["block_attention, hopper"]
    monkeypatch.setattr(subprocess, "run", ends)
    forms = [f"{spec.name}, {form.name}" for spec, form in unproved_forms()]
    assert "block_attention, hopper" in forms
    ended = {"": "2 of 3 cases are right", ", full window": 1.5, ", a case": "out is off by 1"}
    assert unproved(run) == {f"{form}{end}": value for form in forms for end, value in ended.items()}
    assert unproved(tiny())["block_attention, hopper"] == "is for sm_90" and unproved(tiny()).keys() == set(forms)


def test_only_what_is_right_is_timed(monkeypatch):
    run, right = tiny(), torch.randn(3, 4)
    monkeypatch.setattr(Run, "engine", SimpleNamespace(dtype=torch.bfloat16))
    assert isinstance(run.timed(lambda: None, lambda: right, right), float)
    assert "off by" in run.timed(lambda: None, lambda: right.flip(0), right)
    assert run.timed(lambda: None, lambda: right * torch.nan, right) == "off by nan, allowed 4.0e-02"
    assert first_minute.captured(run) == {"captured": "needs a GPU"}


@pytest.mark.slow
def test_the_first_minute_runs_end_to_end_on_a_cpu(tmp_path):
    file = tmp_path / "minute.json"
    run_lines(tiny(), file, LINES)
    facts = json.loads(file.read_text("utf-8"))
    errors = {name: line["error"] for name, line in facts["lines"].items() if "error" in line}
    assert errors.keys() <= {"fp8"}  # which CPUs without FP8 products refuse
    assert facts["lines"]["graph"]["values"]["fused off by"] < 0.04


def test_results_have_a_commit_without_a_repository(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "machine.py").write_text("x = 1\n", "utf-8")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "bench" / "machine.py"))
    monkeypatch.delenv("INFERIX_COMMIT", raising=False)
    before = machine.commit()
    assert before == f"sources {machine.digest_of_sources(tmp_path)}"
    (tmp_path / "bench" / "machine.py").write_text("x = 2\n", "utf-8")
    assert machine.commit() != before
    monkeypatch.setenv("INFERIX_COMMIT", "abc123")
    assert machine.commit() == "abc123"
