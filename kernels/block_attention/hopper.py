"""Block attention in Gluon for sm_90a: a warp that loads tiles by TMA, and two warp groups that compute.

The producer warp walks the runs of neighbouring pages and loads whole tiles of keys and values into a ring of stages.
Each consumer group has 64 queries; its QK of a tile runs beside PV of the tile before and beside the softmax. Barriers
in shared memory pass stages to and fro, in the order of the table in `schedule.py`. A program takes one item of work
(128 queries of a head) after another, and the producer fills the next item's stages while an item is stored.

A run's last tile overlaps the one before and masks the keys seen already, so that nothing is read beyond the run; a
page must therefore hold a tile. Not the default: it has not run on a card yet.
Source: FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..spec import FRAME_480P, Case
from .schedule import Schedule, make_schedule

KEYS = 128  # of a tile
ROWS = 64  # queries of a consumer group: the rows of one warp group's product
GROUPS = 2
WARPS = 4  # of a consumer group
PROGRAMS = 132  # where no device says how many it runs at once
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its names in Triton 3.9 and 3.6


@dataclass(frozen=True)
class Config:
    """Tiles of keys and of values in flight, and registers of a thread of a consumer and of the producer."""

    stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


CONFIGS = {(90, 128): Config(2)}
schedule_of = cache(make_schedule)


# The table while it is compiled: a step is named by schedule, part and index.


@gluon.constexpr_function
def _length(schedule: Schedule, part: str) -> int:
    return len(schedule.steps(part))


@gluon.constexpr_function
def _step(schedule: Schedule, part: str, index: int, field: str) -> str | int:
    """A field of a step."""
    value: str | int = getattr(schedule.steps(part)[index], field)
    return value


@gluon.constexpr_function
def _is_by_item(schedule: Schedule, barrier: str) -> bool:
    """True for a barrier of the ring that moves on with items of work, not with tiles."""
    return schedule.barrier(barrier).ring == "q"


@gluon.constexpr_function
def _place_of(schedule: Schedule, barrier: str) -> int:
    """Place of a barrier among all."""
    return schedule.barriers.index(schedule.barrier(barrier))


@gluon.constexpr_function
def _depth(schedule: Schedule, barrier: str) -> int:
    return schedule.depth(schedule.barrier(barrier).ring)


@gluon.constexpr_function
def _stages(schedule: Schedule) -> int:
    return schedule.depth("k")


@gluon.constexpr_function
def _barrier_count(schedule: Schedule) -> int:
    return len(schedule.barriers)


@gluon.constexpr_function
def _name_of(schedule: Schedule, index: int) -> str:
    return schedule.barriers[index].name


@gluon.constexpr_function
def _arrivals(schedule: Schedule, index: int) -> int:
    return schedule.barriers[index].arrivals


@gluon.jit
def _number(item, tile, SCHEDULE: gl.constexpr, PART: gl.constexpr, AT: gl.constexpr, BARRIER: gl.constexpr):
    """Number of the fill, from the first on, that a step at a barrier is about."""
    return (item if _is_by_item(SCHEDULE, BARRIER) else tile) - _step(SCHEDULE, PART, AT, "back")


@gluon.jit
def _barrier(barriers, item, tile, SCHEDULE: gl.constexpr, PART: gl.constexpr, AT: gl.constexpr, BARRIER: gl.constexpr):
    stage = _number(item, tile, SCHEDULE, PART, AT, BARRIER) % _depth(SCHEDULE, BARRIER)
    return barriers[_place_of(SCHEDULE, BARRIER)].index(stage)


@gluon.jit
def _wait(barriers, item, tile, SCHEDULE: gl.constexpr, PART: gl.constexpr, AT: gl.constexpr):
    BARRIER: gl.constexpr = _step(SCHEDULE, PART, AT, "on")
    fill = _number(item, tile, SCHEDULE, PART, AT, BARRIER) // _depth(SCHEDULE, BARRIER)
    phase = (fill & 1) ^ _step(SCHEDULE, PART, AT, "phase")
    mbarrier.wait(_barrier(barriers, item, tile, SCHEDULE, PART, AT, BARRIER), phase)


@gluon.jit
def _run(table_ptr, first, end):
    """The page at `first` of the list, and how many up to `end` follow each other in memory from there on."""
    page = gl.load(table_ptr + first)
    last = first + 1
    follows = last < end
    while follows:
        follows = gl.load(table_ptr + last) == page + last - first
        if follows:
            last += 1
            follows = last < end
    return page, last - first


@gluon.jit
def _place(item, tokens, HEADS: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr):
    """Row, head and first query of an item. Items that follow each other share a head, and with it what they read."""
    tiles = (tokens + ROWS * GROUPS - 1) // (ROWS * GROUPS)
    return item // tiles // HEADS, item // tiles % HEADS, item % tiles * (ROWS * GROUPS)


@gluon.jit
def _fill(
    q_tiles, q_sink_tiles, kv_tiles, q_buffer, k_buffer, v_buffer, barriers, item, tile, q_row, q_column,
    k_row, v_row, kv_column, SCHEDULE: gl.constexpr, PART: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, DIM: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """One part of the producer's program."""
    stage = tile % _stages(SCHEDULE)
    for at in gl.static_range(_length(SCHEDULE, PART)):
        if _step(SCHEDULE, PART, at, "does") == "wait":
            _wait(barriers, item, tile, SCHEDULE, PART, at)
        elif _step(SCHEDULE, PART, at, "does") == "expect":
            full = _barrier(barriers, item, tile, SCHEDULE, PART, at, _step(SCHEDULE, PART, at, "on"))
            if _is_by_item(SCHEDULE, _step(SCHEDULE, PART, at, "on")):
                mbarrier.expect(full, (2 if SINK else 1) * GROUPS * ROWS * DIM * 2)
            else:
                mbarrier.expect(full, KEYS * DIM * 2)
        elif _step(SCHEDULE, PART, at, "does") == "load":
            full = _barrier(barriers, item, tile, SCHEDULE, PART, at, _step(SCHEDULE, PART, at, "at"))
            if _step(SCHEDULE, PART, at, "on") == "k":
                load_tile(kv_tiles, [k_row, kv_column], full, k_buffer.index(stage))
            elif _step(SCHEDULE, PART, at, "on") == "v":
                load_tile(kv_tiles, [v_row, kv_column], full, v_buffer.index(stage))
            else:
                for group in gl.static_range(GROUPS):
                    load_tile(q_tiles, [q_row + group * ROWS, q_column], full, q_buffer.index(group))
                    if SINK:
                        load_tile(q_sink_tiles, [q_row + group * ROWS, q_column], full, q_buffer.index(GROUPS + group))


@gluon.jit
def _produce(
    q_tiles, q_sink_tiles, kv_tiles, table_ptr, count_ptr, sinks_ptr, q_buffer, k_buffer, v_buffer, barriers,
    tokens, pages, table_width, items, SCHEDULE: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    SINK: gl.constexpr,
):  # fmt: skip
    """The producer: load the queries of each item, and its tiles of keys and values, run by run."""
    filled = 0  # items
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, head, query = _place(item, tokens, HEADS, ROWS, GROUPS)
        q_row = row * tokens + query
        kv_column = head // (HEADS // KV_HEADS) * DIM
        _fill(
            q_tiles, q_sink_tiles, kv_tiles, q_buffer, k_buffer, v_buffer, barriers, filled, tile, q_row, head * DIM,
            0, 0, 0, SCHEDULE, "fill item", GROUPS, ROWS, KEYS, DIM, SINK,
        )  # fmt: skip
        list_ptr = table_ptr + row * table_width
        count = gl.load(count_ptr + row)
        sinks = gl.minimum(gl.load(sinks_ptr + row), count) if SINK else 0
        first = 0
        while first < count:
            end = gl.where(first < sinks, sinks, count) if SINK else count
            page, run = _run(list_ptr, first, end)
            length = run * PAGE
            for start in range(0, length, KEYS):
                k_row = page * PAGE + gl.minimum(start, length - KEYS)
                _fill(
                    q_tiles, q_sink_tiles, kv_tiles, q_buffer, k_buffer, v_buffer, barriers, filled, tile, 0, 0,
                    k_row, k_row + pages * PAGE, kv_column, SCHEDULE, "fill tile", GROUPS, ROWS, KEYS, DIM, SINK,
                )  # fmt: skip
                tile += 1
            first += run
        filled += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit
def _softmax(s, m_i, l_i, factor, seen, MASKED: gl.constexpr, KEYS: gl.constexpr, s_layout: gl.constexpr):
    """One step of online softmax, base 2, over scores [ROWS, KEYS]; with MASKED, the first `seen` keys are left out."""
    if MASKED:
        is_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, s_layout)) >= seen
        s = gl.where(gl.expand_dims(is_key, 0), s, float("-inf"))
    m_ij = gl.maximum(m_i, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - gl.expand_dims(m_ij, 1))
    alpha = gl.exp2(m_i - m_ij)
    return p, m_ij, l_i * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _fold(
    q, k_buffer, v_buffer, barriers, item, tile, m_i, l_i, acc, p, factor, seen, SCHEDULE: gl.constexpr,
    PART: gl.constexpr, MASKED: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr, s_layout: gl.constexpr,
    o_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """One part of a consumer's program: take a tile into m_i, l_i [ROWS], acc [ROWS, DIM] and p [ROWS, KEYS]."""
    p_next = p
    for at in gl.static_range(_length(SCHEDULE, PART)):
        if _step(SCHEDULE, PART, at, "does") == "wait":
            _wait(barriers, item, tile, SCHEDULE, PART, at)
        elif _step(SCHEDULE, PART, at, "does") == "arrive":
            mbarrier.arrive(
                _barrier(barriers, item, tile, SCHEDULE, PART, at, _step(SCHEDULE, PART, at, "on")), count=1
            )
        elif _step(SCHEDULE, PART, at, "does") == "qk":
            k = k_buffer.index((tile - _step(SCHEDULE, PART, at, "back")) % _stages(SCHEDULE)).permute((1, 0))
            zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        elif _step(SCHEDULE, PART, at, "does") == "pv":
            v = v_buffer.index((tile - _step(SCHEDULE, PART, at, "back")) % _stages(SCHEDULE))
            acc = warpgroup_mma(p, v, acc, is_async=True)
        elif _step(SCHEDULE, PART, at, "does") == "ready":
            if _step(SCHEDULE, PART, at, "on") == "qk":
                s = warpgroup_mma_wait(_step(SCHEDULE, PART, at, "left"), [s])
            else:  # p is named so that its registers are kept until the product has read them
                acc, p = warpgroup_mma_wait(_step(SCHEDULE, PART, at, "left"), [acc, p])
        elif _step(SCHEDULE, PART, at, "does") == "softmax":
            probabilities, m_i, l_i, alpha = _softmax(s, m_i, l_i, factor, seen, MASKED, KEYS, s_layout)
            p_next = gl.convert_layout(probabilities.to(gl.bfloat16), p_layout)
        elif _step(SCHEDULE, PART, at, "does") == "rescale":
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)
    return m_i, l_i, acc, p_next


@gluon.jit
def _consume(
    table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr, q_buffer, k_buffer, v_buffer, barriers, tokens, table_width,
    items, factor, GROUP: gl.constexpr, SCHEDULE: gl.constexpr, HEADS: gl.constexpr, PAGE: gl.constexpr,
    GROUPS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, SINK: gl.constexpr,
    LSE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A consumer: attention of its ROWS queries of each item."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    done = 0  # items
    tile = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row, head, query = _place(item, tokens, HEADS, ROWS, GROUPS)
        list_ptr = table_ptr + row * table_width
        count = gl.load(count_ptr + row)
        sinks = gl.minimum(gl.load(sinks_ptr + row), count) if SINK else 0
        m_i = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        l_i = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
        acc = gl.zeros([ROWS, DIM], gl.float32, o_layout)
        p = gl.zeros([ROWS, KEYS], gl.bfloat16, p_layout)
        q = q_buffer.index(GROUP)
        if SINK:
            q = q_buffer.index(gl.where(sinks > 0, GROUPS + GROUP, GROUP))
        m_i, l_i, acc, p = _fold(
            q, k_buffer, v_buffer, barriers, done, tile, m_i, l_i, acc, p, factor, 0, SCHEDULE, "begin", False, KEYS,
            ROWS, s_layout, o_layout, p_layout,
        )  # fmt: skip
        m_i, l_i, acc, p = _fold(
            q, k_buffer, v_buffer, barriers, done, tile, m_i, l_i, acc, p, factor, 0, SCHEDULE, "first", False, KEYS,
            ROWS, s_layout, o_layout, p_layout,
        )  # fmt: skip
        tile += 1
        taken = KEYS  # of the first run, whose page holds a tile
        first = 0
        while first < count:
            end = gl.where(first < sinks, sinks, count) if SINK else count
            _, run = _run(list_ptr, first, end)
            if SINK:
                q = q_buffer.index(gl.where(first < sinks, GROUPS + GROUP, GROUP))
            length = run * PAGE
            whole = length // KEYS * KEYS
            for _ in range(taken, whole, KEYS):
                m_i, l_i, acc, p = _fold(
                    q, k_buffer, v_buffer, barriers, done, tile, m_i, l_i, acc, p, factor, 0, SCHEDULE, "each", False,
                    KEYS, ROWS, s_layout, o_layout, p_layout,
                )  # fmt: skip
                tile += 1
            if whole < length:
                m_i, l_i, acc, p = _fold(
                    q, k_buffer, v_buffer, barriers, done, tile, m_i, l_i, acc, p, factor, whole + KEYS - length,
                    SCHEDULE, "each", True, KEYS, ROWS, s_layout, o_layout, p_layout,
                )  # fmt: skip
                tile += 1
            taken = 0
            first += run
        m_i, l_i, acc, p = _fold(
            q, k_buffer, v_buffer, barriers, done, tile, m_i, l_i, acc, p, factor, 0, SCHEDULE, "last", False, KEYS,
            ROWS, s_layout, o_layout, p_layout,
        )  # fmt: skip
        acc = acc / gl.expand_dims(gl.convert_layout(l_i, gl.SliceLayout(1, o_layout)), 1)
        offs_q = query + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout))
        offs_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, o_layout))
        base = (gl.cast(row, gl.int64) * tokens * HEADS + head) * DIM  # of out, [rows, tokens, HEADS, DIM]
        places = gl.expand_dims(offs_q * (HEADS * DIM), 1) + gl.expand_dims(offs_d, 0)
        gl.store(out_ptr + base + places, acc.to(gl.bfloat16), mask=gl.expand_dims(offs_q < tokens, 1))
        if LSE:  # [rows, HEADS, tokens]
            offs_l = query + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
            lse = (m_i + gl.log2(l_i)) * 0.6931471805599453
            gl.store(lse_ptr + (gl.cast(row, gl.int64) * HEADS + head) * tokens + offs_l, lse, mask=offs_l < tokens)
        done += 1  # noqa: SIM113


@gluon.jit
def _new_barrier(DEPTH: gl.constexpr, ARRIVALS: gl.constexpr):
    barrier = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(DEPTH):
        mbarrier.init(barrier.index(stage), count=ARRIVALS)
    return barrier


@gluon.jit(do_not_specialize=["tokens", "pages", "table_width", "items"])
def _attend(
    q_tiles, q_sink_tiles, kv_tiles, table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr,
    tokens, pages, table_width, items, factor,
    SCHEDULE: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, DIM: gl.constexpr, SINK: gl.constexpr, LSE: gl.constexpr, WARPS: gl.constexpr,
    CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    """Two consumer groups and a producer; CONSUMER and PRODUCER are registers of a thread."""
    GROUPS: gl.constexpr = 2
    STAGES: gl.constexpr = _stages(SCHEDULE)
    q_buffer = gl.allocate_shared_memory(gl.bfloat16, [(2 if SINK else 1) * GROUPS, ROWS, DIM], q_tiles.layout)
    k_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, DIM], kv_tiles.layout)
    v_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, DIM], kv_tiles.layout)
    barriers = ()  # each in memory of its own, since Triton keeps accesses to one piece of memory in order
    for at in gl.static_range(_barrier_count(SCHEDULE)):
        barrier = _new_barrier(_depth(SCHEDULE, _name_of(SCHEDULE, at)), _arrivals(SCHEDULE, at))
        barriers += (barrier,)  # type: ignore[assignment]
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr, q_buffer, k_buffer, v_buffer, barriers, tokens,
                    table_width, items, factor, 0, SCHEDULE, HEADS, PAGE, GROUPS, ROWS, KEYS, DIM, SINK, LSE, WARPS)),
        (_consume, (table_ptr, count_ptr, sinks_ptr, out_ptr, lse_ptr, q_buffer, k_buffer, v_buffer, barriers, tokens,
                    table_width, items, factor, 1, SCHEDULE, HEADS, PAGE, GROUPS, ROWS, KEYS, DIM, SINK, LSE, WARPS)),
        (_produce, (q_tiles, q_sink_tiles, kv_tiles, table_ptr, count_ptr, sinks_ptr, q_buffer, k_buffer, v_buffer,
                    barriers, tokens, pages, table_width, items, SCHEDULE, HEADS, KV_HEADS, PAGE, GROUPS, ROWS, KEYS,
                    DIM, SINK)),
    ], [WARPS, 1], [CONSUMER, PRODUCER])  # fmt: skip


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
    """Launch for tensors that were checked; UsageError for a call that its rules in the op's spec leave out.

    q, q_sink and kv must begin at a multiple of 16 bytes, as every allocation does.
    """
    from . import SPEC

    args = (q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale)
    SPEC.expect_taken("hopper", dict(zip(SPEC.names, args, strict=True)))
    for name, tensor in (("q", q), ("q_sink", q_sink), ("kv", kv)):
        if tensor is not None and tensor.data_ptr() % 16:
            address = tensor.data_ptr()
            raise ValueError(f"block_attention: {name} begins at address {address}; descriptors need a multiple of 16")
    rows, tokens, heads, dim = q.shape
    config = config or CONFIGS[90, dim]
    items = triton.cdiv(tokens, ROWS * GROUPS) * heads * rows
    q_tiles = tiles_of(q.view(rows * tokens, -1), ROWS, dim)
    _attend[(min(items, programs_at_once(q.device)),)](
        q_tiles, q_tiles if q_sink is None else tiles_of(q_sink.view(rows * tokens, -1), ROWS, dim),
        tiles_of(kv.view(-1, kv.shape[3] * dim), KEYS, dim), page_table, page_count,
        page_count if sink_count is None else sink_count, out, out if lse is None else lse,
        tokens, kv.shape[1], page_table.shape[1], items, scale / math.log(2),
        SCHEDULE=schedule_of(config.stages, GROUPS), HEADS=heads, KV_HEADS=kv.shape[3], PAGE=kv.shape[2], ROWS=ROWS,
        KEYS=KEYS, DIM=dim, SINK=q_sink is not None, LSE=lse is not None, WARPS=WARPS,
        CONSUMER=config.consumer_registers, PRODUCER=config.producer_registers, num_warps=WARPS,
    )  # fmt: skip


def tiles_of(matrix: Tensor, rows: int, columns: int) -> Any:
    """A descriptor that loads tiles [rows, columns] of a matrix, as the tensor cores read them."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@cache
def programs_at_once(device: torch.device) -> int:
    """Programs that a device runs at once: one on each of its multiprocessors."""
    if device.type != "cuda":
        return PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def candidates(capability: int) -> list[Config]:
    """Configs worth trying; three stages do not fit beside the queries of a sink."""
    return [Config(2), Config(3), Config(2, 232, 40)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    options: dict[str, dict[str, object]] = {"plain": {}, "sink and lse": {"sinks": 1, "lse": True}}
    return {
        f"{variant} bf16 d128": make_inputs(
            Case(variant, sizes(1, 256, 4, FRAME_480P, 2, 2, 128), option), torch.bfloat16, "cpu", 0
        ) | {"config": CONFIGS[capability, 128]}
        for variant, option in options.items()
    }  # fmt: skip


__all__ = ["CONFIGS", "Config", "block_attention", "candidates", "compile_cases"]
