"""`attention_parts`: block attention over parts of the keys, for grids that leave multiprocessors idle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..block_attention import HEAD_DIMS, check_values
from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FP8, Arg, Implementation, KernelSpec
from . import reference

QUERIES = "rows tokens heads dim"

SPEC = KernelSpec(
    name="attention_parts",
    reference=reference.attention_parts,
    outputs=("out", "lse"),
    like="q",
    args={
        "q": Arg(QUERIES, ANY_FLOAT),
        "kv": Arg("2 pages page_tokens kv_heads dim", ("q", FP8), listed_by="page_table"),
        "page_table": Arg("rows table_width", (torch.int32,)),
        "page_count": Arg("rows", (torch.int32,)),
        "out": Arg("parts " + QUERIES, (torch.float32,)),
        "lse": Arg("parts rows heads tokens", (torch.float32,)),
        "q_sink": Arg(QUERIES, ("q",)),
        "sink_count": Arg("rows", (torch.int32,)),
        "kv_scale": Arg("2 pages kv_heads", (torch.float32,), listed_by="page_table"),
    },
    rules=("heads % kv_heads == 0",),
    needs=(("q_sink", "sink_count"), ("sink_count", "q_sink")),
    scaled={"kv": "kv_scale"},
    family="attention",
    label="attention, in parts",
    flops="4 * tokens * heads * dim * listed * page_tokens",
    counted_by="page_count",
    check_values=check_values,
    implementations=(
        Implementation("triton", ".attention_parts.gpu:attention_parts", ARCHITECTURES, last_dims=HEAD_DIMS),
        Implementation("descriptors", ".attention_parts.descriptors:attention_parts", (90, 100), last_dims=HEAD_DIMS),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    reads_host=("reference",),
    tensor_cores=True,
    shape_names={"q": ("tokens",), "kv": ("pages", "page_tokens")},
)
OP = Op(SPEC)


def attention_parts(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    parts: int,
    *,
    q_sink: Tensor | None = None,
    sink_count: Tensor | None = None,
    kv_scale: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over each of `parts` parts of the keys: float32 results [parts, R, T, H, D], and [parts, R, H, T].

    The second are natural logs of the sums of exponentials, with which `merge_parts` joins the results. The keys of the
    listed pages, as if they lay one after the other, are cut at multiples of 128; a part without keys has a result of 0
    and the log of 0. Arguments are those of `block_attention`, with one list of pages a row.

    Raises UsageError naming the argument that does not fit.
    Source: Flash-Decoding (Dao et al., 2023, pytorch.org/blog/flash-decoding).
    """
    rows, tokens, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(parts, rows, tokens, heads, dim, dtype=wide, device=q.device)
    lse = torch.empty(parts, rows, heads, tokens, dtype=wide, device=q.device)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    OP(q, kv, page_table, page_count, out, lse, q_sink, sink_count, kv_scale, scale)
    return out, lse


__all__ = ["SPEC", "attention_parts"]
