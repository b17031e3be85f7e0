"""A user's own form of an op: refused with the reason where it is wrong, timed and plugged in where it is right."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import inferix
from inferix.bench.compare import paired_change
from inferix.bench.kernel_cases import parse_shape, read_cases
from inferix.bench.kernels import Options, run
from inferix.bench.report import write_report
from inferix.bench.result import Series, read_result, write_result
from inferix.cli.main import app
from inferix.errors import InferixError, UsageError
from inferix.kernels import register, using
from inferix.kernels.block_attention import block_attention
from inferix.kernels.catalog import SPECS
from inferix.kernels.verify import verify

from .example_results import block_result

ATTENTION = SPECS["block_attention"]
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
PARAMETERS = ", ".join(ATTENTION.names)
RIGHT = f"""
import torch
from inferix.kernels.block_attention.reference import block_attention
calls = []

def mine({PARAMETERS}):
    if kv_scale is not None:
        raise NotImplementedError("no FP8 pages")
    calls.append(q.shape)
    block_attention({PARAMETERS})
"""
WRONG = {  # fault: what the form does before or after the right thing, and words of the reason
    "values": ("MINE; out.mul_(1.001)", "out is off by"),
    "unwritten": ("MINE; out[:, -1:] = float('nan')", "not written"),
    "beside": ("MINE; out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)", "beside out"),
    "before": ("MINE; q.as_strided((1,), (1,), q.storage_offset() - 1).fill_(0)", "beside q"),
    "reads beside": (
        "MINE; out.add_(0 * q.as_strided((1,), (1,), q.storage_offset() + q.numel()))", "out has places that are not"
    ),
    "scratch": ("MINE; out.add_(torch.empty_like(out).mul_(0))", "out has places that are not"),
    "strides": (
        "q = q.as_strided(q.shape, (q.stride(0), q.stride(0) // q.shape[1], q.shape[3], 1)); MINE",
        "strides of dims of size 1",
    ),
    "input": ("MINE; kv[0, -1].zero_()", "input kv was changed"),
    "chance": ("MINE; out.add_(torch.rand_like(out).mul_(1e-7))", "two runs"),
    "raises": ("raise KeyError('no such thing')", "KeyError: 'no such thing', at line"),
    "declines": ("raise NotImplementedError('not yet')", "not yet"),
}


@pytest.fixture(autouse=True)
def own_forms(tmp_path, monkeypatch):
    """A working folder of its own, and no form of a user's after a test."""
    monkeypatch.chdir(tmp_path)
    yield
    for spec in SPECS.values():
        spec.own_forms.clear()


def form_file(name, body):
    body = body.replace("MINE", f"block_attention({PARAMETERS})")
    text = RIGHT + f"\ndef wrong({PARAMETERS}):\n    {body}\n"
    Path(name).write_text(text, "utf-8")
    return f"{name}:wrong"


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_form_is_refused_with_the_reason(fault):
    body, words = WRONG[fault]
    result = verify(ATTENTION, form_file("wrong.py", body), torch.float32)
    assert result.refused is not None and words in result.refused
    assert fault == "declines" or result.refused.startswith(ATTENTION.test_cases[len(result.checked)].name)


def test_a_right_form_is_right_wherever_it_does_not_decline():
    Path("my.py").write_text(RIGHT, "utf-8")
    result = verify(ATTENTION, "my.py:mine", torch.float32)
    assert result.refused is None
    declined = [case.name for case in ATTENTION.test_cases if case.options.get("fp8")]
    assert list(result.declined) == declined and len(result.checked) == len(ATTENTION.test_cases) - len(declined)


def bench(*words):
    return CliRunner().invoke(app, ["bench", "kernels", "--op", "block_attention", "--device", "cpu", *words])


def test_forms_of_a_user_are_timed_beside_ours_or_refused():
    Path("my.py").write_text(RIGHT, "utf-8")
    wrong = form_file("wrong.py", WRONG["values"][0])
    done = bench("--form", "my.py:mine", "--form", wrong, "--case", "small world", "--out", "results")
    assert done.exit_code == 1
    assert "is off by" in done.stderr and wrong in done.stderr
    result = read_result("results/kernels.json")
    (row,) = result.facts["rows"]
    assert list(row["forms"]) == ["cpu", "reference", "my.py:mine", wrong, "sdpa flash"]
    assert row["forms"][wrong].keys() == {"refused"}
    form = row["forms"]["my.py:mine"]
    assert form["verdict"] in ("faster", "slower", "same", "unsure") and row["forms"]["cpu"]["verdict"] is None
    low, high = form["interval"]
    assert low <= form["of_first"] <= high
    assert form["of_roof"] == max(form["of_matmul"], form["of_copy"])
    for samples in ("", ", warm"):
        assert len(result.series[f"block_attention, small world/my.py:mine{samples}"].samples) == 11
    facts = result.facts["forms"]["my.py:mine"]
    assert facts["file"] == "my.py" and len(facts["sha256"]) == 64 and facts["refused"] is None
    keys = {*result.facts, *row, *form, *facts, "refused"}
    text = PAGE.read_text("utf-8")
    assert [key for key in keys if f"`{key}`" not in text] == []


def test_a_form_plugs_into_an_engine_and_makes_the_same_pictures():
    Path("my.py").write_text(RIGHT, "utf-8")
    prompt = "a red robot in a snowy forest by day"
    frames = {}
    for name, kernels in (("stock", {}), ("mine", {"block_attention": "my.py:mine"})):
        engine = inferix.load(device="cpu", kernels=kernels)
        with engine.open(prompt=prompt, seed=3) as session:
            frames[name] = next(session.stream(1)).frames
    assert len(sys.modules[ATTENTION.own_forms["my.py:mine"].function.__module__].calls) > 10
    assert np.abs(frames["mine"].astype(int) - frames["stock"]).max() <= 1  # levels of 255
    assert engine.describe()["config"]["kernels"] == {"block_attention": "my.py:mine"}


def test_a_registered_form_is_taken_by_name_and_its_error_names_it():
    spec = ATTENTION
    inputs = spec.make_inputs(spec.test_cases[0], torch.float32, "cpu", 0)
    given = {name: inputs[name] for name in ("q", "kv", "page_table", "page_count")}

    def double(q, kv, page_table, page_count, out, *rest):
        out.copy_(2 * q)

    with pytest.raises(UsageError, match=r"'twice'.*q_sink"):
        register("block_attention", "twice", double)

    def twice(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale, factor=2):
        out.copy_(factor * q)

    register("block_attention", "twice", twice)
    with using(block_attention="twice"):
        assert torch.equal(block_attention(**given), 2 * inputs["q"])
    register("rms_norm", "broken", lambda x, weight, out, eps: {}["key"])
    with using(rms_norm="broken"), pytest.raises(InferixError, match=r"rms_norm.*'broken'.*KeyError"):
        torch.ops.inferix.rms_norm(torch.ones(1, 8), torch.ones(8), torch.ones(1, 8), 1e-6)


@pytest.mark.parametrize(
    ("op", "name", "function", "words"),
    [
        ("atention", "mine", lambda: None, "'atention'.*block_attention"),
        ("rms_norm", "cpu", lambda x, weight, out, eps: None, "'cpu'"),
        ("rms_norm", "reference", lambda x, weight, out, eps: None, "'reference'"),
        ("rms_norm", "mine", lambda x, out, weight, eps: None, "x, out, weight, eps.*x, weight, out, eps"),
        ("rms_norm", "mine", lambda x, weight, out, eps, more: None, "more"),
        ("rms_norm", "mine", "no function", "'no function'"),
    ],
)
def test_what_cannot_be_registered_is_refused(op, name, function, words):
    with pytest.raises(UsageError, match=words):
        register(op, name, function)
    assert all(not spec.own_forms for spec in SPECS.values())


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        (None, "my.py:mine", "my.py"),
        ("x = 1", "my.py:mine", "'mine'"),
        ("mine = 3", "my.py:mine", "'mine'"),
        ("def nine(q): pass", "my.py:mine", "nine"),
        ("def mine(q): pass", "my.py:mine", "q_sink"),
        ("def mine(q):\npass", "my.py:mine", "line 2"),
        ("x = 1\nimport no_such_module_here", "my.py:mine", "no_such_module_here.*line 2"),
        ("raise SystemExit(3)", "my.py:mine", "SystemExit"),
        ("x = 1", "my.py:", "'my.py:'"),
        ("x = 1", "mine", "'mine'"),
    ],
)
def test_a_form_that_cannot_be_loaded_is_named(text, form, words):
    if text is not None:
        Path("my.py").write_text(text, "utf-8")
    done = bench("--form", form, "--case", "small world")
    assert done.exit_code == 2
    assert re.search(words, done.stderr.splitlines()[-1])
    with pytest.raises(UsageError, match=words):
        inferix.load(device="cpu", kernels={"block_attention": form})


def test_what_is_for_one_op_is_refused_for_several():
    for words in (("--form", "my.py:mine"), ("--case-file", "cases.json"), ("--shape", "dim=64")):
        done = CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", *words])
        assert done.exit_code == 2 and words[1] in done.stderr
    for words in (("--form", "my.py:mine", "--compile-only"), ("--case-file", "c.json", "--shape", "dim=64")):
        assert bench(*words).exit_code == 2
    Path("results").mkdir()
    Path("results/kernels.json").write_text("[]", "utf-8")
    done = bench("--case-file", "results/kernels.json", "--out", "results")
    assert done.exit_code == 2 and Path("results/kernels.json").read_text("utf-8") == "[]"
    with pytest.raises(UsageError, match="'fast'"):
        inferix.load(device="cpu", kernels={"rms_norm": "fast"})
    with pytest.raises(UsageError, match="'rms_morm'"):
        inferix.load(device="cpu", kernels={"rms_morm": "cpu"})
    with pytest.raises(UsageError, match=r"kernels.*3"):
        inferix.load(device="cpu", kernels={"rms_norm": 3})
    done = CliRunner().invoke(app, ["generate", "--form", "rms_norm", "--blocks", "1"])
    assert done.exit_code == 2 and "'rms_norm'" in done.stderr


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("q=100,kv=3120", {"tokens": 100, "pages": 2, "page_tokens": 1560}),
        ("kv=1000", {"pages": 1, "page_tokens": 1000}),
        ("kv=5000", {"pages": 4, "page_tokens": 1250}),
        ("kv=4999", {"pages": 1, "page_tokens": 4999}),
        ("kv=256,page_tokens=64", {"pages": 4, "page_tokens": 64}),
        ("page_tokens=64, kv=256", {"pages": 4, "page_tokens": 64}),
        ("pages=8,kv=256", {"pages": 8, "page_tokens": 32}),
        ("kv=256,page_tokens=64,pages=4", {"pages": 4, "page_tokens": 64}),
        ("heads=6", {"heads": 6, "kv_heads": 6}),
        ("kv_heads=2,heads=6", {"heads": 6, "kv_heads": 2}),
    ],
)
def test_sizes_in_any_order_fit_each_other(text, sizes):
    case = parse_shape(ATTENTION, text)
    assert {name: case[name] for name in sizes} == sizes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kv=100,page_tokens=64", "kv=100.*page_tokens=64"),
        ("kv=100,pages=3", "pages=3"),
        ("kv=100,page_tokens=10,pages=5", "pages=5"),
        ("q=10,tokens=20", "q=10.*tokens=20"),
        ("q=10,q=20", "q stands twice"),
        ("dim=0", "dim=0"),
        ("depth=3", "'depth'"),
        ("dim", "'dim'"),
        ("dim=1234567890", "1234567890"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(text, words):
    with pytest.raises(UsageError, match=words):
        parse_shape(ATTENTION, text)


def test_cases_come_from_files():
    cases = [{"name": "a", "dims": {"q": 8, "kv": 32, "heads": 2, "dim": 64}, "options": {"order": "runs"}}]
    Path("cases.json").write_text(json.dumps(cases), "utf-8")
    case = "Case('a', dict(q=8, kv=32, heads=2, dim=64), {'order': 'runs'})"
    text = f"from inferix.kernels.spec import Case\nCASES = [{case}]"
    Path("cases.py").write_text(text, "utf-8")
    first, second = (read_cases(ATTENTION, Path(name)) for name in ("cases.json", "cases.py"))
    assert asdict(first[0]) == asdict(second[0])
    assert (first[0]["tokens"], first[0]["page_tokens"], first[0].options) == (8, 32, {"order": "runs"})
    options = Options(("block_attention",), dtype=torch.float32, case_file=Path("cases.json"))
    result = run(options, lambda line: None)
    assert [row["case"] for row in result.facts["rows"]] == ["a"] and result.settings["case_file"] == "cases.json"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cases": []}, "list"),
        ([], "list"),
        ([3], "case 1.*3"),
        ([{"dims": {}}], "name"),
        ([{"name": "a", "size": {}}], "'size'"),
        ([{"name": "a", "dims": {"depth": 3}}], "'depth'"),
        ([{"name": "a", "dims": {"dim": 1.5}}], "dim is 1.5"),
        ([{"name": "a", "dims": {"dim": True}}], "dim is True"),
        ([{"name": "a", "options": {"sink": 1}}], "'sink'.*sinks"),
        ([{"name": "a", "options": []}], "objects"),
        ([{"name": "a"}, {"name": "a"}], "'a' stands 2"),
    ],
)
def test_a_bad_case_file_is_refused_with_the_entry(content, words):
    Path("cases.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UsageError, match=words):
        read_cases(ATTENTION, Path("cases.json"))
    Path("cases.py").write_text(f"CASES = {content!r}", "utf-8")
    with pytest.raises(UsageError, match=words):
        read_cases(ATTENTION, Path("cases.py"))


def test_verdicts_of_pairs_see_through_a_drift_that_both_share():
    drift = [1 + turn / 3 for turn in range(20)]
    first = Series("s", tuple(drift))

    def verdict(factor, noise=0.0):
        jitter = [1 + noise * (-1) ** turn for turn in range(20)]
        samples = tuple(factor * one * more for one, more in zip(drift, jitter, strict=True))
        return paired_change("x", first, Series("s", samples)).verdict

    assert (verdict(0.9), verdict(1.1), verdict(1.01)) == ("faster", "slower", "same")
    assert verdict(1.0, noise=0.3) == "unsure"
    assert paired_change("x", Series("s", (1.0, 2.0)), Series("s", (1.0, 2.0))).verdict == "few"
    with pytest.raises(ValueError, match="2 and 1 samples"):
        paired_change("x", Series("s", (1.0, 2.0)), Series("s", (1.0,)))


def test_a_folder_of_results_has_a_leaderboard(tmp_path):
    def form(seconds):
        shares = {"tflops": 1.0, "of_matmul": 0.1, "of_copy": 0.2, "of_roof": 0.2}
        beside = {"verdict": "slower", "interval": [1, 2], "of_first": 1}
        return {"seconds": seconds, "warm_seconds": seconds} | beside | shares

    def row(**forms):
        case = {"op": "rms_norm", "case": "wide", "dims": {"rows": 3}, "options": {}, "dtype": "float32"}
        return case | {"forms": forms}

    for name, rows in (
        ("one", [row(ours=form(2e-6), mine=form(4e-6), bad={"refused": "wrong"})]),
        ("two", [row(ours=form(3e-6), theirs=form(1e-6))]),
    ):
        result = replace(block_result({}), kind="kernels", facts={"rows": rows, "forms": {}})
        write_result(result, tmp_path / "results" / f"{name}.json")
    write_report(tmp_path / "results", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text("utf-8")
    board = text[text.index("## Leaderboard") : text.index("## On a CPU")]
    places = re.findall(r"^\| (\d+) \| (\w+) \| (\S+) \|.*`(\w+)\.json`", board, re.MULTILINE)
    assert places == [("1", "theirs", "1", "two"), ("2", "ours", "2", "one"), ("3", "mine", "4", "one")]


@pytest.mark.parametrize("blocks", ["sample", pytest.param("all", marks=pytest.mark.slow)])
def test_the_page_about_kernels_runs(tmp_path, blocks):
    """All of it, or its kernel alone, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("kernels_page.py")), str(PAGE), blocks]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{PAGE.read_text('utf-8').count('```') // 2} blocks" in done.stdout
    if blocks == "sample":
        assert "checked=('tails everywhere', 'unequal rows, sink in a run'), declined={}, refused=None" in done.stdout
        return
    result = read_result(tmp_path / "results" / "mine" / "kernels.json")
    facts = result.facts["forms"]["my_kernel.py:my_attention"]
    assert facts["refused"] is None and len(facts["checked"]) == 5 and len(facts["declined"]) == 2
    assert "seconds" in result.facts["rows"][0]["forms"]["my_kernel.py:my_attention"]
