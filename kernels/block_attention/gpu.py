"""Block attention in Triton: one program per tile of queries and head, walking runs of neighbouring pages.

A program finds the runs of its row itself, from the page table, so that one launch (and one captured graph)
serves any lists. Tiles end with a run and not with a page: whole ones need no mask, and the last one ends with the
run, so that it overlaps the one before; what that one has taken is masked. Scores are kept in base 2. Programs that
run together share a head and a part of the keys, and with them what they read of the pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import FRAME_480P, HALF, Case, architecture, expect_fp8
from .reference import STEP, expect_one_list


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, keys of a tile at a run's end, warps, and loads in flight.

    tail: 0 where the last tile of a run is masked under a branch within the loop, which costs no registers. Before
    sm_90, Triton then moves the scores through shared memory between the two products, so that a loop with smaller
    tiles follows there.
    """

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
    (90, 64): Config(128, 128, 0, 8, 3), (90, 128): Config(128, 128, 0, 8, 2),
    (100, 64): Config(128, 128, 0, 8, 3), (100, 128): Config(128, 64, 0, 8, 3),
    (120, 64): Config(128, 128, 32, 8, 2), (120, 128): Config(128, 64, 32, 8, 2),
}  # fmt: skip
ANYWHERE = Config(16, 32, 0, 4, 1)  # where there is no GPU: the interpreter
RUN = 32  # pages of a run at most; a longer one is walked as two


# How a program reads the pages of its row (page_count 8, sink_count 2, pages of 5 tokens, KEYS 4):
#
#   page_table     7   8 | 9 | 2   3   4 | 12  13     a run: neighbouring pages, one after the other in memory
#   queries        q_sink|            q               a run ends at the sink's last page: other queries follow
#   first          0       2   3           6          position in the list at which each run begins
#   run            2       1   3           2          pages of the run, RUN at most; with FP8, pages of one scale
#
#   tokens of the run 2 3 4:   |0 . . .|. . . .|. . . .|. . .|    length 15
#                              KEYS    KEYS    KEYS              whole tiles, no mask
#                                                    |x . . .|   the last tile ends with the run, x is masked
#
# With TAIL, tiles of TAIL keys follow the loop, of which the last ends with the run.
#
# With PARTS, the tokens of the list, as if they lay one after the other, are cut at multiples of STEP, and a program
# reads those of its part only: `begin` and `stop` count them.
#
# With LOW, queries are rounded to FP8 with a scale each, and multiplied with keys in FP8 as they lie in the pages.


@triton.jit
def _tile(
    k_ptr, v_ptr, kv_tiles, k_row, v_row, head, start, length,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, TILED: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Load keys and values [KEYS, DIM] from `start` of a run of `length` tokens, from before it if they would pass
    the run's end. Returns where they begin, too.
    """
    at = tl.minimum(start, length - KEYS)
    if PAGE < KEYS:  # a run may be shorter than a tile
        at = tl.maximum(at, 0)
    key = tl.arange(0, KEYS)[:, None]
    offsets = at * KV_HEADS * DIM + key * KV_HEADS * DIM + tl.arange(0, DIM)[None]
    if PAGE < KEYS:
        stored = at + key < length
        k = tl.load(k_ptr + offsets, mask=stored, other=0.0)
        v = tl.load(v_ptr + offsets, mask=stored, other=0.0)
    elif TILED:
        k, v = kv_tiles.load([k_row + at, head * DIM]), kv_tiles.load([v_row + at, head * DIM])
    else:
        k, v = tl.load(k_ptr + offsets), tl.load(v_ptr + offsets)
    return at, k, v


@triton.jit
def _masked(qk, at, start, last, KEYS: tl.constexpr):
    """Scores of a tile that begins at `at`, without those of keys outside of [start, last)."""
    key = at + tl.arange(0, KEYS)
    return tl.where(((key >= start) & (key < last))[None], qk, float("-inf"))


@triton.jit
def _fold(qk, v, m_i, l_i, acc, factor, LOW: tl.constexpr):
    """One step of online softmax: take scores [QUERIES, KEYS] into m_i, l_i [QUERIES] and acc [QUERIES, DIM].

    factor: of the scores, with LOW one for each query.
    """
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * factor)
    p = tl.exp2(qk * factor[:, None] - m_ij[:, None]) if LOW else tl.exp2(qk * factor - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_ij, l_i, acc


@triton.jit
def _packed(q, LIMIT: tl.constexpr):
    """Queries [QUERIES, DIM] in FP8, and the scale of each."""
    q = q.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(q), 1), 1e-12) / LIMIT
    return (q / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["pages"])  # a store of one page is not a kernel of its own
def _attend(
    q_ptr, q_sink_ptr, kv_ptr, kv_tiles, scale_ptr, table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr,
    tokens, pages, table_width, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, RUN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
    SINK: tl.constexpr, SCALED: tl.constexpr, LSE: tl.constexpr, TILED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) // PARTS
    kv_head = head // (HEADS // KV_HEADS)
    offs_q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)  # [QUERIES], tokens of the row
    offs_d = tl.arange(0, DIM)
    is_query = offs_q[:, None] < tokens
    # q, q_sink: [rows, tokens, HEADS, DIM]. The base is 64-bit; offsets within a tile are small.
    q_base = ((row * tokens + tl.program_id(0) * QUERIES) * HEADS + head) * DIM
    q_tile = tl.arange(0, QUERIES)[:, None] * HEADS * DIM + offs_d[None]  # [QUERIES, DIM]
    kind: tl.constexpr = tl.float16 if SCALED else q_ptr.dtype.element_ty  # FP8 is exact in float16
    q = tl.load(q_ptr + q_base + q_tile, mask=is_query, other=0.0)
    if LOW:
        q, q_scale = _packed(q, LOW)
    else:
        q = q.to(kind)

    count = tl.load(count_ptr + row)
    sinks = tl.minimum(tl.load(sinks_ptr + row), count) if SINK else 0
    table_ptr += row * table_width
    # kv: [2, pages, PAGE, KV_HEADS, DIM]
    offs_page = tl.arange(0, RUN)
    m_i = tl.full([QUERIES], float("-inf"), tl.float32)  # running maximum, base 2
    l_i = tl.zeros([QUERIES], tl.float32)  # running sum of exponentials
    acc = tl.zeros([QUERIES, DIM], tl.float32)  # running result, in units of acc_scale
    qk_factor, acc_scale = factor, 1.0
    begin, stop = 0, count * PAGE
    if PARTS > 1:
        part = tl.program_id(1) % PARTS
        steps = tl.cdiv(stop, STEP)
        begin = part * steps // PARTS * STEP
        stop = tl.minimum((part + 1) * steps // PARTS * STEP, stop)
    while begin < stop:
        # A run: the longest stretch of the list in which each page follows the one before, with one scale.
        first = begin // PAGE
        end = tl.where(first < sinks, sinks, count) if SINK else count
        page = tl.load(table_ptr + first).to(tl.int64)
        follows = tl.load(table_ptr + first + offs_page, mask=first + offs_page < end, other=-1) == page + offs_page
        if SCALED:  # scales: [2, pages, KV_HEADS]
            k_scale_ptr = scale_ptr + page * KV_HEADS + kv_head
            v_scale_ptr = k_scale_ptr + pages * KV_HEADS
            k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
            follows &= tl.load(k_scale_ptr + offs_page * KV_HEADS, mask=follows, other=0.0) == k_scale
            follows &= tl.load(v_scale_ptr + offs_page * KV_HEADS, mask=follows, other=0.0) == v_scale
            qk_factor = k_scale * factor
            v_scale = tl.maximum(v_scale, 1e-20)
            acc *= acc_scale / v_scale  # values are summed unscaled; the sum is in units of the run's scale
            acc_scale = v_scale
        run = tl.maximum(tl.min(tl.where(follows, RUN, offs_page), 0), 1)  # at least 1: a NaN scale equals nothing
        if SINK:
            source_ptr = q_ptr
            if first < sinks:
                source_ptr = q_sink_ptr
            q = tl.load(source_ptr + q_base + q_tile, mask=is_query, other=0.0)
            if LOW:
                q, q_scale = _packed(q, LOW)
            else:
                q = q.to(kind)
        score_factor = qk_factor
        if LOW:
            score_factor = qk_factor * q_scale
        length = run * PAGE  # tokens of the run
        skipped = begin - first * PAGE  # those that belong to the part before
        last = tl.minimum(length, stop - first * PAGE)  # the first that belongs to the part behind
        k_ptr = kv_ptr + (page * PAGE * KV_HEADS + kv_head) * DIM
        v_ptr = k_ptr + pages.to(tl.int64) * PAGE * KV_HEADS * DIM
        k_row = page.to(tl.int32) * PAGE
        behind = skipped + (last - skipped) // KEYS * KEYS if TAIL else last  # the loop's last key
        for start in range(skipped, behind, KEYS):
            at, k, v = _tile(
                k_ptr, v_ptr, kv_tiles, k_row, k_row + pages * PAGE, kv_head, start, length,
                KV_HEADS, PAGE, KEYS, TILED, DIM,
            )  # fmt: skip
            qk = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [QUERIES, KEYS]
            if TAIL == 0:  # noqa: SIM102 (known when it is compiled; the next one is not)
                if start + KEYS > last:
                    qk = _masked(qk, at, start, last, KEYS)
            m_i, l_i, acc = _fold(qk, v.to(kind), m_i, l_i, acc, score_factor, LOW)
        if TAIL:
            for start in tl.range(behind, last, TAIL, num_stages=1):
                at, k, v = _tile(
                    k_ptr, v_ptr, kv_ptr, k_row, k_row, kv_head, start, length, KV_HEADS, PAGE, TAIL, False, DIM
                )
                qk = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
                qk = _masked(qk, at, start, last, TAIL)
                m_i, l_i, acc = _fold(qk, v.to(kind), m_i, l_i, acc, score_factor, LOW)
        begin = first * PAGE + last
    # out: [PARTS, rows, tokens, HEADS, DIM]; lse: [PARTS, rows, HEADS, tokens]
    share = acc_scale / l_i
    if PARTS > 1:
        share = tl.where(l_i > 0, share, 0.0)  # a part without keys
        row += part.to(tl.int64) * tl.num_programs(2)
        q_base = ((row * tokens + tl.program_id(0) * QUERIES) * HEADS + head) * DIM
    acc *= share[:, None]
    stored = tokens - offs_q > 0  # is_query, computed again: kept, it would take registers all through the loops
    tl.store(out_ptr + q_base + q_tile, acc.to(out_ptr.dtype.element_ty), mask=stored[:, None])
    if LSE:
        lse = (m_i + tl.log2(l_i)) * 0.6931471805599453
        tl.store(lse_ptr + (row * HEADS + head) * tokens + offs_q, lse, mask=stored)


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
    kv_tiles: Any = None,
    parts: int = 1,
    low: int = 0,
) -> None:
    """Launch for tensors that were checked; tensors that are not given are replaced by others that are not read.

    config: by default that of architecture and head dim. kv_tiles: a descriptor that loads whole tiles of kv.
    parts: of the keys, each with a result of its own, out [parts, R, T, H, D] and lse [parts, R, H, T]. low: largest
    entry of queries that are multiplied in FP8, over pages in FP8; 0 for queries as they are.
    """
    expect_one_list("triton", page_table)
    if kv_scale is not None:
        expect_fp8("block_attention", q.device)
    rows, tokens, heads, dim = q.shape
    config = config or (CONFIGS[architecture(q.device), dim] if q.device.type == "cuda" else ANYWHERE)
    grid = (triton.cdiv(tokens, config.queries), heads * parts, rows)
    run = RUN
    while run > 1 and run * math.prod(kv.shape[2:]) >= 2**31:  # offsets within a run are 32-bit
        run //= 2
    launchable(_attend)[grid](
        q, q if q_sink is None else q_sink, kv, kv if kv_tiles is None else kv_tiles,
        page_count if kv_scale is None else kv_scale, page_table, page_count,
        page_count if sink_count is None else sink_count, out, out if lse is None else lse,
        tokens, kv.shape[1], page_table.shape[1], scale / math.log(2),
        HEADS=heads, KV_HEADS=kv.shape[3], DIM=dim, PAGE=kv.shape[2], RUN=run,
        QUERIES=config.queries, KEYS=config.keys, TAIL=config.tail, PARTS=parts, STEP=STEP,
        SINK=q_sink is not None, SCALED=kv_scale is not None, LSE=lse is not None, TILED=kv_tiles is not None,
        LOW=low, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture; those that do not fit a part or a head dim fail when they are tried."""
    return [
        Config(queries, keys, tail, warps, stages)
        for queries, warps in ((128, 8), (64, 4))
        for keys in (32, 64, 128)
        for tail in (0, 16, 32)
        for stages in (2, 3, 4)
    ]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    calls = variants(capability, CONFIGS)
    for heads, page_tokens in ((24, 2025), (48, 3600)):  # of models whose heads share keys, at their pictures' sizes
        inputs = make_inputs(Case("grouped", sizes(1, 128, 4, 1, heads, 8, 128)), torch.bfloat16, "cpu", 0)
        kv = inputs["kv"]
        store = {"kv": kv.new_empty(2, kv.shape[1], page_tokens, 8, 128), "config": CONFIGS[capability, 128]}
        calls[f"grouped by 8 bf16 d128 h{heads}"] = inputs | store
    return calls


def variants(capability: int, configs: dict[tuple[int, int], Config]) -> dict[str, dict[str, object]]:
    """One call per variant, dtype and head dim, each with its config."""
    from .reference import make_inputs, sizes

    options: dict[str, dict[str, object]] = {"plain": {}, "sink": {"sinks": 1}, "lse": {"lse": True}}
    if capability >= 89:
        options["fp8"] = {"fp8": True, "sinks": 1}
    calls: dict[str, dict[str, object]] = {}
    for dim in (64, 128):
        for variant, option in options.items():
            for dtype in HALF if variant == "plain" else HALF[:1]:
                case = Case(variant, sizes(1, 128, 4, FRAME_480P, 2, 2, dim), option)
                name = f"{variant} {'bf16' if dtype == torch.bfloat16 else 'fp16'} d{dim}"
                calls[name] = make_inputs(case, dtype, "cpu", 0) | {"config": configs[capability, dim]}
    one = make_inputs(Case("one page", sizes(1, 1, 1, 1, 1, 1, 64)), torch.bfloat16, "cpu", 0)
    store = {"kv": one["kv"][:, 3:].contiguous(), "page_table": torch.zeros_like(one["page_table"])}
    calls["one page of one token bf16 d64"] = one | store | {"config": configs[capability, 64]}
    return calls
