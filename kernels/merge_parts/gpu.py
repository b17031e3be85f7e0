"""The merge of partial results of attention in Triton: a program takes some lines, each of one token and head.

Parts are added in their order, so that the result does not depend on which of them was ready first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import Case


@dataclass(frozen=True)
class Config:
    """Lines of a program, and warps."""

    lines: int
    warps: int


CONFIG = Config(32, 4)


@triton.jit
def _merge(
    results_ptr, sums_ptr, out_ptr, lse_ptr, lines, tokens,
    PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, LINES: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)  # [LINES], of [rows, tokens, HEADS]
    inside = line < lines
    token, head = line // HEADS, line % HEADS
    sum_at = (token // tokens * HEADS + head) * tokens + token % tokens  # sums, lse: [rows, HEADS, tokens]
    most = tl.full([LINES], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        most = tl.maximum(most, tl.load(sums_ptr + part * lines + sum_at, mask=inside, other=0.0))
    at = line[:, None] * DIM + tl.arange(0, DIM)[None]  # [LINES, DIM]
    total = tl.zeros([LINES], tl.float32)
    acc = tl.zeros([LINES, DIM], tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.exp(tl.load(sums_ptr + part * lines + sum_at, mask=inside, other=0.0) - most)
        total += weight
        acc += weight[:, None] * tl.load(results_ptr + part * lines * DIM + at, mask=inside[:, None], other=0.0)
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if LSE:
        tl.store(lse_ptr + sum_at, most + tl.log(total), mask=inside)


def merge_parts(
    results: Tensor, sums: Tensor, out: Tensor, lse: Tensor | None, config: Config = CONFIG
) -> None:
    """Launch for tensors that were checked."""
    parts, rows, tokens, heads, dim = results.shape
    lines = rows * tokens * heads
    launchable(_merge)[(triton.cdiv(lines, config.lines),)](
        results, sums, out, out if lse is None else lse, lines, tokens,
        PARTS=parts, HEADS=heads, DIM=dim, LINES=config.lines, LSE=lse is not None, num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(lines, warps) for lines in (8, 16, 32, 64) for warps in (4, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    return {
        f"{'lse' if lse else 'plain'} bf16 d{dim}": make_inputs(
            Case("", sizes(2, 1, 64, 2, dim), {"lse": lse}), torch.bfloat16, "cpu", 0
        )
        for dim in (64, 128)
        for lse in (False, True)
    }
