"""Block attention in Triton: one program per tile of queries and head, walking runs of neighbouring pages.

A program finds the runs of its row itself, from the page table, so that one launch (and one captured graph)
serves any lists. Tiles end with a run and not with a page. Scores are kept in base 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import FRAME_480P, Case, architecture


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# By architecture and head dim; a tile must fit the registers and the shared memory (99 KB on 89 and 120).
CONFIGS = {
    (80, 64): Config(128, 64, 8, 3), (80, 128): Config(128, 32, 8, 3),
    (89, 64): Config(128, 64, 8, 2), (89, 128): Config(128, 32, 8, 2),
    (90, 64): Config(128, 128, 8, 2), (90, 128): Config(128, 64, 8, 3),
    (100, 64): Config(128, 128, 8, 2), (100, 128): Config(128, 32, 8, 3),
    (120, 64): Config(128, 64, 8, 2), (120, 128): Config(64, 64, 8, 2),
}  # fmt: skip
ANYWHERE = Config(16, 32, 4, 1)  # where there is no GPU: the interpreter


@triton.jit
def _attend(
    q_ptr, sink_q_ptr, kv_ptr, scale_ptr, table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr,
    tokens, pages, table_width, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, LISTED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
    TURNED: tl.constexpr, SCALED: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    dim = tl.arange(0, DIM)
    inside = at[:, None] < tokens
    line = (row * tokens + tl.program_id(0) * QUERIES) * HEADS + head  # 64-bit once; offsets in a tile are small
    q_at = line * DIM + (tl.arange(0, QUERIES)[:, None] * HEADS * DIM + dim[None])
    q = tl.load(q_ptr + q_at, mask=inside, other=0.0)

    # Runs of the row: a page that does not follow the one before it begins one, and so does the first after the sink.
    listed = tl.arange(0, LISTED)
    count = tl.load(count_ptr + row)
    sinks = tl.load(sinks_ptr + row) if TURNED else 0
    valid = listed < count
    page = tl.load(table_ptr + row * table_width + listed, mask=valid, other=0)
    before = tl.load(table_ptr + row * table_width + listed - 1, mask=valid & (listed > 0), other=-2)
    begins = valid & ((page != before + 1) | (listed == sinks))
    run_of = tl.cumsum(begins.to(tl.int32), 0) - 1

    tile = tl.arange(0, KEYS)[:, None] * KV_HEADS * DIM + dim[None]
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIM], tl.float32)
    for run in range(0, tl.sum(begins.to(tl.int32), 0)):
        mine = valid & (run_of == run)
        first = tl.min(tl.where(mine, listed, LISTED), 0)
        first_page = tl.sum(tl.where(listed == first, page, 0), 0).to(tl.int64)
        length = tl.sum(mine.to(tl.int32), 0) * PAGE
        if TURNED:
            if first < sinks:
                q = tl.load(sink_q_ptr + q_at, mask=inside, other=0.0)
            else:
                q = tl.load(q_ptr + q_at, mask=inside, other=0.0)
        k_ptr = kv_ptr + (first_page * PAGE * KV_HEADS + kv_head) * DIM
        v_ptr = k_ptr + pages.to(tl.int64) * PAGE * KV_HEADS * DIM
        for start in range(0, length, KEYS):
            key = start + tl.arange(0, KEYS)
            there = key < length
            k = tl.load(k_ptr + tile, mask=there[:, None], other=0.0).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
            if SCALED:
                scale_at = (first_page + key // PAGE) * KV_HEADS + kv_head
                scores *= tl.load(scale_ptr + scale_at, mask=there, other=0.0)[None]
            scores = tl.where(there[None], scores, float("-inf"))
            peak = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - peak[:, None])
            shrink = tl.exp2(most - peak)
            total = total * shrink + tl.sum(weights, 1)
            most = peak
            if SCALED:
                weights *= tl.load(scale_ptr + pages * KV_HEADS + scale_at, mask=there, other=0.0)[None]
            v = tl.load(v_ptr + tile, mask=there[:, None], other=0.0).to(q.dtype)
            result = tl.dot(weights.to(q.dtype), v, result * shrink[:, None], input_precision="ieee")
            k_ptr += KEYS * KV_HEADS * DIM
            v_ptr += KEYS * KV_HEADS * DIM
    tl.store(out_ptr + q_at, (result / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if LSE:
        natural = (most + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (row * HEADS + head) * tokens + at, natural, mask=at < tokens)


def block_attention(
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
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked; tensors that are not there stand in for by one that is."""
    rows, tokens, heads, dim = q.shape
    config = config or (CONFIGS[architecture(q.device), dim] if q.device.type == "cuda" else ANYWHERE)
    grid = (triton.cdiv(tokens, config.queries), heads, rows)
    _attend[grid](
        q, q if q_sink is None else q_sink, kv, page_count if kv_scale is None else kv_scale, page_table, page_count,
        page_count if sink_count is None else sink_count, out, out if lse is None else lse,
        tokens, kv.shape[1], page_table.shape[1], scale / math.log(2),
        HEADS=heads, KV_HEADS=kv.shape[3], DIM=dim, PAGE=kv.shape[2],
        LISTED=triton.next_power_of_2(page_table.shape[1]), QUERIES=config.queries, KEYS=config.keys,
        TURNED=q_sink is not None, SCALED=kv_scale is not None, LSE=lse is not None,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    found: dict[str, dict[str, object]] = {}
    variants: dict[str, dict[str, object]] = {
        "plain": {}, "sink": {"sinks": 1}, "lse": {"lse": True}, "fp8": {"fp8": True}
    }  # fmt: skip
    for dim in (64, 128):
        for variant, options in variants.items():
            if (variant, dim) in (("lse", 64), ("fp8", 64)) or (variant == "fp8" and capability < 89):
                continue
            case = Case(variant, sizes(1, 128, 4, FRAME_480P, 2, 2, dim), options)
            inputs = make_inputs(case, torch.bfloat16, "cpu", 0)
            found[f"{variant} bf16 d{dim}"] = inputs | {"config": CONFIGS[capability, dim]}
    return found
