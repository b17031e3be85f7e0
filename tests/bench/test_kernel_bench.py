"""The compile gate and the microbenchmark: they see what is wrong, and refuse to time it."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from inferix.bench import kernels
from inferix.bench.compile_gate import SHARED_LIMIT, TABLE, compile_all, problems
from inferix.bench.kernels import Wanted, forms, parse_shape, run, run_case
from inferix.bench.result import read_result
from inferix.cli.main import app
from inferix.errors import UsageError
from inferix.kernels.catalog import SPECS
from inferix.kernels.spec import ARCHITECTURES

SMALL = Wanted(ops=("block_attention",), cases=("small world",), dtype=torch.float32)


def test_kernels_compile_for_every_architecture_as_the_table_says():
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    found = compile_all()
    assert problems(found) == []
    held = json.loads(TABLE.read_text("utf-8"))
    changed = {name for name in found.keys() | held.keys() if found.get(name) != held.get(name)}
    assert not changed, f"write the table anew (inferix bench kernels --compile-only --json): {sorted(changed)}"
    for spec in SPECS.values():
        for form in spec.implementations:
            for capability in form.architectures:
                assert any(name.startswith(spec.name) and name.endswith(f"sm_{capability}") for name in found)


def test_the_gate_rejects_what_does_not_fit_or_spills_or_misses_the_matrix_units():
    held = json.loads(TABLE.read_text("utf-8"))
    name = "block_attention, plain bf16 d128, sm_90"
    good = held[name]
    assert problems({name: good}) == []
    for change, said in (
        ({"shared": (SHARED_LIMIT[90] + 1) * 1024}, "228 KiB of shared memory"),
        ({"stack": 16}, "16 bytes on the stack"),
        ({"matrix": 0}, "no HGMMA instruction"),
        ({"tf32": True}, "run as TF32"),
    ):
        (wrong,) = problems({name: good | change})
        assert said in wrong
    assert {row["architecture"] for row in held.values()} == set(ARCHITECTURES)


def test_a_small_case_runs_on_a_cpu_and_says_what_it_was():
    result = run(SMALL, lambda said: None)
    (row,) = result.facts["rows"]
    assert not result.on_gpu
    assert row["forms"].keys() == {"reference"}
    form = row["forms"]["reference"]
    assert form["seconds"] > 0
    assert form["tflops"] * 1e12 == pytest.approx(row["flops"] / form["seconds"])
    assert row["flops"] == 4 * 64 * 640 * 4 * 64


def test_a_form_that_is_wrong_is_refused_and_not_timed(monkeypatch):
    spec = SPECS["block_attention"]

    def wrong(**inputs):
        spec.reference(**inputs)
        inputs["out"] *= 1.1

    def broken(**inputs):
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(kernels, "forms", lambda *args: {"wrong": wrong, "broken": broken} | forms(*args))
    ceilings = {"copy_bytes": 1.0, "matmul_flops": 1.0}
    row = run_case(spec, spec.bench_cases[-1], SMALL, ceilings)
    assert row["forms"]["wrong"]["refused"].startswith("out is off by")
    assert row["forms"]["broken"] == {"refused": "cannot run: no kernel image is available"}
    assert "seconds" in row["forms"]["reference"]
    assert "refused" in kernels.summary(row)


def test_shapes_of_ones_own():
    case = parse_shape(SPECS["block_attention"], "q=100,kv=3120,heads=4,dim=64")
    assert (case["tokens"], case["pages"], case["kv_heads"], case["dim"]) == (100, 2, 4, 64)
    for text, said in (("kv=100", "no multiple of page_tokens"), ("depth=3", "no size 'depth'"), ("dim", "no size")):
        with pytest.raises(UsageError, match=said):
            parse_shape(SPECS["block_attention"], text)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (replace(SMALL, ops=("atention",)), "no op 'atention'"),
        (replace(SMALL, cases=("smal world",)), "no case 'smal world'"),
        (replace(SMALL, ops=(), shape="dim=64"), "belongs to one op"),
    ],
)
def test_names_that_are_not_there(wanted, said):
    with pytest.raises(UsageError, match=said):
        run(wanted, lambda told: None)


def test_the_command_writes_json_and_a_picture(tmp_path):
    done = CliRunner().invoke(
        app, ["bench", "kernels", "--op", "block_attention", "--case", "small world", "--dtype", "float32",
              "--device", "cpu", "--out", str(tmp_path), "--json"]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["facts"]["rows"][0]["case"] == "small world"
    assert len(read_result(tmp_path / "kernels.json").series["block_attention, small world/reference"].samples) > 3
    assert (tmp_path / "kernels.png").stat().st_size > 1000
