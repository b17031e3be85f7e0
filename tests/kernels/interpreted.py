"""Every Triton kernel in the interpreter, and wrong ones that must be rejected.

Run by test_kernels.py in a process of its own, where TRITON_INTERPRET=1 is set before Triton is imported.
"""

import os
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from checker import changed, check
from claims import CLAIMS, shuffled_pages_equal_tokens_in_order, turned_queries_equal_keys_rotated_at_read
from interpreter import repair
from preset_lists import every_list, lists_of

from inferix.kernels.adaln import gpu as adaln_gpu
from inferix.kernels.attention_parts import attention_parts
from inferix.kernels.block_attention import block_attention, descriptors, fp8_qk
from inferix.kernels.block_attention import gpu as attention_gpu
from inferix.kernels.catalog import SPECS
from inferix.kernels.conv_epilogue import gpu as epilogue_gpu
from inferix.kernels.denoise_step import gpu as denoise_gpu
from inferix.kernels.frame_noise import gpu as noise_gpu
from inferix.kernels.join_phases import gpu as phases_gpu
from inferix.kernels.kv_pages import gpu as pages_gpu
from inferix.kernels.linear_lowp import gpu as linear_gpu
from inferix.kernels.merge_parts import gpu as merge_gpu
from inferix.kernels.merge_parts import merge_parts
from inferix.kernels.philox import philox4x32, philox_normals
from inferix.kernels.qk_norm_rope_append import gpu as append_gpu
from inferix.kernels.quantise_rows import gpu as quantise_gpu
from inferix.kernels.rms_norm import gpu as rms_norm_gpu
from inferix.kernels.rms_silu import gpu as rms_silu_gpu
from inferix.kernels.rope_append import gpu as rope_gpu
from inferix.kernels.spec import using
from inferix.models.registry import make_preset

assert os.environ["TRITON_INTERPRET"] == "1"
repair()
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
GLUON = ("hopper",)  # forms that the interpreter cannot run; test_hopper.py does


def cases():
    """Every case in every dtype. Quick are, of a form, each case in one dtype; of a form `descriptors`, which is the
    same kernel with other loads, each third case.
    """
    for spec in SPECS.values():
        for form in spec.implementations:
            if not hasattr(form.module(), "compile_cases") or form.name in GLUON:
                continue
            dtypes = [dtype for dtype in FLOATS if dtype in form.dtypes] or FLOATS
            taken = [case for case in spec.test_cases if takes(spec, form, case)]
            for index, case in enumerate(taken):
                for dtype in dtypes:
                    quick = dtype == dtypes[index % len(dtypes)] and (form.name != "descriptors" or index % 3 == 0)
                    name = f"{spec.name} {form.name}, {case.name}, {str(dtype)[6:]}"
                    yield pytest.param(spec, form, case, dtype, id=name, marks=() if quick else pytest.mark.slow)


def takes(spec, form, case):
    return not form.rules or not spec.broken(form, spec.make_inputs(case, torch.float16, "cpu", 0))


@pytest.mark.parametrize(("spec", "form", "case", "dtype"), cases())
def test_the_kernel_equals_the_reference(spec, form, case, dtype):
    check(spec.judging(form), form.load(), case, dtype)


def test_queries_in_fp8_are_not_those_of_the_reference_and_near_them():
    """What the form rounds shows, and stays small: by the op's own reference it is off, by less than a step of FP8."""
    form, case = SPECS["block_attention"].form("fp8_qk"), named("block_attention", "fp8 pages in runs")
    spec = SPECS["block_attention"]
    with pytest.raises(AssertionError, match="is off by"):
        check(spec, form.load(), case, torch.float16)
    inputs = spec.make_inputs(case, torch.float16, "cpu", 0)
    exact = {name: one.clone() if torch.is_tensor(one) else one for name, one in inputs.items()}
    form.load()(**inputs)
    spec.reference(**exact)
    error = (inputs["out"].double() - exact["out"].double()).norm() / exact["out"].double().norm()
    assert 1e-3 < error < 0.05


WRONG_QUERIES = {
    "a scale for all queries": ("tl.max(tl.abs(q), 1)", "tl.max(tl.max(tl.abs(q), 1), 0) + 0 * tl.sum(q, 1)"),
    "queries without their scale": ("score_factor = qk_factor * q_scale", "score_factor = qk_factor + 0 * q_scale"),
    "the largest of one sign": ("tl.max(tl.abs(q), 1)", "tl.max(q, 1)"),
}


@pytest.mark.parametrize("name", WRONG_QUERIES)
def test_queries_packed_otherwise_are_rejected(name, tmp_path, monkeypatch):
    wrong = changed(attention_gpu, *WRONG_QUERIES[name], tmp_path)
    monkeypatch.setattr(fp8_qk, "attend", wrong.block_attention)
    spec = SPECS["block_attention"]
    with pytest.raises(AssertionError, match=r"is off by|not finite"):
        judge = spec.judging(spec.form("fp8_qk"))
        check(judge, fp8_qk.block_attention, named("block_attention", "fp8 pages in runs"), torch.float16)


@pytest.mark.parametrize("form", ["triton", pytest.param("descriptors", marks=pytest.mark.slow)])
def test_paged_attention_keeps_its_promises_in_the_kernel(form):
    with using(block_attention=form):
        assert shuffled_pages_equal_tokens_in_order(*CLAIMS[2 if form == "triton" else 3], torch.float16) <= 4e-3
        assert turned_queries_equal_keys_rotated_at_read(2, 1, torch.float16) <= 4e-3


AFTER = attention_gpu.Config(queries=16, keys=32, tail=16, warps=4, stages=1)  # tiles after the loop, as before sm_90


@pytest.mark.parametrize("case", ["tails everywhere", "fp8 pages in runs"])
def test_tiles_after_the_loop_equal_the_reference(case):
    run = partial(attention_gpu.block_attention, config=AFTER)
    check(SPECS["block_attention"], run, named("block_attention", case), torch.float16)


def test_parts_with_tiles_after_the_loop_equal_the_reference():
    run = partial(SPECS["attention_parts"].form("triton").load(), config=AFTER)
    check(SPECS["attention_parts"], run, named("attention_parts", "two parts"), torch.float16)


def named(op, case):
    return next(known for known in SPECS[op].test_cases if known.name == case)


def difference_on(listed, sinks):
    """Largest error of whole attention and of merged parts over a list of pages, in float16 against float64."""
    generator = torch.Generator().manual_seed(len(listed))
    pages = [page - min(listed) for page in listed]
    kv = torch.full((2, max(pages) + 1, 20, 1, 64), float("nan"))
    kv[:, pages] = torch.randn(2, len(pages), 20, 1, 64, generator=generator)
    q = torch.randn(1, 17, 2, 64, generator=generator)
    table, count = torch.tensor([pages], dtype=torch.int32), torch.tensor([len(pages)], dtype=torch.int32)
    turned = {"q_sink": q.flip(1), "sink_count": torch.tensor([sinks], dtype=torch.int32)} if sinks else {}
    half = {name: one.half() if one.is_floating_point() else one for name, one in turned.items()}
    wide = {name: one.double() if one.is_floating_point() else one for name, one in half.items()}
    want = block_attention(q.half().double(), kv.half().double(), table, count, **wide)
    with using(block_attention="triton", attention_parts="triton", merge_parts="triton"):
        whole = block_attention(q.half(), kv.half(), table, count, **half)
        parts = attention_parts(q.half(), kv.half(), table, count, 2, **half)
        merged = merge_parts(*parts, torch.empty_like(whole))
    return max(float((got - want).abs().max()) for got in (whole, merged))


@pytest.mark.parametrize("preset", ["sgf-framewise"])
def test_lists_of_a_preset_give_the_attention_of_the_reference(preset):
    for listed, sinks in lists_of(make_preset(preset)):
        assert difference_on(listed, sinks) <= 4e-3


@pytest.mark.slow
def test_lists_of_every_preset_give_the_attention_of_the_reference():
    for (listed, sinks), preset in every_list().items():
        assert difference_on(listed, sinks) <= 4e-3, preset


WRONG_PARTS = {  # a piece of the kernel's source, and what replaces it
    "a step in two parts": ("(part + 1) * steps // PARTS * STEP,", "((part + 1) * steps // PARTS + 1) * STEP,"),
    "a part without its first keys": ("part * steps // PARTS * STEP\n", "part * steps // PARTS * STEP + 5\n"),
    "keys of the part before": ("skipped = begin - first * PAGE", "skipped = 0 * begin"),
    "keys of the part behind": ("tl.minimum(length, stop - first * PAGE)", "length + 0 * stop"),
    "results of all parts in one place": ("row += part.to(tl.int64) * tl.num_programs(2)", "row += 0 * part"),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_wrong_parts_are_rejected(name, tmp_path):
    wrong = changed(attention_gpu, *WRONG_PARTS[name], tmp_path)

    def run(out, **given):
        wrong.block_attention(out=out, parts=len(out), **given)

    with pytest.raises(AssertionError, match=r"is off by|not finite|beside"):
        check(SPECS["attention_parts"], run, named("attention_parts", "two parts"), torch.float16)


def test_a_wrong_tile_through_a_descriptor_is_rejected(tmp_path, monkeypatch):
    wrong = changed(attention_gpu, "[v_row + at, ", "[k_row + at, ", tmp_path)
    monkeypatch.setattr(descriptors, "attend", wrong.block_attention)
    spec = SPECS["block_attention"]
    with pytest.raises(AssertionError, match="is off by"):
        check(spec, descriptors.block_attention, spec.test_cases[0], torch.float16)


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _arithmetic(x_ptr, out_ptr, op: tl.constexpr):
    x = tl.load(x_ptr)
    if op == "add":
        result = x + x
    elif op == "sub":
        result = -2 - x
    else:
        result = x * x
    tl.store(out_ptr, result)


@pytest.mark.parametrize(("op", "fits", "overflows"), [("add", 2**30 - 1, 2**30), ("sub", 2**31 - 2, 2**31 - 1),
                                                       ("mul", 46340, 46341)])  # fmt: skip
def test_the_repaired_interpreter_finds_overflows(op, fits, overflows):
    out = torch.zeros(1, dtype=torch.int32)
    _arithmetic[(1,)](torch.tensor([fits], dtype=torch.int32), out, op)
    assert out.item() == {"add": fits + fits, "sub": -2 - fits, "mul": fits * fits}[op]
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflows int32"):
        _arithmetic[(1,)](torch.tensor([overflows], dtype=torch.int32), out, op)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_repaired_interpreter_rounds_as_torch_does(dtype):
    x = torch.randn(1024, generator=torch.Generator().manual_seed(1)) * 60
    out = torch.empty(1024, dtype=dtype)
    _cast[(1,)](x, out, 1024)
    want = x.clamp(-448, 448).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
    assert (out.view(torch.uint8) == want.view(torch.uint8)).all()
    assert np.isfinite(out.float().numpy().astype(ml_dtypes.bfloat16)).all()


def test_arithmetic_on_bfloat16_fails_aloud():
    @triton.jit
    def double(x_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        x = tl.load(x_ptr + at)
        tl.store(x_ptr + at, x + x)

    with pytest.raises(Exception, match=r"bfloat16|float32"):
        double[(1,)](torch.ones(16, dtype=torch.bfloat16), 16)


WRONG = {  # module, a piece of its source, what replaces it, and a case whose check fails
    "mask off by one": (attention_gpu, "(key < last))", "(key <= last))", "tails everywhere"),
    "keys of an overlap twice": (attention_gpu, "((key >= start) & ", "((key >= 0) & ", "head of 128"),
    "a mask too late": (attention_gpu, "start + KEYS > last", "start > last", "tails everywhere"),
    "whole tiles only": (attention_gpu, "if TAIL else last", "if TAIL else last // KEYS * KEYS", "tails everywhere"),
    "a tile beyond its run": (attention_gpu, "tl.minimum(start, length - KEYS)", "start + 0", "head of 128"),
    "a stale page": (attention_gpu, "tl.load(table_ptr + first).to", "tl.load(table_ptr).to", "tails everywhere"),
    "a page too few": (attention_gpu, "tl.load(count_ptr + row)", "tl.load(count_ptr + row) - 1", "one page, one tile"),
    "the next row's pages": (
        attention_gpu, "table_ptr += row * table_width", "table_ptr += row", "runs, grouped heads"
    ),
    "the wrong query": (
        attention_gpu, "            if first < sinks", "            if first > sinks", "unequal rows, sink in a run"
    ),
    "sink and window in one run": (
        attention_gpu, "tl.where(first < sinks, sinks, count) if SINK else count", "count",
        "unequal rows, sink in a run"
    ),
    "two scales of keys in a run": (
        attention_gpu, "follows &= tl.load(k_scale_ptr", "tl.load(k_scale_ptr", "fp8 pages in runs"
    ),
    "two scales of values in a run": (
        attention_gpu, "follows &= tl.load(v_scale_ptr", "tl.load(v_scale_ptr", "fp8 pages in runs"
    ),
    "no scale of keys": (attention_gpu, "qk_factor = k_scale * factor", "qk_factor = factor", "fp8 pages"),
    "no scale of values": (attention_gpu, "acc_scale = v_scale", "acc_scale = acc_scale", "fp8 pages"),
    "values of the keys' pages": (attention_gpu, "k_ptr + pages.to", "k_ptr + 0 * pages.to", "one page, one tile"),
    "no rescaling": (attention_gpu, "acc * alpha[:, None]", "acc", "one page, one tile"),
    "the wrong head": (attention_gpu, "head // (HEADS // KV_HEADS)", "head % KV_HEADS", "runs, grouped heads"),
    "shares that do not add up to one": (merge_gpu, "acc / total[:, None]", "acc", "two parts"),
    "sums of another head": (merge_gpu, "* HEADS + head) * tokens", "* HEADS) * tokens + 0 * head", "two parts"),
    "a part too few": (merge_gpu, "weight[:, None] * tl.load", "(part > 0) * weight[:, None] * tl.load", "two parts"),
    "rotated the other way": (append_gpu, "[None] - odd", "[None] + odd", "one token"),
    "pairs of halves": (
        append_gpu, "tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))",
        "tl.split(tl.permute(tl.reshape(x, [ROWS, 2, DIM // 2]), (0, 2, 1)))", "one token",
    ),
    "the wrong page": (append_gpu, "pages_ptr + row * frames + frame", "pages_ptr + row", "odd grid"),
    "no scale of pages": (append_gpu, "z = z / tl.load(", "z = z + 0 * tl.load(", "fp8 pages"),
    "norm by head": (append_gpu, "(1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / width + eps))",
                     "(1.0 / tl.sqrt(tl.sum(x * x, 1) / x.shape[1] + eps))[:, None]", "odd grid"),
    "columns rotated as rows": (append_gpu, "place % grid_width", "place // grid_width", "odd grid"),
    "turned the other way": (rope_gpu, "tl.where(is_second, sin, -sin)", "tl.where(is_second, -sin, sin)", "one token"),
    "halves for neighbours": (rope_gpu, "if HALF_SPLIT:", "if not HALF_SPLIT:", "a part of a head, apart"),
    "the end of a head turned": (
        rope_gpu, "tl.where(is_turned, cos, 1.0)", "tl.where(is_turned, cos, 0.0)", "a part of a head, side by side"
    ),
    "one head for all": (
        rope_gpu, "kv_head * k_head, is_kv_head", "0 * kv_head * k_head, is_kv_head", "grouped heads, sink"
    ),
    "gate of the first frame": (adaln_gpu, "(tokens // gate_frames)", "(tokens * gate_frames)", "odd sizes"),
    "mean of the padded row": (adaln_gpu, "tl.where(inside, x - mean, 0.0)", "x - mean", "odd sizes"),
    "scale without one": (adaln_gpu, "(1.0 + tl.load(scale_ptr", "(0.0 + tl.load(scale_ptr", "one token"),
    "residual before the update": (adaln_gpu, "        x += update\n", "", "one token"),
    "noise of another frame": (denoise_gpu, "zero + frame", "zero + frame + 1", "one patch"),
    "noise out of order": (denoise_gpu, "tl.join(one, three), tl.join(two, four)",
                           "tl.join(one, two), tl.join(three, four)", "one patch"),
    "frames of the first row": (noise_gpu, "row * frames_stride", "0 * frames_stride", "two rows, three frames"),
    "the key of the first row": (noise_gpu, "key_ptr + row", "key_ptr + 0 * row", "two rows, three frames"),
    "rows of a patch for columns": (denoise_gpu, "(y % PATCH_H) * PATCH_W + x_column % PATCH_W",
                                    "(x_column % PATCH_W) * PATCH_H + y % PATCH_H", "one patch"),
    "no GELU": (linear_gpu, "GELU=gelu", "GELU=False", "fp8, gelu"),
    "scale of another column": (
        linear_gpu, "weight_scale_ptr + offs_n,", "weight_scale_ptr + offs_n * 0,", "fp8, tails"
    ),
    "a tile short": (linear_gpu, "range(0, inner, INNER)", "range(0, inner - INNER, INNER)", "fp8, tails"),
    "no GELU of rows": (quantise_gpu, "GELU=gelu", "GELU=False", "fp8, gelu"),
    "the scale of one row": (quantise_gpu, "scale_ptr + row, scale", "scale_ptr, scale", "fp8"),
    "largest and not by size": (quantise_gpu, "tl.max(tl.abs(y), 0)", "tl.max(y, 0)", "fp8"),
    "rows cut": (quantise_gpu, "tl.floor(y + 0.5)", "tl.floor(y)", "int8"),
    "cut instead of rounded": (pages_gpu, "tl.floor(x + 0.5)", "tl.floor(x)", "to int8"),
    "the page it came from": (pages_gpu, "tl.load(target_pages_ptr", "tl.load(source_pages_ptr", "gather"),
    "the first stretch of a page": (
        pages_gpu, "tl.minimum((tl.program_id(2) + 1) * TOKENS", "tl.minimum(TOKENS", "from int8, two stretches"
    ),
    "largest of a part": (pages_gpu, "largest = tl.maximum(largest, tl.abs(x))", "largest = tl.abs(x)", "to int8"),
    "sum instead of mean": (rms_norm_gpu, "tl.sum(x * x, 0) / dim", "tl.sum(x * x, 0)", "one row"),
    "mean instead of length": (rms_silu_gpu, "tl.sqrt(tl.sum(x * x, 1))", "tl.sum(tl.abs(x), 1)", "odd sizes"),
    "a total without its residual": (
        rms_silu_gpu, "total_ptr + place, x.to", "total_ptr + place, tl.load(x_ptr + place, mask=inside, other=0.0).to",
        "bias, residual, total, tail",
    ),
    "the first pixels as tail": (rms_silu_gpu, "last = pixel - pixels + tail",
                                 "last = tl.where(pixel < tail, pixel, -1)", "bias, residual, total, tail"),
    "norm without the residual": (rms_silu_gpu, "    if RESIDUAL:", "    if False:", "residual alone"),
    "no bias of the convolution": (rms_silu_gpu, "    if BIAS:", "    if False:", "bias"),
    "bias of the first part": (epilogue_gpu, "bias_ptr + part * channels", "bias_ptr + 0 * part",
                               "two frames of one"),
    "frames out of order": (
        epilogue_gpu, "(pixel // area * PARTS + part)", "(part * (pixels // area) + pixel // area)", "two frames of one"
    ),
    "phases of columns for rows": (phases_gpu, "(down * 2 + right)", "(right * 2 + down)", "odd sizes"),
    "phases of one row": (phases_gpu, "row // 2 + down", "row // 2", "odd sizes"),
    "no bias of phases": (phases_gpu, "    if BIAS:", "    if False:", "odd sizes"),
    "negative after ReLU": (epilogue_gpu, "tl.where(x < 0.0, 0.0, x)", "x", "sum, relu"),
    "residual left out": (epilogue_gpu, "    if RESIDUAL:", "    if False:", "sum"),
    "history shifted": (denoise_gpu, "tl.load(weights_ptr + 3 + kept)", "tl.load(weights_ptr + 2 + kept)", "multistep"),
}  # fmt: skip


@triton.jit
def _words(counter_ptr, out_ptr, key, N: tl.constexpr):
    at = tl.arange(0, N)
    parts = counter_ptr + at * 4
    c0, c1, c2, c3 = tl.load(parts), tl.load(parts + 1), tl.load(parts + 2), tl.load(parts + 3)
    a, b, c, d = tl.philox(key, c0, c1, c2, c3)
    tl.store(out_ptr + at * 4, a)
    tl.store(out_ptr + at * 4 + 1, b)
    tl.store(out_ptr + at * 4 + 2, c)
    tl.store(out_ptr + at * 4 + 3, d)


@triton.jit
def _draw(out_ptr, key, frame, draw, stream, N: tl.constexpr):
    quad = tl.arange(0, N).to(tl.uint32)
    noise = denoise_gpu._noise(
        key.to(tl.int64), quad, frame.to(tl.uint32), draw.to(tl.uint32), stream.to(tl.uint32), N
    )
    tl.store(out_ptr + tl.arange(0, 4 * N), noise)


@pytest.mark.parametrize("key", [0, 1, 0x123456789ABCDEF0, 2**63 - 1])
def test_words_in_the_kernel_equal_the_reference_bit_for_bit(key):
    generator = torch.Generator().manual_seed(key % 1000)
    counters = torch.randint(0, 2**32, (64, 4), generator=generator)
    counters[0], counters[1] = 0, 2**32 - 1
    out = torch.empty(64, 4, dtype=torch.uint32)
    _words[(1,)](counters.to(torch.uint32), out, key, 64)
    assert (out.long() == philox4x32(counters, (key & 0xFFFFFFFF, key >> 32))).all()


def test_normals_in_the_kernel_equal_the_reference():
    out = torch.empty(4096)
    for key, frame, draw, stream in ((5, 0, 0, 0), (2**40 + 3, 4999, 3, 1)):
        _draw[(1,)](out, key, frame, draw, stream, 1024)
        want = philox_normals(key, range(frame, frame + 1), draw, (1, 64, 64), stream).flatten()
        assert (out - want).abs().max() <= 4e-6
        assert want.abs().max() > 3  # tails included


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_rejected(name, tmp_path):
    module, old, new, shown_by = WRONG[name]
    op = module.__package__.rpartition(".")[2]
    wrong = getattr(changed(module, old, new, tmp_path), op)
    with pytest.raises(AssertionError, match=r"is off by|not finite|beside|another integer"):
        check(SPECS[op], wrong, named(op, shown_by), torch.float16)
