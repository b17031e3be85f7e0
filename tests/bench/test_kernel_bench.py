"""The compile gate and the microbenchmark: they see what is wrong, and refuse to time it."""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

import inferix
from inferix.bench import compile_gate, gpu_check, kernels, rivals
from inferix.bench import tune as tuner
from inferix.bench.compile_gate import (
    HASHES,
    ROLES,
    SHARED_LIMIT,
    TABLES,
    cases_for,
    compile_all,
    differences,
    op_of,
    problems,
    read_table,
    reproducible_rows,
    sample,
    table_file,
    triton_version,
    write_table,
)
from inferix.bench.kernels import Options, chosen_cases, clone_inputs, forms, mismatch, run, run_case
from inferix.bench.result import read_result
from inferix.bench.rivals import bound
from inferix.bench.sass import Instruction, loops_of, touched_in_flight
from inferix.bench.tune import tune, tune_here
from inferix.cli.main import app
from inferix.errors import InferixError, UsageError
from inferix.kernels import tuning
from inferix.kernels.catalog import SPECS
from inferix.kernels.spec import ARCHITECTURES, Implementation

SMALL = Options(ops=("block_attention",), cases=("small world",), dtype=torch.float32)
TABLED = sorted(file.stem.removeprefix("triton-") for file in TABLES.glob("triton-*.json"))
OLDEST = "3.6.0"  # of the Triton versions with a table
ROW = "block_attention, plain bf16 d128, sm_90"


def all_rows():
    return [name for capability in ARCHITECTURES for name, _, _ in cases_for(capability)]


@pytest.mark.parametrize("choose", [sample, pytest.param(list, id="all", marks=pytest.mark.slow)])
def test_kernels_compile_as_the_table_says(choose, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    names = choose(all_rows())
    compiled = compile_all(cache=tmp_path, names=names)
    assert compiled.keys() == set(names)
    assert problems(compiled) == []
    try:
        table = read_table(triton_version())
    except UsageError as error:
        pytest.skip(f"every kernel keeps the rules, but {error}")
    known = {name: row for name, row in table.items() if name in compiled}
    assert differences(compiled, known) == [], "if it is meant: python -m inferix.bench.compile_gate write"


@pytest.mark.parametrize("version", TABLED)
def test_a_kernel_whose_warps_have_roles_has_two_products_in_flight(version):
    rows = {name: row for name, row in read_table(version).items() if " by hopper, " in name}
    assert rows
    for name, row in rows.items():
        assert row["loops"] == [ROLES] * 2  # of each consumer
        assert row["copies"] >= 2 * 4  # two instructions for a tile of q, k or v
        alone = {"loops": [ROLES.replace("PV", "wait 0, PV"), ROLES]}
        for wrong in ({"loops": []}, {"copies": 0}, {"touched": 1}, alone):
            (fault,) = problems({name: row | wrong})
            assert fault.startswith(name)


def test_the_steps_of_a_loop_are_read_from_machine_code():
    lines = (
        "MOV R1, R2", "HGMMA.64x128x16 R24, gdesc[UR4], R24", "HGMMA.64x128x16 R24, gdesc[UR8], R24",
        "HGMMA.64x128x16 R88, R152, gdesc[UR12].tnspB, R88", "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "BAR.SYNC.DEFER_BLOCKING 0x1", "STL [R1], R0", "BRA 0x10", "BRA 0x0",
    )  # fmt: skip
    code = [Instruction(16 * at, *line.split(" ", 1)) for at, line in enumerate(lines)]
    assert loops_of(code) == [["QK", "PV", "wait 1", "CTA barrier", "spill"]]
    assert loops_of([*code[:8], Instruction(128, "BRA", "`(.L_x_1)")]) == []


def test_registers_of_a_product_in_flight_are_left_alone():
    product, wait = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"

    def touched(*lines):
        return touched_in_flight([Instruction(16 * at, *line.split(" ", 1)) for at, line in enumerate(lines)])

    assert touched("FMUL R88, R88, R2", product, "FADD R2, R152, R3", wait, "FMUL R88, R88, R2", "MOV R152, R1") == []
    wrong = "FMUL R151, R1, R2", "FADD R2, R90, R3", "MOV R155, R1"
    assert touched(product, *wrong, "MOV R156, R1", wait) == [16, 32, 48]


def test_every_call_has_a_row_and_every_form_its_architectures():
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    names = set(all_rows())
    assert names == read_table(OLDEST).keys()
    for spec in SPECS.values():
        for form in spec.implementations:
            if hasattr(form.module(), "compile_cases"):
                label = spec.name if form.name == "triton" else f"{spec.name} by {form.name}"
                for capability in form.architectures:
                    assert any(name.startswith(f"{label}, ") and name.endswith(f"sm_{capability}") for name in names)


def test_a_sample_has_every_variant_and_two_architectures_of_a_form():
    names = [f"{form}, {variant}, sm_{number}" for form, variant, numbers in (
        ("a", "x d64", (80, 90)), ("a", "x d128", (80, 90)), ("a", "y", (80, 90, 100)),
        ("a by b", "x", (90,)), ("c", "x", (80, 90, 100)),
    ) for number in numbers]  # fmt: skip
    assert sample(names) == [
        "a, x d64, sm_80", "a, y, sm_90", "a by b, x, sm_90", "c, x, sm_100", "c, x, sm_80",
    ]  # fmt: skip
    rows = sample(all_rows())
    assert {name.rpartition(", sm_")[2] for name in rows} == {str(number) for number in ARCHITECTURES}
    assert len(rows) == len(set(rows)) < 80


@pytest.mark.parametrize("version", TABLED)
def test_every_table_keeps_the_rules_and_has_every_architecture(version):
    table = read_table(version)
    assert problems(table) == []
    assert table.keys() == read_table(OLDEST).keys()
    assert {row["architecture"] for row in table.values()} == set(ARCHITECTURES)
    assert {row["hash_of"] for row in table.values()} <= set(HASHES)


def test_the_ends_of_the_range_of_triton_versions_have_tables():
    if not (SETUP := Path(inferix.__file__).with_name("setup.py")).is_file():
        pytest.skip("an installed package has no setup.py")
    lowest, below = re.search(r"triton>=(\d+)\.(\d+),<\d+\.(\d+)", SETUP.read_text("utf-8")).groups()[1:]
    minors = {int(version.split(".")[1]) for version in TABLED}
    assert (min(minors), max(minors)) == (int(lowest), int(below) - 1)


def test_a_triton_version_without_a_table_is_refused_by_name():
    with pytest.raises(UsageError) as caught:
        read_table("3.0.7")
    assert "3.0.7" in str(caught.value)
    assert OLDEST in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shared": (SHARED_LIMIT[90] + 1) * 1024}, "228 KiB"),
        ({"stack": 16}, "16 bytes"),
        ({"matrix": 0}, "HGMMA"),
        ({"tf32": True}, "TF32"),
    ],
)
def test_the_gate_rejects_what_does_not_fit_or_spills_or_uses_no_tensor_core(change, word):
    good = read_table(OLDEST)[ROW]
    assert problems({ROW: good}) == []
    (wrong,) = problems({ROW: good | change})
    assert wrong.startswith(f"{ROW}: ")
    assert word in wrong


@pytest.mark.parametrize("op", ["block_attention", "linear_lowp"])
@pytest.mark.parametrize("version", TABLED)
def test_the_gate_rejects_any_row_that_ought_to_use_tensor_cores_and_does_not(version, op):
    rows = {name: row | {"matrix": 0} for name, row in read_table(version).items() if op_of(name) == op}
    assert {wrong.partition(": ")[0] for wrong in problems(rows)} == rows.keys() != set()


def compiled_as(table):
    """Rows as a compile gives them that agrees with a table."""
    hashes = {kind: "0" * 64 for kind in HASHES}
    return {
        name: {key: value for key, value in row.items() if key != "hash_of"}
        | {"sha256": hashes | {row["hash_of"]: row["sha256"]}}
        for name, row in table.items()
    }


@pytest.mark.parametrize("kind", HASHES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("registers", 999), ("stack", 8), ("shared", 1), ("warps", 5), ("instructions", 1), ("local", 1), ("matrix", 1)],
)
def test_a_row_that_differs_from_the_table_is_rejected(kind, key, value):
    table = read_table(OLDEST)
    name = next(name for name, row in table.items() if row["hash_of"] == kind)
    compiled = compiled_as(table)
    assert differences(compiled, table) == []
    compiled[name][key] = value
    (wrong,) = differences(compiled, table)
    assert wrong.startswith(f"{name}: {key} is {value};")


@pytest.mark.parametrize("kind", HASHES)
def test_another_hash_is_rejected_where_it_is_the_one_in_the_table(kind):
    table = read_table(OLDEST)
    name = next(name for name, row in table.items() if row["hash_of"] == kind)
    compiled = compiled_as(table)
    compiled[name]["sha256"] |= {other: "f" * 64 for other in HASHES if other != kind}
    assert differences(compiled, table) == []
    compiled[name]["sha256"][kind] = "e" * 64
    (wrong,) = differences(compiled, table)
    assert wrong.startswith(f"{name}: sha256 of the {kind} is {'e' * 64}")


def test_a_row_missing_on_either_side_is_rejected():
    table = read_table(OLDEST)
    compiled = compiled_as(table)
    row = compiled.pop(ROW)
    assert differences(compiled, table) == [f"{ROW}: in the table, but not compiled"]
    compiled = compiled_as(table) | {"new, sm_90": row}
    assert differences(compiled, table) == ["new, sm_90: not in the table"]


def test_a_table_is_written_from_what_every_compile_gives():
    def row(cubin, ptx, registers=40):
        return {"op, sm_90": {"registers": registers, "sha256": {"cubin": cubin, "ptx": ptx}}}

    assert reproducible_rows([row("a", "b"), row("a", "b")])["op, sm_90"]["hash_of"] == "cubin"
    assert reproducible_rows([row("a", "b"), row("c", "b")])["op, sm_90"] == {
        "registers": 40, "hash_of": "ptx", "sha256": "b"
    }  # fmt: skip
    with pytest.raises(InferixError, match=r"sm_90.*cubin.*ptx"):
        reproducible_rows([row("a", "b"), row("c", "d")])
    with pytest.raises(InferixError, match="op, sm_90: registers"):
        reproducible_rows([row("a", "b"), row("a", "b", 41)])


def test_rows_of_some_ops_are_written_beside_the_others(monkeypatch, tmp_path):
    table = read_table(OLDEST)
    old = {name: row | {"registers": 1} for name, row in table.items()} | {"adaln, gone, sm_90": table[ROW]}
    monkeypatch.setattr(compile_gate, "TABLES", tmp_path)
    monkeypatch.setattr(compile_gate, "triton_version", lambda: OLDEST)
    monkeypatch.setattr(
        compile_gate,
        "compile_all",
        lambda ops, cache, names: {name: row for name, row in compiled_as(table).items() if op_of(name) in ops},
    )
    table_file(OLDEST).write_text(json.dumps(old))
    write_table(["adaln"], runs=2)
    new = read_table(OLDEST)
    assert new.keys() == table.keys()
    assert {op_of(name) for name, row in new.items() if row["registers"] != 1} == {"adaln"}
    before = table_file(OLDEST).read_text()
    wrong = compiled_as(table)[ROW] | {"matrix": 0}
    monkeypatch.setattr(compile_gate, "compile_all", lambda ops, cache, names: {ROW: wrong})
    with pytest.raises(InferixError, match="no tensor core"):
        write_table(["block_attention"], runs=2)
    assert table_file(OLDEST).read_text() == before


def test_a_small_case_runs_on_a_cpu():
    result = run(SMALL, lambda message: None)
    (row,) = result.facts["rows"]
    assert not result.on_gpu
    assert list(row["forms"]) == ["cpu", "reference", "sdpa flash"]
    form = row["forms"]["reference"]
    assert form["seconds"] > 0
    assert form["tflops"] * 1e12 == pytest.approx(row["flops"] / form["seconds"])
    assert row["flops"] == 4 * 64 * 640 * 4 * 64


def test_a_wrong_implementation_is_refused_and_not_timed(monkeypatch):
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
    assert row["forms"]["wrong"]["refused"].startswith("out ")
    assert row["forms"]["broken"]["refused"].endswith("no kernel image is available")
    assert row["first"] == "cpu" and row["forms"]["cpu"]["of_first"] == 1
    assert "refused" in kernels.summary(row)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (replace(SMALL, ops=("atention",)), "'atention'.*block_attention"),
        (replace(SMALL, cases=("smal world",)), "'smal world'.*small world"),
        (replace(SMALL, ops=(), shape="dim=64"), "'dim=64'.*ops"),
    ],
)
def test_unknown_names_are_refused(options, expected):
    with pytest.raises(UsageError, match=expected):
        run(options, lambda message: None)


def test_the_command_writes_json_and_a_picture(tmp_path):
    done = CliRunner().invoke(
        app, ["bench", "kernels", "--op", "block_attention", "--case", "small world", "--dtype", "float32",
              "--device", "cpu", "--out", str(tmp_path), "--json"]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["facts"]["rows"][0]["case"] == "small world"
    assert len(read_result(tmp_path / "kernels.json").series["block_attention, small world/reference"].samples) > 3
    assert (tmp_path / "kernels.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", HASHES)
def test_a_gpu_that_runs_other_code_than_was_inspected_fails_the_check(kind, monkeypatch, tmp_path):
    table = {name: row for name, row in read_table(OLDEST).items() if not compile_gate.is_unproved(name)}
    capability, name = next((row["architecture"], name) for name, row in table.items() if row["hash_of"] == kind)
    ran = compiled_as({name: row for name, row in table.items() if row["architecture"] == capability})
    monkeypatch.setattr(compile_gate, "triton_version", lambda: OLDEST)
    monkeypatch.setattr(compile_gate, "executed", lambda device: ran)
    monkeypatch.setattr(gpu_check, "architecture", lambda device: capability)
    gpu_check.unit_code()("cpu", tmp_path / "code.json")
    assert json.loads((tmp_path / "code.json").read_text())["wrong"] == []
    ran[name]["sha256"][kind] = "f" * 64
    with pytest.raises(InferixError, match=f"{name}: sha256 of the {kind}"):
        gpu_check.unit_code()("cpu", tmp_path / "code.json")
    del ran[name]
    with pytest.raises(InferixError, match=f"{name}:.*not compiled"):
        gpu_check.unit_code()("cpu", tmp_path / "code.json")


def attention_case(name):
    spec = SPECS["block_attention"]
    (case,) = (case for case in spec.test_cases if case.name == name)
    inputs = spec.make_inputs(case, torch.float32, "cpu", 0)
    expected = clone_inputs(inputs)
    spec.reference(**expected)
    return spec, inputs, expected


@pytest.mark.parametrize("name", ["runs, grouped heads", "fp8 pages"])
def test_pages_in_order_are_the_same_case(name):
    spec, inputs, expected = attention_case(name)
    prepare = rivals.in_order(bound(spec.reference))
    assert mismatch(spec, prepare, inputs, expected, torch.float32) is None


def test_other_attentions_get_the_same_tokens(monkeypatch):
    """torch's own as they are; FlexAttention not compiled; the packages by fakes, which show the layout only."""
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

    def flash_with_sums(q, k, v):
        return flash(q, k, v), None

    packages = {
        "flash_attn": SimpleNamespace(flash_attn_func=flash), "sageattention": SimpleNamespace(sageattn=sage),
        "flash_attn_interface": SimpleNamespace(flash_attn_func=flash),
        "flash_attn.cute": SimpleNamespace(flash_attn_func=flash_with_sums),
    }  # fmt: skip

    def installed(name):
        if name not in packages:
            raise ModuleNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(rivals, "import_module", installed)
    baselines = rivals.attention_baselines(inputs, {"triton": bound(spec.reference)})
    own = {"flex", "sdpa cudnn", "sdpa flash", "sdpa efficient"}
    others = {"flash-attn 2", "flash-attn 3", "flash-attn 4", "sageattention"}
    assert baselines.keys() == own | others
    for name in others:
        assert mismatch(spec, baselines[name], inputs, expected, torch.float32) is None
    wrong = rivals.flash_attn(lambda q, k, v: flash(q, v, k))
    assert "out " in mismatch(spec, wrong, inputs, expected, torch.float32)
    packages["flash_attn"] = SimpleNamespace()  # as flash-attn 4 leaves it
    del packages["flash_attn_interface"], packages["sageattention"]
    baselines = rivals.attention_baselines(inputs, {"triton": bound(spec.reference)})
    assert baselines.keys() == own | {"flash-attn 4"}
    inputs["out"] = inputs["out"].half()
    assert "out " in mismatch(spec, bound(lambda **all: all["out"].zero_()), inputs, expected, torch.float32)


def test_baselines_of_a_kernel_on_a_gpu(monkeypatch):
    """Names only: nothing runs. Our implementations come first, since ratios are to the first."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def names(op, case):
        spec = SPECS[op]
        inputs = spec.make_inputs(spec.test_cases[case], torch.bfloat16, "cpu", 0)
        return list(forms(spec, inputs, Options(device="cuda")))

    assert names("block_attention", 0)[:4] == ["triton", "descriptors", "flex", "sdpa cudnn"]
    assert names("block_attention", 2)[:4] == ["triton", "descriptors", "triton, in order", "descriptors, in order"]
    assert names("linear_lowp", 0) == ["scaled_mm", "triton", "scaled_mm_fast", "torch", "torch.compile"]
    assert names("linear_lowp", 3) == ["triton", "torch", "torch.compile"]
    assert names("adaln", 0) == ["triton", "torch", "torch.compile"]


@dataclass(frozen=True)
class FakeConfig:
    speed: int


@pytest.fixture
def tuned_op(monkeypatch):
    """rms_silu with two implementations by its reference, one wrong in one config, and invented times."""
    spec = SPECS["rms_silu"]
    module = ModuleType("fake_implementations")

    def first(x, gamma, bias, residual, total, out, tail, config=FakeConfig(1)):
        spec.reference(x, gamma, bias, residual, total, out, tail)
        if config.speed == 9:
            out *= 2

    def second(x, gamma, bias, residual, total, out, tail, config=FakeConfig(1)):
        spec.reference(x, gamma, bias, residual, total, out, tail)

    module.Config, module.first, module.second = FakeConfig, first, second
    module.candidates = lambda capability: [FakeConfig(1), FakeConfig(3), FakeConfig(9)]
    monkeypatch.setitem(sys.modules, "fake_implementations", module)
    both = tuple(
        Implementation(name, f"fake_implementations:{name}", (90,), (torch.float32,)) for name in ("first", "second")
    )
    cases = tuple(
        replace(case, dims={"pixels": 8, "channels": channels, "tail": 0}, options={})
        for case, channels in zip(spec.bench_cases[-3:], (16, 16, 24), strict=True)
    )

    def clock(prepare, inputs, options):
        call = prepare(inputs)
        call()
        config, name = call.keywords.get("config", FakeConfig(1)), call.func.__name__
        wide = inputs["x"].shape[1] == 24
        return [1.0 if wide else {"first": 1.0, "second": 0.9}[name] / config.speed]

    return replace(spec, implementations=both, bench_cases=cases), clock


def test_tuning_chooses_correct_candidates_that_win_by_a_margin(tuned_op, tmp_path):
    spec, clock = tuned_op
    messages = []
    options = Options(dtype=torch.float32)
    choices = tune(spec, options, 90, messages.append, clock)
    assert choices == {"float32 16": {"form": "second", "config": {"speed": 9}, "share": 0.1}}
    assert "5 candidates; 1 " in messages[0]
    assert tune(replace(spec, implementations=spec.implementations[:1]), options, 90, messages.append, clock) == {
        "float32 16": {"form": "first", "config": {"speed": 3}, "share": 0.3333}
    }
    assert tune(spec, options, 80, messages.append, clock) == {}  # no implementation is declared for it
    table = {"schema": 1, "op": spec.name, "card": "Test Card", "choices": choices}
    path = tuner.write_table(table, tmp_path / "tuned" / "card.json")
    chosen = tuning.read(spec, json.loads(path.read_text("utf-8")), 90)["float32 16"]
    assert (chosen.func.__name__, chosen.keywords) == ("second", {"config": FakeConfig(9)})
    assert [file.name for file in path.parent.iterdir()] == ["card.json"]


def test_tuning_needs_a_gpu_and_whole_ops():
    with pytest.raises(UsageError, match=r"'cpu'.*GPU"):
        tune_here(SMALL, lambda message: None)
    with pytest.raises(UsageError, match=r"cases.*shape"):
        tune_here(replace(SMALL, device="cuda"), lambda message: None)
    for flags, expected in (
        (("--tune", "--device", "cpu"), "GPU"),
        (("--tune", "--compile-only"), "--compile-only"),
        (("--compile-only", "--case", "small world"), "--case"),
        (("--compile-only", "--op", "adalm"), "'adaln'"),
    ):
        done = CliRunner().invoke(app, ["bench", "kernels", *flags])
        assert done.exit_code == 2
        assert expected in " ".join(done.output.split())


def test_the_help_of_the_command_names_its_files_and_flags():
    text = " ".join(CliRunner().invoke(app, ["bench", "kernels", "--help"]).output.split())
    for word in ("flash-attn", "kernels/OP/tuned/CARD.json", "--compile-only"):
        assert word in text


def test_an_op_whose_cases_are_all_too_large_for_a_cpu_has_its_smallest_where_it_was_asked_for():
    spec, asked = SPECS["rms_norm"], Options(ops=("rms_norm",), dtype=torch.float32)
    assert [case.name for case in chosen_cases(spec, spec.bench_cases, asked)] == ["1.3B, three frames"]
    assert chosen_cases(spec, spec.bench_cases, replace(asked, ops=())) == []
    attention = SPECS["block_attention"]
    assert [case.name for case in chosen_cases(attention, attention.bench_cases, asked)] == ["small world"]
    named = replace(asked, cases=("14B, six frames",))
    assert [case.name for case in chosen_cases(spec, spec.bench_cases, named)] == ["14B, six frames"]
    assert chosen_cases(spec, spec.bench_cases, replace(asked, device="cuda")) == list(spec.bench_cases)
