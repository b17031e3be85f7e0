"""The compile gate and the microbenchmark: they see what is wrong, and refuse to time it."""

import json
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

from inferix.bench import kernels, rivals
from inferix.bench.compile_gate import SHARED_LIMIT, TABLE, compile_all, not_inspected, problems
from inferix.bench.kernels import Wanted, copied, forms, mismatch, parse_shape, run, run_case
from inferix.bench.result import read_result
from inferix.bench.rivals import bound
from inferix.bench.tune import keep, tune, tune_here
from inferix.cli.main import app
from inferix.errors import UsageError
from inferix.kernels import tuning
from inferix.kernels.catalog import SPECS
from inferix.kernels.spec import ARCHITECTURES, Implementation

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
            if hasattr(form.module(), "compile_cases"):
                label = spec.name if form.name == "triton" else f"{spec.name} by {form.name}"
                for capability in form.architectures:
                    assert any(name.startswith(f"{label}, ") and name.endswith(f"sm_{capability}") for name in found)


def test_the_gate_rejects_what_does_not_fit_or_spills_or_misses_the_matrix_units():
    held = json.loads(TABLE.read_text("utf-8"))
    name = "block_attention, plain bf16 d128, sm_90"
    good = held[name]
    assert problems({name: good}) == []
    for change, said in (
        ({"shared": (SHARED_LIMIT[90] + 1) * 1024}, "228 KiB of shared memory"),
        ({"stack": 16}, "16 bytes on the stack"),
        ({"matrix": 0}, "no HGMMA|QGMMA|IGMMA instruction"),
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

    others = {"wrong": bound(wrong), "broken": bound(broken)}
    monkeypatch.setattr(kernels, "forms", lambda *args: others | forms(*args))
    ceilings = {"copy_bytes": 1.0, "matmul_flops": 1.0}
    row = run_case(spec, spec.bench_cases[-1], SMALL, ceilings)
    assert row["forms"]["wrong"]["refused"].startswith("out is off by")
    assert row["forms"]["broken"] == {"refused": "cannot run: no kernel image is available"}
    assert row["forms"]["reference"]["of_first"] == 1
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


def test_code_on_a_gpu_that_was_not_inspected_is_told():
    held = json.loads(TABLE.read_text("utf-8"))
    name = "block_attention, plain bf16 d128, sm_90"
    assert not_inspected({name: held[name]["sha256"]}, held) == []
    wrong = not_inspected({name: "0" * 64, "block_attention, plain bf16 d128, sm_103": "1" * 64}, held)
    assert wrong == [
        f"{name}: other code than was inspected", "block_attention, plain bf16 d128, sm_103: not in the table"
    ]  # fmt: skip


def attention_case(name):
    spec = SPECS["block_attention"]
    (case,) = (case for case in spec.test_cases if case.name == name)
    inputs = spec.make_inputs(case, torch.float32, "cpu", 0)
    expected = copied(inputs)
    spec.reference(**expected)
    return spec, inputs, expected


@pytest.mark.parametrize("name", ["runs, grouped heads", "fp8 pages"])
def test_pages_in_order_are_the_same_case(name):
    spec, inputs, expected = attention_case(name)
    prepare = rivals.in_order(bound(spec.reference))
    assert mismatch(spec, prepare, inputs, expected, torch.float32) is None


def test_other_attentions_get_the_same_tokens(monkeypatch):
    """torch's own as they are; FlexAttention not compiled; the packages by stand-ins, which show the layout only."""
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    spec, inputs, expected = attention_case("runs, grouped heads")  # rows of unequal length
    assert mismatch(spec, rivals.flex(), inputs, expected, torch.float32) is None
    assert "sdpa cudnn" not in rivals.attention_baselines(inputs, {"triton": bound(spec.reference)})
    spec, inputs, expected = attention_case("one page, one tile")
    assert mismatch(spec, rivals.sdpa(SDPBackend.MATH), inputs, expected, torch.float32) is None

    def flash(q, k, v):
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def sage(q, k, v, tensor_layout):
        assert tensor_layout == "HND"
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    packages = {"flash_attn": SimpleNamespace(flash_attn_func=flash), "sageattention": SimpleNamespace(sageattn=sage)}
    monkeypatch.setattr(rivals, "import_module", packages.__getitem__)
    monkeypatch.setattr(rivals, "find_spec", packages.get)
    found = rivals.attention_baselines(inputs, {"triton": bound(spec.reference)})
    assert found.keys() == {
        "flex", "sdpa cudnn", "sdpa flash", "sdpa efficient", "flash-attn", "sageattention"
    }  # fmt: skip
    for name in ("flash-attn", "sageattention"):
        assert mismatch(spec, found[name], inputs, expected, torch.float32) is None
    inputs["out"] = inputs["out"].half()
    assert "off by" in mismatch(spec, bound(lambda **all: all["out"].zero_()), inputs, expected, torch.float32)


def test_what_stands_beside_a_kernel_on_a_gpu(monkeypatch):
    """By name: nothing runs. The forms that the card has come first, since ratios are to the first."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def names(op, case):
        spec = SPECS[op]
        inputs = spec.make_inputs(spec.test_cases[case], torch.bfloat16, "cpu", 0)
        return list(forms(spec, inputs, Wanted(device="cuda")))

    assert names("block_attention", 0)[:4] == ["triton", "descriptors", "flex", "sdpa cudnn"]
    assert names("block_attention", 2)[:4] == ["triton", "descriptors", "triton, in order", "descriptors, in order"]
    assert names("linear_lowp", 0) == ["scaled_mm", "triton", "torch", "torch.compile"]
    assert names("linear_lowp", 3) == ["triton", "torch", "torch.compile"]
    assert names("adaln", 0) == ["triton", "torch", "torch.compile"]


@dataclass(frozen=True)
class FakeConfig:
    speed: int


@pytest.fixture
def tuned_op(monkeypatch):
    """rms_silu with two forms that are its reference, one wrong in one config; how fast they are is made up."""
    spec = SPECS["rms_silu"]
    module = ModuleType("made_up_forms")

    def first(x, gamma, out, config=FakeConfig(1)):
        spec.reference(x, gamma, out)
        if config.speed == 9:
            out *= 2

    def second(x, gamma, out, config=FakeConfig(1)):
        spec.reference(x, gamma, out)

    module.Config, module.first, module.second = FakeConfig, first, second
    module.candidates = lambda capability: [FakeConfig(1), FakeConfig(3), FakeConfig(9)]
    monkeypatch.setitem(sys.modules, "made_up_forms", module)
    both = tuple(Implementation(name, f"made_up_forms:{name}", (90,), (torch.float32,)) for name in ("first", "second"))
    cases = tuple(replace(case, dims={"pixels": 8, "channels": channels})
                  for case, channels in zip(spec.bench_cases, (16, 16, 24), strict=True))  # fmt: skip

    def clock(prepare, inputs, wanted):
        call = prepare(inputs)
        call()
        config, name = call.keywords.get("config", FakeConfig(1)), call.func.__name__
        wide = inputs["x"].shape[1] == 24
        return [1.0 if wide else {"first": 1.0, "second": 0.9}[name] / config.speed]

    return replace(spec, implementations=both, bench_cases=cases), clock


def test_tuning_keeps_what_is_right_and_wins_by_a_margin(tuned_op, tmp_path):
    spec, clock = tuned_op
    said = []
    wanted = Wanted(dtype=torch.float32)
    found = tune(spec, wanted, 90, said.append, clock)
    assert found == {"float32 16": {"form": "second", "config": {"speed": 9}, "share": 0.1}}
    assert "5 candidates; 1 are wrong" in said[0]
    assert tune(replace(spec, implementations=spec.implementations[:1]), wanted, 90, said.append, clock) == {
        "float32 16": {"form": "first", "config": {"speed": 3}, "share": 0.3333}
    }
    assert tune(spec, wanted, 80, said.append, clock) == {}  # no form is declared there
    table = {"schema": 1, "op": spec.name, "card": "Test Card", "choices": found}
    path = keep(table, tmp_path / "tuned" / "card.json")
    chosen = tuning.read(spec, json.loads(path.read_text("utf-8")), 90)["float32 16"]
    assert (chosen.func.__name__, chosen.keywords) == ("second", {"config": FakeConfig(9)})
    assert [file.name for file in path.parent.iterdir()] == ["card.json"]


def test_tuning_needs_a_gpu_and_whole_ops():
    with pytest.raises(UsageError, match="--tune times kernels on a GPU"):
        tune_here(SMALL, lambda said: None)
    with pytest.raises(UsageError, match="leave --case and --shape out"):
        tune_here(replace(SMALL, device="cuda"), lambda said: None)
    for options, said in (
        (("--tune", "--device", "cpu"), "--tune times kernels on a GPU"),
        (("--tune", "--compile-only"), "give one of"),
        (("--compile-only", "--case", "small world"), "leave out --case"),
        (("--compile-only", "--op", "adalm"), "no op 'adalm'; did you mean 'adaln'?"),
    ):
        done = CliRunner().invoke(app, ["bench", "kernels", *options])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_the_help_of_the_command_names_what_it_compares_and_keeps():
    text = " ".join(CliRunner().invoke(app, ["bench", "kernels", "--help"]).output.split())
    for said in ("on a CPU the references are timed", "flash-attn", "kernels/OP/tuned/CARD.json", "--compile-only"):
        assert said in text
