"""qk_norm_rope_append in Triton: one program per token, for each of queries, keys and values.

Pairs are read as they lie and split in registers. A program of the first kind does a token's queries, of the
second its keys, of the third its values; each knows its width as a constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Warps by the width of a row: about 16 numbers of it to a thread.
WARPS = ((1024, 2), (2048, 4), (4096, 8), (1 << 30, 16))


@triton.jit
def _turns(table_ptr, at, first, count, pair):
    """Cosine and sine of the pairs that an axis owns, 0 elsewhere; `at` is the table's row."""
    mine = (pair >= first) & (pair < first + count)
    place = (at * count + pair - first) * 2
    return tl.load(table_ptr + place, mask=mine, other=0.0), tl.load(table_ptr + place + 1, mask=mine, other=0.0)


@triton.jit
def _rotated(x, time_ptr, row_ptr, column_ptr, time_at, row_at, column_at, pair,
             TIME: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x [BLOCK] with neighbouring entries rotated by the turns of their pair."""
    cos_t, sin_t = _turns(time_ptr, time_at, 0, TIME, pair)
    cos_r, sin_r = _turns(row_ptr, row_at, TIME, ROW, pair)
    cos_c, sin_c = _turns(column_ptr, column_at, TIME + ROW, COLUMN, pair)
    cos, sin = cos_t + cos_r + cos_c, sin_t + sin_r + sin_c
    even, odd = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit
def _normed(x_ptr, weight_ptr, at, width, eps):
    inside = at < width
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps))
    return x * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _append(
    qkv_ptr, q_weight_ptr, k_weight_ptr, time_ptr, row_ptr, column_ptr, q_ptr, kv_ptr, pages_ptr, sink_ptr,
    q_sink_ptr, scale_ptr, tokens, grid_width, page_tokens, num_pages, frames, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, ROW: tl.constexpr,
    COLUMN: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, TURNED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    row, inner = token // tokens, token % tokens
    frame, place = inner // page_tokens, inner % page_tokens
    time_at, row_at, column_at = row * frames + frame, place // grid_width, place % grid_width
    line = qkv_ptr + token * (HEADS + 2 * KV_HEADS) * DIM
    if kind == 0:
        at = tl.arange(0, QUERY_BLOCK)
        pair = tl.arange(0, QUERY_BLOCK // 2) % (DIM // 2)
        x = _normed(line, q_weight_ptr, at, HEADS * DIM, eps)
        y = _rotated(x, time_ptr, row_ptr, column_ptr, time_at, row_at, column_at, pair, TIME, ROW, COLUMN, QUERY_BLOCK)
        to = token * HEADS * DIM + at
        tl.store(q_ptr + to, y.to(q_ptr.dtype.element_ty), mask=at < HEADS * DIM)
        if TURNED:
            y = _rotated(
                x, sink_ptr, row_ptr, column_ptr, time_at, row_at, column_at, pair, TIME, ROW, COLUMN, QUERY_BLOCK
            )
            tl.store(q_sink_ptr + to, y.to(q_sink_ptr.dtype.element_ty), mask=at < HEADS * DIM)
    else:
        at = tl.arange(0, KEY_BLOCK)
        inside = at < KV_HEADS * DIM
        page = tl.load(pages_ptr + row * frames + frame).to(tl.int64) + (kind - 1) * num_pages
        if kind == 1:
            x = _normed(line + HEADS * DIM, k_weight_ptr, at, KV_HEADS * DIM, eps)
            pair = tl.arange(0, KEY_BLOCK // 2) % (DIM // 2)
            y = _rotated(
                x, time_ptr, row_ptr, column_ptr, time_at, row_at, column_at, pair, TIME, ROW, COLUMN, KEY_BLOCK
            )
        else:
            y = tl.load(line + (HEADS + KV_HEADS) * DIM + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            y = y / tl.load(scale_ptr + page * KV_HEADS + at // DIM, mask=inside, other=1.0)
            y = tl.minimum(tl.maximum(y, -448.0), 448.0)
        tl.store(
            kv_ptr + (page * page_tokens + place) * KV_HEADS * DIM + at, y.to(kv_ptr.dtype.element_ty), mask=inside
        )


def qk_norm_rope_append(
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
    """Launch for tensors that were checked; others stand in for those that are not there."""
    rows, tokens, heads, dim = q.shape
    query_block, key_block = (triton.next_power_of_2(count * dim) for count in (heads, kv.shape[3]))
    _append[(rows * tokens, 3)](
        qkv, q_weight, k_weight, time_turns, row_turns, column_turns, q, kv, pages,
        time_turns if sink_turns is None else sink_turns, q if q_sink is None else q_sink,
        time_turns if kv_scale is None else kv_scale,
        tokens, len(column_turns), kv.shape[2], kv.shape[1], pages.shape[1], eps,
        HEADS=heads, KV_HEADS=kv.shape[3], DIM=dim, TIME=time_turns.shape[2], ROW=row_turns.shape[1],
        COLUMN=column_turns.shape[1], QUERY_BLOCK=query_block, KEY_BLOCK=key_block, TURNED=q_sink is not None,
        SCALED=kv_scale is not None, num_warps=next(warps for width, warps in WARPS if query_block <= width),
    )  # fmt: skip


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from ..spec import Case
    from .reference import make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"plain": {}, "sink": {"sinks": True}}
    if capability >= 89:
        variants["fp8"] = {"fp8": True}
    return {
        f"{name} bf16 h{heads}": make_inputs(
            Case(name, sizes(1, 1, 4, 4, heads, heads, 128), options), torch.bfloat16, "cpu", 0
        )
        for name, options in variants.items()
        for heads in (12, 40)
    }
