"""`qk_norm_rope_append`: from the fused projection to rotated queries and to keys and values in their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    ARCHITECTURES,
    FLOATS,
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
from .reference import FP8, turns_of

SPEC = KernelSpec(
    name="qk_norm_rope_append",
    reference=reference.qk_norm_rope_append,
    outputs=("q", "q_sink", "kv"),
    like="qkv",
    implementations=(
        Implementation("triton", ".qk_norm_rope_append.gpu:qk_norm_rope_append", ARCHITECTURES, FLOATS),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    kv: Tensor,
    pages: Tensor,
    *,
    heads: int,
    sink_turns: Tensor | None = None,
    q_sink: Tensor | None = None,
    kv_scale: Tensor | None = None,
    eps: float = 1e-6,
    q: Tensor | None = None,
) -> Tensor:
    """Normalise queries and keys over their full width, rotate them in three axes, write keys and values.

    qkv: [R, F*H*W, (heads + 2*Hkv) * D], a fused projection; q_weight [heads*D], k_weight [Hkv*D] of the RMS norm.
    time_turns: float32 [R, F, a, 2], row_turns: [H, b, 2], column_turns: [W, c, 2], cosines and sines of the
    angles of each pair (2j, 2j + 1), a + b + c = D/2; `turns_of` makes them. kv: [2, pages, H*W, Hkv, D], in qkv's
    dtype or FP8 with kv_scale float32 [2, pages, Hkv] (entries beyond 448 are clipped). pages: int32 [R, F],
    the page of each frame, each once. sink_turns with q_sink, or neither: the same queries turned otherwise, for
    `block_attention`. q: [R, F*H*W, heads, D]. Returns q.

    Raises ValueError naming the dimension that does not fit. Pages and scales are read on the device and not checked;
    INFERIX_DEBUG=1 checks them at the price of a wait.
    Source: Wan 2.1 (arXiv 2503.20314); RoFormer (arXiv 2104.09864).
    """
    expect(SPEC.name, "dims of kv", kv.ndim, 5)
    if q is None:
        q = qkv.new_empty(*qkv.shape[:2], heads, kv.shape[4])
    args = (qkv, q_weight, k_weight, time_turns, row_turns, column_turns, q, kv, pages, sink_turns, q_sink, kv_scale)
    check(*args)
    torch.ops.inferix.qk_norm_rope_append(*args, eps)
    return q


@torch.library.custom_op("inferix::qk_norm_rope_append", mutates_args=("q", "kv", "q_sink"))
def _op(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    sink_turns: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    eps: float,
) -> None:
    args = (qkv, q_weight, k_weight, time_turns, row_turns, column_turns, q, kv, pages, sink_turns, q_sink, kv_scale)
    SPEC.choose(qkv)(*args, eps)


@_op.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    sink_turns: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    eps: float,
) -> None:
    return None


def check(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    sink_turns: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
) -> None:
    """ValueError unless the tensors fit each other."""
    op = SPEC.name
    for name, tensor, dims in (
        ("qkv", qkv, 3), ("q", q, 4), ("pages", pages, 2), ("time_turns", time_turns, 4),
        ("row_turns", row_turns, 3), ("column_turns", column_turns, 3),
    ):  # fmt: skip
        expect(op, f"dims of {name}", tensor.ndim, dims)
    rows, frames = pages.shape
    height, width, (heads, dim) = len(row_turns), len(column_turns), q.shape[2:]
    kv_heads, tokens = kv.shape[3], frames * height * width
    expect_one_of(op, "dtype of qkv", qkv.dtype, tuple(SPEC.tolerance))
    if qkv.numel() == 0:
        raise ValueError(f"{op}: qkv is {list(qkv.shape)}; expected 1 or more of each")
    pairs = time_turns.shape[2] + row_turns.shape[1] + column_turns.shape[1]
    expect(op, "pairs of the three tables together", pairs, dim // 2)
    expect(op, "tokens of a page", kv.shape[2], height * width)
    expect_one_of(op, "dtype of kv", kv.dtype, (qkv.dtype, FP8))
    expect(op, "kv_scale is given", kv_scale is not None, kv.dtype == FP8)
    expect(op, "sink_turns and q_sink are both given", sink_turns is None, q_sink is None)
    table = (rows, frames, time_turns.shape[2], 2)
    shapes = {
        "qkv": (qkv, (rows, tokens, (heads + 2 * kv_heads) * dim), qkv.dtype),
        "q_weight": (q_weight, (heads * dim,), qkv.dtype),
        "k_weight": (k_weight, (kv_heads * dim,), qkv.dtype),
        "time_turns": (time_turns, table, torch.float32),
        "row_turns": (row_turns, (height, row_turns.shape[1], 2), torch.float32),
        "column_turns": (column_turns, (width, column_turns.shape[1], 2), torch.float32),
        "q": (q, (rows, tokens, heads, dim), qkv.dtype),
        "kv": (kv, (2, kv.shape[1], height * width, kv_heads, dim), kv.dtype),
        "pages": (pages, (rows, frames), torch.int32),
        "sink_turns": (sink_turns, table, torch.float32),
        "q_sink": (q_sink, (rows, tokens, heads, dim), qkv.dtype),
        "kv_scale": (kv_scale, (2, kv.shape[1], kv_heads), torch.float32),
    }
    for name, (given, shape, dtype) in shapes.items():
        if given is not None:
            expect(op, f"shape of {name}", tuple(given.shape), shape)
            wide = qkv.dtype == torch.float64 and dtype == torch.float32 and given.dtype == torch.float64
            expect(op, f"dtype of {name}", given.dtype, torch.float64 if wide else dtype)
    everything = {name: given for name, (given, _, _) in shapes.items()}
    expect_together(op, qkv.device, **everything)
    expect_dense(op, **everything)
    if debugging():
        expect_pages(op, "pages", pages, kv.shape[1], once=True)
        expect_scales(op, kv_scale)


__all__ = ["SPEC", "qk_norm_rope_append", "turns_of"]
