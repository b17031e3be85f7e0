"""Attention over parts of the listed keys in plain torch: the definition of the op and its cases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..block_attention import reference as whole
from ..block_attention.reference import SIX, THREE, part_bounds, scores_and_values, sizes
from ..spec import FRAME_480P, Case

TOLERANCE = whole.TOLERANCE | {torch.float32: 4e-6}


def attention_parts(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    lse: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    scale: float,
) -> None:
    """Row by row and part by part, in float32 or better; see the public function for shapes."""
    for row, count in enumerate(page_count.tolist()):
        sinks = 0 if sink_count is None else int(sink_count[row])
        turned = None if q_sink is None else q_sink[row]
        scores, v = scores_and_values(q[row], kv, page_table[row, :count], turned, sinks, kv_scale, scale)
        for part, (first, stop) in enumerate(part_bounds(v.shape[1], len(out))):
            seen = scores[..., first:stop]
            out[part, row] = (seen.softmax(-1) @ v[:, first:stop]).transpose(0, 1).to(out.dtype)
            lse[part, row] = seen.logsumexp(-1).to(lse.dtype) if stop > first else -math.inf


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Inputs of `block_attention`, and room for the results of `parts` parts."""
    inputs = whole.make_inputs(case, dtype, device, seed)
    rows, tokens, heads, dim = inputs["q"].shape
    parts = case["parts"]
    inputs["out"] = torch.full((parts, rows, tokens, heads, dim), math.nan, device=device)
    inputs["lse"] = torch.full((parts, rows, heads, tokens), math.nan, device=device)
    return inputs


def parted(parts: int, **dims: int) -> dict[str, int]:
    return {**dims, "parts": parts}


TEST_CASES = (
    Case("two parts", parted(2, **sizes(1, 18, 5, 70, 2, 2, 64)), {"order": "one"}),
    Case("parts cut pages of runs", parted(3, **sizes(2, 17, 6, 90, 2, 1, 64)), {"order": "runs"}),
    Case("one part", parted(1, **sizes(1, 16, 2, 40, 1, 1, 64))),
    Case("short pages, sink", parted(2, **sizes(1, 20, 14, 23, 2, 2, 64)), {"sinks": 3, "order": "one"}),
    Case("head of 128", parted(2, **sizes(1, 17, 2, 150, 1, 1, 128)), {"sinks": 1}),
    Case("fp8 pages", parted(2, **sizes(1, 17, 6, 50, 2, 1, 64)), {"fp8": True, "order": "one", "alike": 4}),
)
BENCH_CASES = (
    Case("1.3B, full window", parted(2, **sizes(1, THREE, 21, FRAME_480P, 12, 12, 128)), {"order": "one"}),
    Case("1.3B, block of one", parted(4, **sizes(1, FRAME_480P, 21, FRAME_480P, 12, 12, 128)), {"order": "one"}),
    Case("14B, six frames", parted(2, **sizes(1, SIX, 9, FRAME_480P, 40, 40, 128)), {"order": "one"}),
)
