"""Ops on the CPU: references, schemas, bad input; and the kernels themselves in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from checker import check
from claims import CLAIMS, shuffled_pages_equal_tokens_in_order, turned_queries_equal_keys_rotated_at_read

from inferix.errors import InferixError, UsageError
from inferix.kernels import linear_gelu, tuning
from inferix.kernels.adaln import adaln
from inferix.kernels.block_attention import block_attention, merge_partials
from inferix.kernels.catalog import SPECS
from inferix.kernels.conv_epilogue import conv_epilogue
from inferix.kernels.denoise_step import denoise_step
from inferix.kernels.dense_attention import dense_attention, flash
from inferix.kernels.join_phases import join_phases
from inferix.kernels.kv_pages import kv_pages
from inferix.kernels.linear_lowp import linear_lowp
from inferix.kernels.qk_norm_rope_append import qk_norm_rope_append
from inferix.kernels.rms_silu import rms_silu
from inferix.kernels.spec import expect_fp8, using

HERE = Path(__file__).parent


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_kernel_in_the_interpreter_and_every_wrong_one_rejected(chosen):
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(HERE), *sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "-p", "no:cacheprovider", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, "--rootdir", str(HERE), "--import-mode=importlib", str(HERE / "interpreted.py")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_exact_enough_in_every_dtype(spec, dtype):
    for case in spec.test_cases:
        check(spec, spec.reference, case, dtype)


CPU_FORMS = {
    f"{spec.name}-{form.name}": (spec, form) for spec in SPECS.values() for form in spec.implementations if form.cpu
}


@pytest.mark.parametrize("named", CPU_FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_form_for_the_cpu_equals_the_reference(named, dtype):
    spec, form = CPU_FORMS[named]
    assert tuning.choose(spec, torch.empty(1, 8, dtype=dtype)) is form.load()
    for case in spec.test_cases:
        sums = case.options.get("lse") or (spec.name == "adaln" and case.options.get("fp8"))
        if dtype is not torch.float64 or not sums:  # these are always float32
            check(spec, form.load(), case, dtype)


QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")  # compiles nothing


@pytest.mark.parametrize(
    "checks",
    [QUICK_CHECKS, pytest.param((*QUICK_CHECKS, "test_aot_dispatch_dynamic"), marks=pytest.mark.slow)],
    ids=["quick", "all"],
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_the_op_tells_torch_the_truth_about_itself(spec, checks):
    """The first case by all of torch's checks."""
    op = getattr(torch.ops.inferix, spec.name).default
    for number, case in enumerate(spec.test_cases):
        inputs = spec.make_inputs(case, torch.float32, "cpu", 0)
        if any(torch.is_tensor(value) and value.dtype == torch.float8_e4m3fn for value in inputs.values()):
            continue  # torch's checker cannot compare FP8 itself
        torch.library.opcheck(op, (), inputs, **({"test_utils": checks} if number else {}))


def test_the_ops_without_a_kernel_of_their_own_tell_the_truth_too():
    x, weight, bias = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
    torch.library.opcheck(torch.ops.inferix.linear_gelu.default, (x, weight, bias, torch.empty(4, 6)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 0.0)], ids=str
)
def test_gelu_of_a_linear_layer_is_its_tanh_form(dtype, tolerance):
    x = torch.cat((torch.linspace(-12, 12, 501), torch.tensor([-3e4, -0.0, 3e4, 1e15, -1e15])))[:, None].to(dtype)
    result = linear_gelu.linear_gelu(x, torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype))
    torch.testing.assert_close(result, F.gelu(x, approximate="tanh"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("window", "sinks", "page_tokens"), CLAIMS)
def test_shuffled_pages_of_unequal_sessions_equal_tokens_in_order(window, sinks, page_tokens):
    assert shuffled_pages_equal_tokens_in_order(window, sinks, page_tokens, torch.float64) <= 1e-12


@pytest.mark.parametrize(("window", "sinks"), [(2, 1), (3, 2), (1, 3)])
def test_the_window_may_be_relative_by_turning_the_query_once_more(window, sinks):
    assert turned_queries_equal_keys_rotated_at_read(window, sinks, torch.float64) <= 1e-12


def test_parts_of_the_keys_merge_into_the_whole():
    spec = SPECS["block_attention"]
    inputs = spec.make_inputs(spec.test_cases[2], torch.float64, "cpu", 4)
    q, kv, table = inputs["q"][:1], inputs["kv"], inputs["page_table"][:1]
    counts = torch.tensor([6], dtype=torch.int32)
    whole = block_attention(q, kv, table, counts)
    outs, lses = [], []
    for part in (table[:, :2], table[:, 2:]):
        lses.append(torch.empty(1, 6, 16))
        size = torch.tensor([part.shape[1]], dtype=torch.int32)
        outs.append(block_attention(q, kv, part.contiguous(), size, lse=lses[-1]))
    assert (merge_partials(torch.stack(outs), torch.stack(lses)) - whole).abs().max() <= 1e-6


def test_torch_attention_serves_where_pages_are_one_run():
    spec = SPECS["block_attention"]
    inputs = spec.make_inputs(spec.test_cases[0], torch.float32, "cpu", 0)
    args = {name: inputs[name] for name in ("q", "kv", "page_table", "page_count")}
    want = block_attention(**args)
    with using(block_attention="sdpa"):
        assert (block_attention(**args) - want).abs().max() <= 1e-5
        shuffled = spec.make_inputs(spec.test_cases[1], torch.float32, "cpu", 0)
        with pytest.raises(ValueError, match="sdpa"):
            block_attention(**{name: shuffled[name] for name in args})
    with using(block_attention="cuda-core"), pytest.raises(ValueError, match="'cuda-core'"):
        block_attention(**args)


def test_flash_attn_gets_the_pages_as_one_sequence(monkeypatch):
    """A stand-in for the package, which needs a GPU: this shows what it is called with, not that it works."""
    spec = SPECS["block_attention"]
    inputs = spec.make_inputs(spec.test_cases[0], torch.float32, "cpu", 0)
    args = {name: inputs[name] for name in ("q", "kv", "page_table", "page_count")}
    want = block_attention(**args)
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    with using(block_attention="flash_attn"), pytest.raises(InferixError, match="flash-attn"):
        block_attention(**args)

    def stand_in(q, k, v, softmax_scale, causal):
        assert (q.shape[0], k.shape, causal) == (1, (1, 64, 1, 64), False)
        assert k.data_ptr() == inputs["kv"][0, inputs["page_table"][0, 0]].data_ptr()  # in place, not a copy
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    monkeypatch.setattr(flash, "find_spec", lambda name: True)
    monkeypatch.setattr(flash, "import_module", lambda name: SimpleNamespace(flash_attn_func=stand_in))
    with using(block_attention="flash_attn", dense_attention="flash_attn"):
        assert (block_attention(**args) - want).abs().max() <= 1e-5
        pages = inputs["page_table"][0].tolist()
        assert (dense_attention(args["q"], args["kv"], pages) - want).abs().max() <= 1e-5
        with pytest.raises(ValueError, match=r"flash_attn.*lse"):
            block_attention(**args, lse=torch.empty(1, 1, 32))


class Card:
    """A GPU as far as choosing a form asks for one: nothing here runs on it."""

    def __init__(self, monkeypatch, major, minor, name="Test Card 1 PCIe"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        self.tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 8, 2, 64))


def test_a_form_is_chosen_by_card_dtype_and_size_and_refused_where_it_is_not_declared(monkeypatch):
    spec = SPECS["block_attention"]
    card = Card(monkeypatch, 9, 0)
    assert tuning.choose(spec, card.tensor) is spec.form("triton").load()
    card.tensor.shape = (1, 8, 2, 48)
    assert tuning.choose(spec, card.tensor) is spec.reference
    card.tensor.shape, card.tensor.dtype = (1, 8, 2, 64), torch.float32
    assert tuning.choose(spec, card.tensor) is spec.reference
    card = Card(monkeypatch, 7, 5)
    assert tuning.choose(spec, card.tensor) is spec.reference
    with using(block_attention="triton"), pytest.raises(ValueError, match=r"7\.5.*triton.*8\.0"):
        tuning.choose(spec, card.tensor)
    with using(block_attention="descriptors"), pytest.raises(ValueError, match=r"7\.5.*descriptors.*9\.0, 10\.0"):
        tuning.choose(spec, card.tensor)
    Card(monkeypatch, 8, 6)
    with pytest.raises(ValueError, match=r"adaln: .*8\.6.*8\.9"):
        expect_fp8("adaln", torch.device("cuda"))


def write_table(folder, monkeypatch, table):
    monkeypatch.setattr(tuning, "table_path", lambda op, card: folder / "table.json")
    tuning.choices.cache_clear()
    (folder / "table.json").write_text(table if isinstance(table, str) else json.dumps(table))


GOOD = {"form": "triton", "config": {"queries": 128, "keys": 64, "tail": 32, "warps": 8, "stages": 2}}


def test_a_card_s_table_decides_form_and_config(monkeypatch, tmp_path):
    spec, card = SPECS["block_attention"], Card(monkeypatch, 9, 0)
    other = {"form": "descriptors", "config": GOOD["config"]}
    table = {"schema": 1, "op": "block_attention", "choices": {"bfloat16 64": GOOD, "bfloat16 128": other}}
    write_table(tmp_path, monkeypatch, table)
    chosen = tuning.choose(spec, card.tensor)
    assert chosen.func is spec.form("triton").load()
    assert chosen.keywords["config"] == spec.form("triton").module().Config(**GOOD["config"])
    card.tensor.shape = (1, 8, 2, 128)
    assert tuning.choose(spec, card.tensor).func is spec.form("descriptors").load()
    card.tensor.dtype = torch.float16  # nothing about it in the table
    assert tuning.choose(spec, card.tensor) is spec.form("triton").load()
    with using(block_attention="reference"):
        assert tuning.choose(spec, card.tensor) is spec.reference
    (tmp_path / "table.json").unlink()
    tuning.choices.cache_clear()
    card.tensor.dtype = torch.bfloat16
    assert tuning.choose(spec, card.tensor) is spec.form("triton").load()


def test_a_table_that_does_not_fit_the_code_is_refused(monkeypatch, tmp_path):
    spec, card = SPECS["block_attention"], Card(monkeypatch, 9, 0)

    def with_choice(choice):
        return {"schema": 1, "op": "block_attention", "choices": {"bfloat16 64": choice}}

    for table, named in (
        ("{", "Expecting property name"),
        ([], "schema 1.*'block_attention'"),
        ({"schema": 2, "op": "block_attention", "choices": {}}, "schema 1"),
        ({"schema": 1, "op": "adaln", "choices": {}}, "op 'block_attention'"),
        ({"schema": 1, "op": "block_attention"}, "choices"),
        (with_choice({"config": {}}), "'bfloat16 64'"),
        (with_choice(GOOD | {"form": "cutlass"}), "'cutlass'"),
        (with_choice(GOOD | {"config": GOOD["config"] | {"keys": 48}}), '"keys": 48.*triton.*sm_90'),
        (with_choice(GOOD | {"config": GOOD["config"] | {"speed": 11}}), "speed.*triton"),
        (with_choice({"form": "triton"}), "null"),
    ):
        write_table(tmp_path, monkeypatch, table)
        with pytest.raises(UsageError, match=named) as caught:
            tuning.choose(spec, card.tensor)
        assert "--op block_attention --tune" in str(caught.value)


def test_the_name_of_a_table():
    path = tuning.table_path("adaln", "NVIDIA H100 80GB HBM3 (PCIe)")
    assert path.parts[-3:] == ("adaln", "tuned", "nvidia-h100-80gb-hbm3-pcie.json")


def defaults(module, capability):
    """The configs above a kernel, for an architecture."""
    if hasattr(module, "CONFIG"):
        return [module.CONFIG]
    if not isinstance(module.CONFIGS, dict):
        return [config for _, config in module.CONFIGS]
    keys = [key for key in module.CONFIGS if capability in (key if isinstance(key, tuple) else (key,))]
    return [module.CONFIGS[key] for key in keys]


def test_every_default_config_is_one_that_may_be_tuned_to():
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    for spec in SPECS.values():
        for form in spec.implementations:
            for capability in form.architectures if hasattr(form.module(), "compile_cases") else ():
                tried = tuning.candidates(spec, form.name, capability)
                for config in defaults(form.module(), capability):
                    assert config in tried, f"{spec.name}, {form.name}, sm_{capability}: {config}"


ATTENTION_MISTAKES = {
    "shape of kv is (2, 3, 5, 2, 64); expected (2, 3, 5, 2, 48)": {"q": torch.zeros(1, 4, 2, 48)},
    "q is [0, 4, 2, 64]; expected 1 or more of each": {"q": torch.zeros(0, 4, 2, 64)},
    "scale is -1.0; expected a number above 0": {"scale": -1.0},
    "q is [1, 0, 2, 64]; expected 1 or more of each": {"q": torch.zeros(1, 0, 2, 64)},
    "heads is 3, kv_heads is 2; expected heads % kv_heads == 0": {"q": torch.zeros(1, 4, 3, 64)},
    "dtype of kv is torch.float64": {"kv": torch.zeros(2, 3, 5, 2, 64, dtype=torch.float64)},
    "dtype of page_table is torch.int64; expected torch.int32": {"page_table": torch.zeros(1, 3, dtype=torch.int64)},
    "shape of page_count is [2]": {"page_count": torch.ones(2, dtype=torch.int32)},
    "dtype of kv is torch.float32; expected no kv_scale": {"kv_scale": torch.ones(2, 3, 2)},
    "q_sink is given without sink_count": {"q_sink": torch.zeros(1, 4, 2, 64)},
    "strides of q is (512, 128, 1, 2)": {"q": torch.zeros(1, 4, 64, 2).transpose(2, 3)},
    "shape of out is (1, 5, 2, 64)": {"out": torch.zeros(1, 5, 2, 64)},
    "page_table is [1, 0]; expected 1 or more of each": {"page_table": torch.zeros(1, 0, dtype=torch.int32)},
    "sink_count of row 0 is 4; expected 0..3": {
        "q_sink": torch.zeros(1, 4, 2, 64), "sink_count": torch.tensor([4], dtype=torch.int32)
    },
    "row 0 of page_table lists page 3; expected 0..2": {"page_table": torch.tensor([[0, 3, 1]], dtype=torch.int32)},
    "page_count of row 0 is 0; expected 1..3": {"page_count": torch.zeros(1, dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("named", ATTENTION_MISTAKES)
def test_bad_input_of_attention_is_named(named, monkeypatch):
    monkeypatch.setenv("INFERIX_DEBUG", "1")
    good = {
        "q": torch.zeros(1, 4, 2, 64), "kv": torch.zeros(2, 3, 5, 2, 64),
        "page_table": torch.arange(3, dtype=torch.int32)[None], "page_count": torch.tensor([3], dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match="block_attention: ") as caught:
        block_attention(**good | ATTENTION_MISTAKES[named])
    assert named in str(caught.value)


def halves(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD_CALLS = {
    qk_norm_rope_append: {
        "qkv": halves(1, 6, 4 * 64), "q_weight": halves(128), "k_weight": halves(64),
        "rope_time": torch.zeros(1, 1, 12, 2), "rope_rows": torch.zeros(2, 10, 2),
        "rope_columns": torch.zeros(3, 10, 2), "kv": halves(2, 4, 6, 1, 64), "pages": numbers([2]), "heads": 2,
    },
    adaln: {"x": halves(1, 6, 32), "shift": halves(1, 2, 32), "scale": halves(1, 2, 32)},
    denoise_step: {
        "tokens": halves(1, 4, 16), "x": halves(1, 1, 4, 4, 4), "frames": numbers([0]), "key": torch.zeros(1).long(),
        "coefficients": torch.zeros(2, 3), "patch": (2, 2), "draw": 0,
    },
    linear_lowp: {
        "x": torch.zeros(4, 32).to(torch.int8), "weight": torch.zeros(8, 32).to(torch.int8), "x_scale": torch.ones(4),
        "weight_scale": torch.ones(8),
    },
    kv_pages: {
        "source": halves(2, 3, 5, 2, 64), "source_pages": numbers(0, 1), "target": halves(2, 4, 5, 2, 64),
        "target_pages": numbers(3, 1),
    },
    rms_silu: {"x": halves(5, 16), "gamma": halves(16)},
    conv_epilogue: {"x": halves(2, 3, 4, 16), "parts": 2},
    join_phases: {"x": halves(2, 3, 4, 16)},
}  # fmt: skip
MISTAKES = [
    (qk_norm_rope_append, {"qkv": halves(1, 6, 200)}, "shape of qkv is (1, 6, 200); expected (1, 6, 256)"),
    (qk_norm_rope_append, {"qkv": halves(0, 6, 256)}, "expected 1 or more of each"),
    (qk_norm_rope_append, {"q_weight": halves(128).float()}, "dtype of q_weight is torch.float32; expected"),
    (qk_norm_rope_append, {"kv": halves(2, 4, 5, 1, 64)}, "shape of kv is (2, 4, 5, 1, 64); expected (2, 4, 6, 1, 64)"),
    (qk_norm_rope_append, {"rope_rows": torch.zeros(2, 9, 2)}, "row_pairs is 9"),
    (qk_norm_rope_append, {"pages": numbers([4])}, "pages lists page 4; expected 0..3"),
    (qk_norm_rope_append, {"kv": halves(2, 4, 6, 1, 128)[..., ::2]}, "strides of kv is"),
    (adaln, {"x": halves(1, 0, 32)}, "x is [1, 0, 32]; expected 1 or more of each"),
    (adaln, {"shift": halves(1, 4, 32), "scale": halves(1, 4, 32)}, "tokens is 6, frames is 4"),
    (adaln, {"scale": None}, "shift is given without scale"),
    (adaln, {"gate": halves(1, 2, 32)}, "gate is given without update"),
    (adaln, {"normed": halves(1, 6, 32), "row_scale": torch.zeros(1, 6)}, "dtype of normed is torch.bfloat16"),
    (adaln, {"x": halves(1, 6, 64)[..., ::2]}, "strides of x is"),
    (adaln, {"residual": torch.zeros(1, 6, 32, device="meta").bfloat16()}, "device of residual is meta; expected cpu"),
    (denoise_step, {"patch": (3, 2)}, "patch_height is 3, height is 4"),
    (denoise_step, {"frames": torch.zeros(1, 1).long()}, "dtype of frames is torch.int64; expected torch.int32"),
    (denoise_step, {"coefficients": torch.zeros(2, 4)}, "shape of coefficients is (2, 4); expected (2, 3)"),
    (denoise_step, {"tokens": halves(1, 4, 8)}, "shape of tokens is (1, 4, 8); expected (1, 4, 16)"),
    (denoise_step, {"x": halves(1, 0, 4, 4, 4)}, "expected 1 or more of each"),
    (linear_lowp, {"weight": torch.zeros(8, 16).to(torch.int8)}, "shape of weight is (8, 16); expected (8, 32)"),
    (linear_lowp, {"x": torch.zeros(4, 32)}, "dtype of x is torch.float32; expected torch.float8_e4m3fn or torch.int8"),
    (linear_lowp, {"x_scale": torch.ones(3)}, "shape of x_scale is (3,); expected (4 or 1,)"),
    (linear_lowp, {"x": torch.zeros(0, 32).to(torch.int8)}, "expected 1 or more of each"),
    (linear_lowp, {"bias": torch.zeros(8)}, "dtype of bias is torch.float32; expected torch.bfloat16"),
    (kv_pages, {"target": halves(2, 4, 6, 2, 64)}, "shape of target is (2, 4, 6, 2, 64); expected (2, 4, 5, 2, 64)"),
    (kv_pages, {"source_scale": torch.ones(2, 3, 2)}, "dtype of source is torch.bfloat16; expected no source_scale"),
    (kv_pages, {"source_pages": numbers(0, 3)}, "source_pages lists page 3; expected 0..2"),
    (kv_pages, {"target_pages": numbers(2, 2)}, "target_pages lists page 2 2 times; expected once"),
    (kv_pages, {"source_pages": numbers(), "target_pages": numbers()}, "source_pages is [0]; expected 1 or more"),
    (rms_silu, {"gamma": halves(8)}, "shape of gamma is (8,); expected (16,)"),
    (rms_silu, {"x": halves(0, 16)}, "expected 1 or more of each"),
    (rms_silu, {"x": halves(16, 5).T}, "strides of x is"),
    (rms_silu, {"residual": halves(4, 16)}, "shape of residual is (4, 16); expected (5, 16)"),
    (rms_silu, {"total": torch.zeros(5, 16)}, "dtype of total is torch.float32; expected torch.bfloat16"),
    (rms_silu, {"tail": halves(6, 16)}, "tail_pixels is 6, pixels is 5"),
    (conv_epilogue, {"parts": 3}, "wide is 16, parts is 3"),
    (conv_epilogue, {"bias": halves(8)}, "shape of bias is (8,); expected (16,)"),
    (conv_epilogue, {"out": halves(2, 3, 4, 8)}, "shape of out is (2, 3, 4, 8); expected (4, 3, 4, 8)"),
    (join_phases, {"x": halves(2, 3, 4, 18)}, "wide is 18"),
    (join_phases, {"bias": halves(16)}, "shape of bias is (16,); expected (4,)"),
]


@pytest.mark.parametrize(("op", "change", "named"), MISTAKES, ids=[named for _, _, named in MISTAKES])
def test_bad_input_of_every_op_is_named(op, change, named, monkeypatch):
    monkeypatch.setenv("INFERIX_DEBUG", "1")
    op(**GOOD_CALLS[op])
    with pytest.raises(ValueError, match=f"{op.__name__}: ") as caught:
        op(**GOOD_CALLS[op] | change)
    assert named in str(caught.value)


def test_pages_are_not_looked_at_unless_asked(monkeypatch):
    """Page ids are checked only with INFERIX_DEBUG=1, since the check waits for the device."""
    monkeypatch.delenv("INFERIX_DEBUG", raising=False)
    good = GOOD_CALLS[kv_pages] | {"target_pages": numbers(2, 2)}
    kv_pages(**good)
