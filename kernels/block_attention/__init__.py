"""`block_attention`: attention of a block's queries over the pages of a KV cache, read where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FP8, Arg, Implementation, KernelSpec, expect_pages, expect_scales
from . import reference
from .reference import merge_partials

HEAD_DIMS = (64, 128)  # of the GPU kernels; others are left to the reference
QUERIES = "rows tokens heads dim"


def check_values(given: Mapping[str, Any]) -> None:
    """UsageError for a count or a listed page that is out of range, or a scale that is not above 0."""
    table, sinks, pages = given["page_table"], given["sink_count"], given["kv"].shape[1]
    width = table.shape[-1]
    table, sinks = table.reshape(-1, width), None if sinks is None else sinks.flatten()
    for row, count in enumerate(given["page_count"].flatten().tolist()):
        if not 1 <= count <= width:
            raise UsageError(f"{SPEC.name}: page_count of row {row} is {count}; expected 1..{width}")
        expect_pages(SPEC.name, f"row {row} of page_table", table[row, :count], pages)
        if sinks is not None and not 0 <= int(sinks[row]) <= count:
            raise UsageError(f"{SPEC.name}: sink_count of row {row} is {int(sinks[row])}; expected 0..{count}")
    expect_scales(SPEC.name, given["kv_scale"])


SPEC = KernelSpec(
    name="block_attention",
    reference=reference.block_attention,
    outputs=("out", "lse"),
    like="q",
    args={
        "q": Arg(QUERIES, ANY_FLOAT),
        "kv": Arg("2 pages page_tokens kv_heads dim", ("q", FP8), listed_by="page_table"),
        "page_table": Arg("rows table_width", (torch.int32,), or_dims="rows head_groups table_width"),
        "page_count": Arg("rows", (torch.int32,), or_dims="rows head_groups"),
        "out": Arg(QUERIES, ("q",)),
        "q_sink": Arg(QUERIES, ("q",)),
        "sink_count": Arg("rows", (torch.int32,), or_dims="rows head_groups"),
        "kv_scale": Arg("2 pages kv_heads", (torch.float32,), listed_by="page_table"),
        "lse": Arg("rows heads tokens", (torch.float32,)),
    },
    rules=("heads % kv_heads == 0", "heads % head_groups == 0"),
    defaults={"head_groups": 1},
    needs=(("q_sink", "sink_count"), ("sink_count", "q_sink")),
    scaled={"kv": "kv_scale"},
    family="attention",
    label="attention",
    flops="4 * tokens * heads // head_groups * dim * listed * page_tokens",
    counted_by="page_count",
    check_values=check_values,
    implementations=(
        Implementation("triton", ".block_attention.gpu:block_attention", ARCHITECTURES, last_dims=HEAD_DIMS),
        Implementation("descriptors", ".block_attention.descriptors:block_attention", (90, 100), last_dims=HEAD_DIMS),
        Implementation(
            "hopper", ".block_attention.hopper:block_attention", (90,), (torch.bfloat16,), (128,),
            # a page holds a tile of keys; a tile's row in the store is a 32-bit number
            rules=("page_tokens >= 128", "head_groups == 1", "has_kv_scale == 0", "2 * pages * page_tokens < 2**31"),
            otherwise="triton", unproved="compiled and simulated only: no card has run it",
        ),
        Implementation(
            "fp8_qk", ".block_attention.fp8_qk:block_attention", (90,), last_dims=HEAD_DIMS,
            rules=("has_kv_scale == 1", "head_groups == 1"), otherwise="triton",
            unproved="compiled and interpreted only: no card has run it",
            reference=".block_attention.fp8_qk:reference",
        ),
        Implementation("sdpa", ".block_attention.sdpa:block_attention"),
        Implementation("flash_attn", ".block_attention.flash:block_attention"),
        Implementation("cpu", ".block_attention.cpu:block_attention", cpu=True),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    reads_host=("reference", "sdpa", "flash_attn", "cpu"),
    tensor_cores=True,
    shape_names={"q": ("tokens",), "kv": ("pages", "page_tokens")},
)
OP = Op(SPEC)


def block_attention(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    *,
    q_sink: Tensor | None = None,
    sink_count: Tensor | None = None,
    kv_scale: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each row's queries over all tokens of the pages listed for it.

    A row is a query group of a session. The frames it attends to (window, sink, pinned) are the pages listed for it;
    softmax does not depend on their order, and there is no mask. Neighbouring pages are read as one run.

    q: [R, T, H, D], rotated; other D than 64 and 128 run as the reference. kv: [2, pages, page_tokens, Hkv, D], keys
    then values, in q's dtype or in FP8 (e4m3) with kv_scale float32 [2, pages, Hkv], above 0; with FP8, products are
    in float16. Hkv divides H. page_table: int32 [R, pages]. page_count: int32 [R], at least 1. q_sink: q rotated for
    the first `sink_count` (int32 [R]) listed pages, whose distance differs where positions count within the window;
    both or neither. scale: by default 1/sqrt(D), above 0.
    Sparse attention lists pages for each of G equal groups of heads: page_table [R, G, pages], page_count and
    sink_count [R, G]. The reference and the CPU form take that; the GPU kernels refuse it.
    out: [R, T, H, D], where to write. lse: float32 [R, H, T], filled with the natural log of the sum of
    exponentials, with which `merge_partials` joins results over parts of the keys.

    Raises UsageError naming the argument for shapes, dtypes, devices and strides that do not fit. Page ids, counts
    and scales are read on the device and not checked; INFERIX_DEBUG=1 checks them here at the price of a wait.
    Source: FlashAttention-2 (arXiv 2307.08691); PagedAttention (arXiv 2309.06180).
    """
    out = torch.empty_like(q) if out is None else out
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not scale > 0:
        raise UsageError(f"{SPEC.name}: scale is {scale}; expected a number above 0")
    for name, count in (("page_count", page_count), ("sink_count", sink_count)):
        if count is not None and count.shape != page_table.shape[:-1]:
            shape, expected = list(count.shape), list(page_table.shape[:-1])
            raise UsageError(f"{SPEC.name}: shape of {name} is {shape}; expected {expected}, a number for each list")
    OP(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale)
    return out


__all__ = ["SPEC", "block_attention", "merge_partials"]
