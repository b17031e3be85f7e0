"""`block_attention`: attention of a block's queries over the pages of a KV cache, read where they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import (
    ARCHITECTURES,
    Implementation,
    KernelSpec,
    debugging,
    expect,
    expect_dense,
    expect_one_of,
    expect_pages,
    expect_scales,
    expect_together,
)
from . import reference
from .reference import FP8, merge_partials

HEAD_DIMS = (64, 128)  # of the GPU kernels; others are left to the reference
SPEC = KernelSpec(
    name="block_attention",
    reference=reference.block_attention,
    outputs=("out", "lse"),
    like="q",
    implementations=(
        Implementation("triton", ".block_attention.gpu:block_attention", ARCHITECTURES, last_dims=HEAD_DIMS),
        Implementation("descriptors", ".block_attention.descriptors:block_attention", (90, 100), last_dims=HEAD_DIMS),
        Implementation("sdpa", ".block_attention.sdpa:block_attention"),
        Implementation("flash_attn", ".block_attention.flash:block_attention"),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
    reads_host=("reference", "sdpa", "flash_attn"),
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

    q: [R, T, H, D], rotated; other D than 64 and 128 run as the reference. kv: [2, pages, page_tokens, Hkv, D], keys
    then values, in q's dtype or in FP8 (e4m3) with kv_scale float32 [2, pages, Hkv], above 0; with FP8, products are
    in float16. Hkv divides H. page_table: int32 [R, pages]. page_count: int32 [R], at least 1. q_sink: q rotated for
    the first `sink_count` (int32 [R]) listed pages, whose distance differs where positions count within the window;
    both or neither. scale: 1/sqrt(D) unless told, above 0.
    out: [R, T, H, D], where to write. lse: float32 [R, H, T], filled with the natural log of the sum of
    exponentials, with which `merge_partials` joins results over parts of the keys.

    Raises ValueError naming the dimension for shapes, dtypes, devices and strides that do not fit. Page ids, counts
    and scales are read on the device and not checked; INFERIX_DEBUG=1 checks them here at the price of a wait.
    Source: FlashAttention-2 (arXiv 2307.08691); PagedAttention (arXiv 2309.06180).
    """
    out = torch.empty_like(q) if out is None else out
    check(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not scale > 0:
        raise ValueError(f"{SPEC.name}: scale is {scale}; expected a number above 0")
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
    sizes = {"rows of q": rows, "tokens of q": tokens, "heads of q": heads, "head dim of q": dim}
    for name, size in (sizes | {"pages of kv": pages, "page_tokens of kv": kv.shape[2]}).items():
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
    if debugging():
        check_lists(page_table, page_count, sink_count, pages)
        expect_scales(op, kv_scale)


def check_lists(page_table: Tensor, page_count: Tensor, sink_count: Tensor | None, pages: int) -> None:
    """ValueError for a count or a listed page that is out of range."""
    width = page_table.shape[1]
    for row, count in enumerate(page_count.tolist()):
        if not 1 <= count <= width:
            raise ValueError(f"{SPEC.name}: page_count of row {row} is {count}; expected 1..{width}")
        expect_pages(SPEC.name, f"row {row} of page_table", page_table[row, :count], pages)
        if sink_count is not None and not 0 <= int(sink_count[row]) <= count:
            raise ValueError(f"{SPEC.name}: sink_count of row {row} is {int(sink_count[row])}; expected 0..{count}")


__all__ = ["SPEC", "block_attention", "merge_partials"]
