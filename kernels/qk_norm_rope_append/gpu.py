"""qk_norm_rope_append in Triton: one program per token, for each of queries, keys and values.

A program of the first kind does a token's queries, of the second its keys, of the third its values; each knows its
width as a constant. Heads are rows of a tile, so that a token's angles are read once for all of them; pairs are read
as they lie and split in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import expect_fp8


@dataclass(frozen=True)
class Config:
    """Warps to a token."""

    warps: int


# By the width of a row: about 16 numbers of it to a thread.
CONFIGS = ((1024, Config(2)), (2048, Config(4)), (4096, Config(8)), (1 << 30, Config(16)))


@triton.jit
def _cos_sin(table_ptr, line, first, COUNT: tl.constexpr, DIM: tl.constexpr):
    """Cosines and sines [DIM / 2, 2] of an axis: a line of its table at pairs [first, first + COUNT), else 0."""
    pair = tl.arange(0, DIM // 2)[:, None] - first
    offs = (line * COUNT + pair) * 2 + tl.arange(0, 2)[None]
    return tl.load(table_ptr + offs, mask=(pair >= 0) & (pair < COUNT), other=0.0)


@triton.jit
def _grid_cos_sin(rows_ptr, columns_ptr, row, column, TIME: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr,
                  DIM: tl.constexpr):  # fmt: skip
    """Cosines and sines [DIM / 2, 2] of a token's row and column in the frame; those of time are still 0."""
    return _cos_sin(rows_ptr, row, TIME, ROW, DIM) + _cos_sin(columns_ptr, column, TIME + ROW, COLUMN, DIM)


@triton.jit
def _rotated(x, cos_sin, ROWS: tl.constexpr, DIM: tl.constexpr):
    """x [ROWS, DIM] with neighbouring entries rotated by the angle of their pair, cos_sin [DIM / 2, 2]."""
    cos, sin = tl.split(cos_sin)  # [DIM / 2]
    even, odd = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))  # [ROWS, DIM / 2]
    rotated = tl.join(even * cos[None] - odd * sin[None], even * sin[None] + odd * cos[None])
    return tl.reshape(rotated, [ROWS, DIM])


@triton.jit
def _normed(x_ptr, weight_ptr, offs, inside, width, eps):
    """RMS norm with weight over all of a tile [ROWS, DIM]."""
    x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    x = x * (1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / width + eps))
    return x * tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _append(
    qkv_ptr, q_weight_ptr, k_weight_ptr, time_ptr, rows_ptr, columns_ptr, q_ptr, kv_ptr, pages_ptr, sink_ptr,
    q_sink_ptr, scale_ptr, tokens, grid_width, page_tokens, num_pages, frames, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, ROW: tl.constexpr,
    COLUMN: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, SINK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # of all rows
    kind = tl.program_id(1)  # 0 queries, 1 keys, 2 values
    row, inner = token // tokens, token % tokens
    frame, place = inner // page_tokens, inner % page_tokens  # place: of the token in its frame
    time_line, grid_row, grid_column = row * frames + frame, place // grid_width, place % grid_width
    qkv_line = qkv_ptr + token * (HEADS + 2 * KV_HEADS) * DIM  # qkv: [rows * tokens, (HEADS + 2 * KV_HEADS) * DIM]
    offs_d = tl.arange(0, DIM)[None]
    if kind == 0:
        head = tl.arange(0, Q_ROWS)[:, None]
        offs, inside = head * DIM + offs_d, head < HEADS  # [Q_ROWS, DIM]
        x = _normed(qkv_line, q_weight_ptr, offs, inside, HEADS * DIM, eps)
        cos_sin = _grid_cos_sin(rows_ptr, columns_ptr, grid_row, grid_column, TIME, ROW, COLUMN, DIM)
        y = _rotated(x, cos_sin + _cos_sin(time_ptr, time_line, 0, TIME, DIM), Q_ROWS, DIM)
        tl.store(q_ptr + token * HEADS * DIM + offs, y.to(q_ptr.dtype.element_ty), mask=inside)
        if SINK:
            y = _rotated(x, cos_sin + _cos_sin(sink_ptr, time_line, 0, TIME, DIM), Q_ROWS, DIM)
            tl.store(q_sink_ptr + token * HEADS * DIM + offs, y.to(q_sink_ptr.dtype.element_ty), mask=inside)
    else:
        kv_head = tl.arange(0, K_ROWS)[:, None]  # names of a branch are its own: their shapes differ
        kv_offs, is_kv = kv_head * DIM + offs_d, kv_head < KV_HEADS  # [K_ROWS, DIM]
        page = tl.load(pages_ptr + row * frames + frame).to(tl.int64) + (kind - 1) * num_pages
        if kind == 1:
            key = _normed(qkv_line + HEADS * DIM, k_weight_ptr, kv_offs, is_kv, KV_HEADS * DIM, eps)
            angles = _grid_cos_sin(rows_ptr, columns_ptr, grid_row, grid_column, TIME, ROW, COLUMN, DIM)
            z = _rotated(key, angles + _cos_sin(time_ptr, time_line, 0, TIME, DIM), K_ROWS, DIM)
        else:
            z = tl.load(qkv_line + (HEADS + KV_HEADS) * DIM + kv_offs, mask=is_kv, other=0.0).to(tl.float32)
        if SCALED:
            z = z / tl.load(scale_ptr + page * KV_HEADS + kv_head, mask=is_kv, other=1.0)
            z = tl.minimum(tl.maximum(z, -448.0), 448.0)
        kv_line = (page * page_tokens + place) * KV_HEADS * DIM  # kv: [2, pages, page_tokens, KV_HEADS, DIM]
        tl.store(kv_ptr + kv_line + kv_offs, z.to(kv_ptr.dtype.element_ty), mask=is_kv)


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    rope_sink: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    eps: float,
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked, head dims that are powers of two; others stand in for those not there."""
    if kv_scale is not None:
        expect_fp8("qk_norm_rope_append", q.device)
    rows, tokens, heads, dim = q.shape
    if dim & (dim - 1):
        raise ValueError(f"qk_norm_rope_append: head dim of q is {dim}; implementation triton needs a power of two")
    q_rows, k_rows = (triton.next_power_of_2(count) for count in (heads, kv.shape[3]))
    config = config or next(config for width, config in CONFIGS if q_rows * dim <= width)
    launchable(_append)[(rows * tokens, 3)](
        qkv, q_weight, k_weight, rope_time, rope_rows, rope_columns, q, kv, pages,
        rope_time if rope_sink is None else rope_sink, q if q_sink is None else q_sink,
        rope_time if kv_scale is None else kv_scale,
        tokens, len(rope_columns), kv.shape[2], kv.shape[1], pages.shape[1], eps,
        HEADS=heads, KV_HEADS=kv.shape[3], DIM=dim, TIME=rope_time.shape[2], ROW=rope_rows.shape[1],
        COLUMN=rope_columns.shape[1], Q_ROWS=q_rows, K_ROWS=k_rows, SINK=q_sink is not None,
        SCALED=kv_scale is not None, num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(warps) for warps in (1, 2, 4, 8, 16)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from ..spec import Case
    from .reference import make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"plain": {}, "sink": {"sinks": True}}
    if capability >= 89:
        variants["fp8"] = {"fp8": True}
    calls = {
        f"{name} bf16 h{heads}": make_inputs(
            Case(name, sizes(1, 1, 4, 4, heads, heads, 128), options), torch.bfloat16, "cpu", 0
        )
        for name, options in variants.items()
        for heads in (12, 40)
    }
    grouped = Case("grouped", sizes(1, 1, 4, 4, 24, 8, 128))
    return calls | {"grouped by 8 bf16 h24": make_inputs(grouped, torch.bfloat16, "cpu", 0)}
