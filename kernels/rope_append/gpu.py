"""rope_append in Triton: one program per token, for each of queries, keys and values.

A program of the first kind does a token's queries, of the second its keys, of the third its values. Heads are rows of
a tile. Every channel is rotated with its partner, which is loaded at its own offset, so that pairs may lie side by side
or apart and may leave the end of a head as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..qk_norm_rope_append.gpu import CONFIGS, Config, candidates
from ..spec import expect_fp8

__all__ = ["CONFIGS", "Config", "candidates", "compile_cases", "rope_append"]


@triton.jit
def _axis(table_ptr, line, pair, first, COUNT: tl.constexpr):
    """Cosines and sines of an axis at the pairs [first, first + COUNT) of a head, 0 at others."""
    inside = (pair >= first) & (pair < first + COUNT)
    place = table_ptr + (line * COUNT + pair - first) * 2
    cos = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return cos, tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rotated(
    x_ptr, offs_head, inside, time_ptr, rows_ptr, columns_ptr, time_line, grid_row, grid_column,
    DIM: tl.constexpr, TIME: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, HALF_SPLIT: tl.constexpr,
):  # fmt: skip
    """Heads of a token at offsets [HEADS, 1], rotated: [HEADS, DIM]."""
    PAIRS: tl.constexpr = TIME + ROW + COLUMN
    offs_d = tl.arange(0, DIM)[None]
    if HALF_SPLIT:
        is_second = offs_d >= PAIRS
        pair = tl.where(is_second, offs_d - PAIRS, offs_d)
        partner = tl.where(is_second, offs_d - PAIRS, offs_d + PAIRS)
    else:
        is_second = offs_d % 2 == 1
        pair = offs_d // 2
        partner = offs_d ^ 1
    is_turned = offs_d < 2 * PAIRS
    cos, sin = _axis(time_ptr, time_line, pair, 0, TIME)
    row_cos, row_sin = _axis(rows_ptr, grid_row, pair, TIME, ROW)
    column_cos, column_sin = _axis(columns_ptr, grid_column, pair, TIME + ROW, COLUMN)
    cos, sin = cos + row_cos + column_cos, sin + row_sin + column_sin
    cos = tl.where(is_turned, cos, 1.0)
    sin = tl.where(is_second, sin, -sin)
    x = tl.load(x_ptr + offs_head + offs_d, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + offs_head + partner, mask=inside & is_turned, other=0.0).to(tl.float32)
    return x * cos + other * sin


@triton.jit
def _append(
    q_ptr, k_ptr, v_ptr, time_ptr, rows_ptr, columns_ptr, out_ptr, kv_ptr, pages_ptr, sink_ptr, q_sink_ptr, scale_ptr,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, out_row, out_token, out_head,
    sink_row, sink_token, sink_head, tokens, grid_width, page_tokens, num_pages, frames,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, ROW: tl.constexpr,
    COLUMN: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, HALF_SPLIT: tl.constexpr, SINK: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # of all rows
    kind = tl.program_id(1)  # 0 queries, 1 keys, 2 values
    row, inner = token // tokens, token % tokens
    frame, place = inner // page_tokens, inner % page_tokens  # place: of the token in its frame
    time_line, grid_row, grid_column = row * frames + frame, place // grid_width, place % grid_width
    offs_d = tl.arange(0, DIM)[None]
    if kind == 0:
        head = tl.arange(0, Q_ROWS)[:, None]
        inside = head < HEADS
        x_ptr = q_ptr + row * q_row + inner * q_token
        y = _rotated(x_ptr, head * q_head, inside, time_ptr, rows_ptr, columns_ptr, time_line, grid_row, grid_column,
                     DIM, TIME, ROW, COLUMN, HALF_SPLIT)  # fmt: skip
        out_line = out_ptr + row * out_row + inner * out_token
        tl.store(out_line + head * out_head + offs_d, y.to(out_ptr.dtype.element_ty), mask=inside)
        if SINK:
            y = _rotated(x_ptr, head * q_head, inside, sink_ptr, rows_ptr, columns_ptr, time_line, grid_row,
                         grid_column, DIM, TIME, ROW, COLUMN, HALF_SPLIT)  # fmt: skip
            sink_line = q_sink_ptr + row * sink_row + inner * sink_token
            tl.store(sink_line + head * sink_head + offs_d, y.to(q_sink_ptr.dtype.element_ty), mask=inside)
    else:
        kv_head = tl.arange(0, K_ROWS)[:, None]  # names of a branch are its own: their shapes differ
        is_kv_head = kv_head < KV_HEADS
        page = tl.load(pages_ptr + row * frames + frame).to(tl.int64) + (kind - 1) * num_pages
        if kind == 1:
            z = _rotated(k_ptr + row * k_row + inner * k_token, kv_head * k_head, is_kv_head, time_ptr, rows_ptr,
                         columns_ptr, time_line, grid_row, grid_column, DIM, TIME, ROW, COLUMN,
                         HALF_SPLIT)  # fmt: skip
        else:
            v_line = v_ptr + row * v_row + inner * v_token
            z = tl.load(v_line + kv_head * v_head + offs_d, mask=is_kv_head, other=0.0).to(tl.float32)
        if SCALED:
            z = z / tl.load(scale_ptr + page * KV_HEADS + kv_head, mask=is_kv_head, other=1.0)
            z = tl.minimum(tl.maximum(z, -448.0), 448.0)
        kv_line = kv_ptr + (page * page_tokens + place) * KV_HEADS * DIM  # kv: [2, pages, page_tokens, KV_HEADS, DIM]
        tl.store(kv_line + kv_head * DIM + offs_d, z.to(kv_ptr.dtype.element_ty), mask=is_kv_head)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    out: Tensor,
    kv: Tensor,
    pages: Tensor,
    rope_sink: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    half_split: bool,
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked, head dims that are powers of two; others stand in for those not there.

    Heads of q, k, v and the results may lie apart, as slices of a wider matrix do; channels of a head lie together.
    """
    if kv_scale is not None:
        expect_fp8("rope_append", q.device)
    rows, tokens, heads, dim = q.shape
    if dim & (dim - 1):
        raise ValueError(f"rope_append: head dim of q is {dim}; implementation triton needs a power of two")
    assert all(part.stride(3) == 1 for part in (q, k, v, out)) and kv.is_contiguous()
    q_rows, k_rows = (triton.next_power_of_2(count) for count in (heads, kv.shape[3]))
    config = config or next(config for width, config in CONFIGS if q_rows * dim <= width)
    sink = out if q_sink is None else q_sink
    launchable(_append)[(rows * tokens, 3)](
        q, k, v, rope_time, rope_rows, rope_columns, out, kv, pages, rope_time if rope_sink is None else rope_sink,
        sink, rope_time if kv_scale is None else kv_scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *sink.stride()[:3],
        tokens, len(rope_columns), kv.shape[2], kv.shape[1], pages.shape[1],
        HEADS=heads, KV_HEADS=kv.shape[3], DIM=dim, TIME=rope_time.shape[2], ROW=rope_rows.shape[1],
        COLUMN=rope_columns.shape[1], Q_ROWS=q_rows, K_ROWS=k_rows, HALF_SPLIT=half_split, SINK=q_sink is not None,
        SCALED=kv_scale is not None, num_warps=config.warps,
    )  # fmt: skip


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from ..spec import Case
    from .reference import APART, make_inputs, sizes

    variants: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
        "sink": ({"sinks": True}, (12,)), "apart": (dict(APART), (24, 48)),
    }  # fmt: skip
    if capability >= 89:
        variants["apart fp8"] = {"fp8": True, **APART}, (24,)
    return {
        f"{name} bf16 h{heads}": make_inputs(
            Case(name, sizes(1, 1, 4, 4, heads, heads if heads == 12 else 8, 128), options), torch.bfloat16, "cpu", 0
        )
        for name, (options, counts) in variants.items()
        for heads in counts
    }
