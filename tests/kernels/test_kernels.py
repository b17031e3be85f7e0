"""Ops on the CPU: references, schemas, bad input; and the kernels themselves in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checker import check

from inferix.kernels.block_attention import block_attention, merge_partials
from inferix.kernels.catalog import SPECS
from inferix.kernels.spec import using

HERE = Path(__file__).parent


def test_every_kernel_in_the_interpreter_and_every_wrong_one_rejected():
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(HERE), *sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
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


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_the_op_tells_torch_the_truth_about_itself(spec):
    op = getattr(torch.ops.inferix, spec.name).default
    for case in spec.test_cases:
        inputs = spec.make_inputs(case, torch.float32, "cpu", 0)
        if any(torch.is_tensor(value) and value.dtype == torch.float8_e4m3fn for value in inputs.values()):
            continue  # torch's checker cannot compare FP8 itself
        torch.library.opcheck(op, (), inputs)


def test_paged_attention_over_shuffled_pages_equals_attention_in_order():
    spec = SPECS["block_attention"]
    inputs = spec.make_inputs(spec.test_cases[1], torch.float64, "cpu", 3)
    args = {name: inputs[name] for name in ("q", "kv", "page_table", "page_count")}
    tokens = args["kv"][:, args["page_table"][0].long()].flatten(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (args["q"][0], *tokens))
    )[0].transpose(0, 1)
    assert (block_attention(**args)[0] - want).abs().max() <= 1e-12


def test_parts_of_the_keys_merge_into_the_whole():
    spec = SPECS["block_attention"]
    inputs = spec.make_inputs(spec.test_cases[2], torch.float64, "cpu", 4)
    q, kv, table = (inputs[name] for name in ("q", "kv", "page_table"))
    counts = torch.full((2,), 6, dtype=torch.int32)
    whole = block_attention(q, kv, table, counts)
    outs, lses = [], []
    for part in (table[:, :2], table[:, 2:]):
        lses.append(torch.empty(2, 6, 16))
        size = torch.full((2,), part.shape[1], dtype=torch.int32)
        outs.append(block_attention(q, kv, part.contiguous(), size, lse=lses[-1]))
    assert (merge_partials(torch.stack(outs), torch.stack(lses)) - whole).abs().max() <= 1e-6


def test_the_window_may_be_relative_by_turning_the_query_once_more():
    """Keys rotated at absolute positions, queries turned by the sink's extra distance: as if keys had moved."""
    from inferix.kernels.rope import rope_angles, rotate

    torch.manual_seed(1)
    raw_q, raw_k, v = torch.randn(3, 5, 4, 2, 64, dtype=torch.float64)  # 5 frames of 4 tokens
    frames, at = (0, 7, 8, 9, 10), range(5)
    q = raw_q[4:].flatten(0, 1)[None]
    keys = rotate(raw_k.flatten(0, 1)[None], rope_angles(frames, 2, 2, 64))[0].view(5, 4, 2, 64)
    kv = torch.stack((keys, v))
    table, count = torch.arange(5, dtype=torch.int32)[None], torch.tensor([5], dtype=torch.int32)
    got = block_attention(
        rotate(q, rope_angles([10], 2, 2, 64)), kv, table, count,
        q_sink=rotate(q, rope_angles([4], 2, 2, 64)), sink_count=torch.tensor([1], dtype=torch.int32),
    )  # fmt: skip
    moved = rotate(raw_k.flatten(0, 1)[None], rope_angles(list(at), 2, 2, 64))[0].view(5, 4, 2, 64)
    want = block_attention(rotate(q, rope_angles([4], 2, 2, 64)), torch.stack((moved, v)), table, count)
    assert (got - want).abs().max() <= 1e-12


def test_torch_attention_serves_where_pages_are_one_run():
    spec = SPECS["block_attention"]
    inputs = spec.make_inputs(spec.test_cases[0], torch.float32, "cpu", 0)
    args = {name: inputs[name] for name in ("q", "kv", "page_table", "page_count")}
    want = block_attention(**args)
    with using(block_attention="sdpa"):
        assert (block_attention(**args) - want).abs().max() <= 1e-5
        shuffled = spec.make_inputs(spec.test_cases[1], torch.float32, "cpu", 0)
        with pytest.raises(ValueError, match="pages that follow each other"):
            block_attention(**{name: shuffled[name] for name in args})
    with using(block_attention="cuda-core"), pytest.raises(ValueError, match="no implementation 'cuda-core'"):
        block_attention(**args)


ATTENTION_MISTAKES = {
    "head dim of q is 48; expected one of 64, 128": {"q": torch.zeros(1, 4, 2, 48)},
    "tokens of q is 0": {"q": torch.zeros(1, 0, 2, 64)},
    "3 heads of q are no multiple of 2": {"q": torch.zeros(1, 4, 3, 64)},
    "dtype of kv is torch.float64": {"kv": torch.zeros(2, 3, 5, 2, 64, dtype=torch.float64)},
    "dtype of page_table is torch.int64; expected torch.int32": {"page_table": torch.zeros(1, 3, dtype=torch.int64)},
    "shape of page_count is (2,)": {"page_count": torch.ones(2, dtype=torch.int32)},
    "kv_scale is given is True; expected False": {"kv_scale": torch.ones(2, 3, 2)},
    "q_sink and sink_count are both given": {"q_sink": torch.zeros(1, 4, 2, 64)},
    "q has strides": {"q": torch.zeros(1, 4, 64, 2).transpose(2, 3)},
    "shape of out is (1, 5, 2, 64)": {"out": torch.zeros(1, 5, 2, 64)},
    "page_table is [1, 0]; expected [1, 1 or more]": {"page_table": torch.zeros(1, 0, dtype=torch.int32)},
    "row 0 lists page 3; expected 0..2": {"page_table": torch.tensor([[0, 3, 1]], dtype=torch.int32)},
    "page_count of row 0 is 0; expected 1..3": {"page_count": torch.zeros(1, dtype=torch.int32)},
}


@pytest.mark.parametrize("said", ATTENTION_MISTAKES)
def test_bad_input_of_attention_is_named(said, monkeypatch):
    monkeypatch.setenv("INFERIX_DEBUG", "1")
    good = {
        "q": torch.zeros(1, 4, 2, 64), "kv": torch.zeros(2, 3, 5, 2, 64),
        "page_table": torch.arange(3, dtype=torch.int32)[None], "page_count": torch.tensor([3], dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match="block_attention: ") as caught:
        block_attention(**good | ATTENTION_MISTAKES[said])
    assert said in str(caught.value)
