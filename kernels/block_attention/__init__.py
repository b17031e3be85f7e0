"""`block_attention`: attention of a block's queries over the pages of a KV cache, read where they lie."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..spec import ARCHITECTURES, Implementation, KernelSpec, expect, expect_dense, expect_one_of, expect_together
from . import reference
from .reference import FP8, merge_partials

SPEC = KernelSpec(
    name="block_attention",
    reference=reference.block_attention,
    outputs=("out", "lse"),
    implementations=(
        Implementation("triton", ".block_attention.gpu:block_attention", ARCHITECTURES),
        Implementation("descriptors", ".block_attention.descriptors:block_attention", (90, 100)),
        Implementation("sdpa", ".block_attention.sdpa:block_attention"),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


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

    A row is a query group of a session. Which frames it sees (window, sink, pinned) is just which pages are
    listed; softmax does not care about their order, and there is no mask. Neighbouring pages are walked as one run.

    q: [R, T, H, D], rotated; D is 64 or 128 for Triton. kv: [2, pages, page_tokens, Hkv, D], keys then values, in q's
    dtype or in FP8 (e4m3) with kv_scale float32 [2, pages, Hkv]; Hkv divides H. page_table: int32 [R, at most 4096].
    page_count: int32 [R], at least 1. q_sink: q rotated for the first `sink_count` (int32 [R]) listed pages,
    whose distance differs where positions count within the window; both or neither. scale: 1/sqrt(D) unless told.
    out: [R, T, H, D], where to write. lse: float32 [R, H, T], filled with the natural log of the sum of
    exponentials, with which `merge_partials` joins results over parts of the keys.

    Raises ValueError naming the dimension for shapes, dtypes, devices and strides that do not fit. Page ids and
    counts are read on the device; INFERIX_DEBUG=1 checks them here at the price of a wait.
    Source: FlashAttention-2 (arXiv 2307.08691); PagedAttention (arXiv 2309.06180).
    """
    out = torch.empty_like(q) if out is None else out
    check(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    torch.ops.inferix.block_attention(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale)
    return out


@torch.library.custom_op("inferix::block_attention", mutates_args=("out", "lse"))
def _op(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
    scale: float,
) -> None:
    SPEC.choose(q)(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale)


@_op.register_fake
def _(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
    scale: float,
) -> None:
    return None


def check(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
) -> None:
    """ValueError unless the tensors fit each other."""
    op = SPEC.name
    expect(op, "dims of q", q.ndim, 4)
    expect(op, "dims of kv", kv.ndim, 5)
    rows, tokens, heads, dim = q.shape
    pages, kv_heads = kv.shape[1], kv.shape[3]
    expect_one_of(op, "dtype of q", q.dtype, tuple(SPEC.tolerance))
    if SPEC.chosen(q.device, q.dtype) == "triton":
        expect_one_of(op, "head dim of q", dim, (64, 128))
    for name, size in (("rows of q", rows), ("tokens of q", tokens), ("page_tokens of kv", kv.shape[2])):
        if size == 0:
            raise ValueError(f"{op}: {name} is 0; expected 1 or more")
    expect(op, "first dim of kv", kv.shape[0], 2)
    expect(op, "head dim of kv", kv.shape[4], dim)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: {heads} heads of q are no multiple of {kv_heads} heads of kv")
    expect_one_of(op, "dtype of kv", kv.dtype, (q.dtype, FP8))
    expect(op, "kv_scale is given", kv_scale is not None, kv.dtype == FP8)
    expect(op, "q_sink and sink_count are both given", q_sink is None, sink_count is None)
    if page_table.ndim != 2 or page_table.shape[1] == 0:
        raise ValueError(f"{op}: page_table is {list(page_table.shape)}; expected [{rows}, 1 or more]")
    shapes = {
        "page_table": (page_table, (rows, page_table.shape[1]), torch.int32),
        "page_count": (page_count, (rows,), torch.int32),
        "out": (out, (rows, tokens, heads, dim), q.dtype),
        "q_sink": (q_sink, (rows, tokens, heads, dim), q.dtype),
        "sink_count": (sink_count, (rows,), torch.int32),
        "kv_scale": (kv_scale, (2, pages, kv_heads), torch.float32),
        "lse": (lse, (rows, heads, tokens), torch.float32),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tensor is not None:
            expect(op, f"shape of {name}", tuple(tensor.shape), shape)
            expect(op, f"dtype of {name}", tensor.dtype, dtype)
    given = {name: tensor for name, (tensor, _, _) in shapes.items()}
    expect_together(op, q.device, kv=kv, **given)
    expect_dense(op, q=q, kv=kv, **given)
    if os.environ.get("INFERIX_DEBUG") == "1":
        check_pages(page_table, page_count, pages)


def check_pages(page_table: Tensor, page_count: Tensor, pages: int) -> None:
    """ValueError for a count or a listed page that is out of range."""
    for row, (listed, count) in enumerate(zip(page_table.tolist(), page_count.tolist(), strict=True)):
        if not 1 <= count <= len(listed):
            raise ValueError(f"{SPEC.name}: page_count of row {row} is {count}; expected 1..{len(listed)}")
        if wrong := [page for page in listed[:count] if not 0 <= page < pages]:
            raise ValueError(f"{SPEC.name}: row {row} lists page {wrong[0]}; expected 0..{pages - 1}")


__all__ = ["SPEC", "block_attention", "merge_partials"]
