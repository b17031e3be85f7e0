"""The merge of partial results of attention in plain torch: the definition of the op and its cases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..block_attention.reference import merge_partials
from ..spec import FRAME_480P, Case


def merge_parts(results: Tensor, sums: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """In the dtype of the results; see the public function for shapes."""
    out.copy_(merge_partials(results, sums))
    if lse is not None:
        lse.copy_(sums.logsumexp(0))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Results of parts with shares of different sizes; of the first `empty` parts, none has keys."""
    generator = torch.Generator().manual_seed(seed)
    parts, rows, tokens, heads, dim = (case[name] for name in ("parts", "rows", "tokens", "heads", "dim"))
    results = torch.randn(parts, rows, tokens, heads, dim, generator=generator)
    sums = torch.randn(parts, rows, heads, tokens, generator=generator) * 4 + 10
    empty = case.options.get("empty", 0)
    results[:empty], sums[:empty] = 0.0, -math.inf
    return {
        "results": results.to(device),
        "sums": sums.to(device),
        "out": torch.full((rows, tokens, heads, dim), math.nan, dtype=dtype, device=device),
        "lse": torch.full((rows, heads, tokens), math.nan, device=device) if case.options.get("lse") else None,
    }


def sizes(parts: int, rows: int, tokens: int, heads: int, dim: int) -> dict[str, int]:
    return {"parts": parts, "rows": rows, "tokens": tokens, "heads": heads, "dim": dim}


TEST_CASES = (
    Case("two parts", sizes(2, 1, 24, 2, 64)),
    Case("rows, odd sizes", sizes(3, 2, 13, 3, 64), {"lse": True}),
    Case("head of 128, empty parts", sizes(4, 1, 9, 2, 128), {"empty": 2, "lse": True}),
)
BENCH_CASES = (
    Case("1.3B, two parts", sizes(2, 1, 3 * FRAME_480P, 12, 128)),
    Case("1.3B, block of one, four parts", sizes(4, 1, FRAME_480P, 12, 128)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
