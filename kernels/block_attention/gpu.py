"""Block attention in Triton: one program per tile of queries and head, walking runs of neighbouring pages.

A program finds the runs of its row itself, from the page table, so that one launch (and one captured graph)
serves any lists. Tiles end with a run and not with a page: whole ones need no mask, and a run's last keys have a
loop of their own with smaller tiles. Scores are kept in base 2. Programs that run together share a head, and with
it what they read of the pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import FRAME_480P, HALF, Case, architecture, expect_fp8


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, keys of a tile at a run's end, warps, and loads in flight."""

    queries: int
    keys: int
    tail: int
    warps: int
    stages: int


# By architecture and head dim. Wide tiles of keys: the running result is rescaled once a tile. Chosen by what compiles
# without spills and to the fewest instructions a key; shared memory is 99 KB on 89 and 120 (and 86, which takes 80's).
CONFIGS = {
    (80, 64): Config(128, 128, 32, 8, 2), (80, 128): Config(128, 64, 32, 8, 3),
    (89, 64): Config(128, 128, 32, 8, 2), (89, 128): Config(128, 64, 32, 8, 2),
    (90, 64): Config(128, 128, 32, 8, 3), (90, 128): Config(128, 128, 32, 8, 2),
    (100, 64): Config(128, 128, 32, 8, 3), (100, 128): Config(128, 64, 32, 8, 3),
    (120, 64): Config(128, 128, 32, 8, 2), (120, 128): Config(128, 64, 32, 8, 2),
}  # fmt: skip
ANYWHERE = Config(16, 32, 16, 4, 1)  # where there is no GPU: the interpreter
RUN = 32  # pages of a run at most; a longer one is walked as two


@triton.jit
def _fold(q, k, v, there, most, total, result, factor, MASKED: tl.constexpr):
    """A tile of keys and values taken into the running maximum, sum and result of each query."""
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if MASKED:
        scores = tl.where(there[None], scores, float("-inf"))
    peak = tl.maximum(most, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - peak[:, None])
    shrink = tl.exp2(most - peak)
    total = total * shrink + tl.sum(weights, 1)
    result = tl.dot(weights.to(q.dtype), v.to(q.dtype), result * shrink[:, None], input_precision="ieee")
    return peak, total, result


@triton.jit(do_not_specialize=["pages"])  # a store of one page is not a kernel of its own
def _attend(
    q_ptr, sink_q_ptr, kv_ptr, tiles, scale_ptr, table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr,
    tokens, pages, table_width, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr,
    TURNED: tl.constexpr, SCALED: tl.constexpr, LSE: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    dim = tl.arange(0, DIM)
    inside = at[:, None] < tokens
    line = ((row * tokens + tl.program_id(0) * QUERIES) * HEADS + head) * DIM  # 64-bit; offsets in a tile are small
    here = tl.arange(0, QUERIES)[:, None] * HEADS * DIM + dim[None]
    kind: tl.constexpr = tl.float16 if SCALED else q_ptr.dtype.element_ty  # FP8 is exact in float16
    q = tl.load(q_ptr + line + here, mask=inside, other=0.0).to(kind)

    count = tl.load(count_ptr + row)
    sinks = tl.minimum(tl.load(sinks_ptr + row), count) if TURNED else 0
    table_ptr += row * table_width
    tile = tl.arange(0, KEYS)[:, None] * KV_HEADS * DIM + dim[None]
    rest = tl.arange(0, TAIL)[:, None] * KV_HEADS * DIM + dim[None]
    listed = tl.arange(0, RUN)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIM], tl.float32)
    by, unit = factor, 1.0
    first = 0
    while first < count:
        # A run: the longest stretch of the list in which each page follows the one before, with one scale.
        end = tl.where(first < sinks, sinks, count) if TURNED else count
        page = tl.load(table_ptr + first).to(tl.int64)
        follows = tl.load(table_ptr + first + listed, mask=first + listed < end, other=-1) == page + listed
        if SCALED:
            k_scale = scale_ptr + page * KV_HEADS + kv_head
            v_scale = k_scale + pages * KV_HEADS
            k_by, v_by = tl.load(k_scale), tl.load(v_scale)
            follows &= tl.load(k_scale + listed * KV_HEADS, mask=follows, other=0.0) == k_by
            follows &= tl.load(v_scale + listed * KV_HEADS, mask=follows, other=0.0) == v_by
            by = k_by * factor
            v_by = tl.maximum(v_by, 1e-20)
            result *= unit / v_by  # the result is kept in units of the run's scale
            unit = v_by
        run = tl.maximum(tl.min(tl.where(follows, RUN, listed), 0), 1)  # a scale that is NaN is not even its own like
        if TURNED:
            source = q_ptr
            if first < sinks:
                source = sink_q_ptr
            q = tl.load(source + line + here, mask=inside, other=0.0).to(kind)
        length = run * PAGE
        whole = length // KEYS * KEYS
        k_ptr = kv_ptr + (page * PAGE * KV_HEADS + kv_head) * DIM
        v_ptr = k_ptr + pages.to(tl.int64) * PAGE * KV_HEADS * DIM
        for start in range(0, whole, KEYS):
            if TILED:
                k_row = page.to(tl.int32) * PAGE + start
                k = tiles.load([k_row, kv_head * DIM])
                v = tiles.load([k_row + pages * PAGE, kv_head * DIM])
            else:
                k, v = tl.load(k_ptr + tile), tl.load(v_ptr + tile)
            most, total, result = _fold(q, k, v, True, most, total, result, by, MASKED=False)
            k_ptr += KEYS * KV_HEADS * DIM
            v_ptr += KEYS * KV_HEADS * DIM
        for start in tl.range(whole, length, TAIL, num_stages=1):
            there = start + tl.arange(0, TAIL) < length
            k = tl.load(k_ptr + rest, mask=there[:, None], other=0.0)
            v = tl.load(v_ptr + rest, mask=there[:, None], other=0.0)
            most, total, result = _fold(q, k, v, there, most, total, result, by, MASKED=True)
            k_ptr += TAIL * KV_HEADS * DIM
            v_ptr += TAIL * KV_HEADS * DIM
        first += run
    result *= (unit / total)[:, None]
    left = tokens - at > 0  # what `inside` says, but found here: kept, it would take registers all through the loops
    tl.store(out_ptr + line + here, result.to(out_ptr.dtype.element_ty), mask=left[:, None])
    if LSE:
        natural = (most + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (row * HEADS + head) * tokens + at, natural, mask=left)


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
    """For tensors that were checked, in the tiles of a config (by architecture and head dim unless told)."""
    config = config or (CONFIGS[architecture(q.device), q.shape[3]] if q.device.type == "cuda" else ANYWHERE)
    launch(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale, config, None)


def launch(
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
    config: Config,
    tiles: Any,
) -> None:
    """One launch; others stand in for tensors that are not there. tiles: a descriptor that loads whole tiles of kv."""
    if kv_scale is not None:
        expect_fp8("block_attention", q.device)
    rows, tokens, heads, dim = q.shape
    grid = (triton.cdiv(tokens, config.queries), heads, rows)
    _attend[grid](
        q, q if q_sink is None else q_sink, kv, kv if tiles is None else tiles,
        page_count if kv_scale is None else kv_scale, page_table, page_count,
        page_count if sink_count is None else sink_count, out, out if lse is None else lse,
        tokens, kv.shape[1], page_table.shape[1], scale / math.log(2),
        HEADS=heads, KV_HEADS=kv.shape[3], DIM=dim, PAGE=kv.shape[2], RUN=RUN,
        QUERIES=config.queries, KEYS=config.keys, TAIL=config.tail,
        TURNED=q_sink is not None, SCALED=kv_scale is not None, LSE=lse is not None, TILED=tiles is not None,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture; those that do not fit a part or a head dim fail when they are tried."""
    return [
        Config(queries, keys, tail, warps, stages)
        for queries, warps in ((128, 8), (64, 4))
        for keys in (32, 64, 128)
        for tail in (16, 32)
        for stages in (2, 3, 4)
    ]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    return variants(capability, CONFIGS)


def variants(capability: int, configs: dict[tuple[int, int], Config]) -> dict[str, dict[str, object]]:
    """One call per variant, dtype and head dim, each with its config."""
    from .reference import make_inputs, sizes

    options: dict[str, dict[str, object]] = {"plain": {}, "sink": {"sinks": 1}, "lse": {"lse": True}}
    if capability >= 89:
        options["fp8"] = {"fp8": True, "sinks": 1}
    found: dict[str, dict[str, object]] = {}
    for dim in (64, 128):
        for variant, option in options.items():
            for dtype in HALF if variant == "plain" else HALF[:1]:
                case = Case(variant, sizes(1, 128, 4, FRAME_480P, 2, 2, dim), option)
                name = f"{variant} {'bf16' if dtype == torch.bfloat16 else 'fp16'} d{dim}"
                found[name] = make_inputs(case, dtype, "cpu", 0) | {"config": configs[capability, dim]}
    one = make_inputs(Case("one page", sizes(1, 1, 1, 1, 1, 1, 64)), torch.bfloat16, "cpu", 0)
    alone = {"kv": one["kv"][:, 3:].contiguous(), "page_table": torch.zeros_like(one["page_table"])}
    found["one page of one token bf16 d64"] = one | alone | {"config": configs[capability, 64]}
    return found
