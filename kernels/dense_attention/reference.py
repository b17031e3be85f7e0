"""Attention over one run of pages in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_attention import reference as paged
from ..block_attention.reference import SIX, THREE, scores_and_values, sizes
from ..spec import FRAME_480P, Case

TOLERANCE = paged.TOLERANCE
SPARE = 3  # pages before the run, and after it


def dense_attention(q: Tensor, kv: Tensor, first: int, count: int, out: Tensor, scale: float) -> None:
    """Row by row, in float32 or better; see the public function for shapes."""
    pages = torch.arange(first, first + count, device=q.device)
    for row, queries in enumerate(q):
        scores, v = scores_and_values(queries, kv, pages, None, 0, None, scale)
        out[row] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """A run in the middle of a store, whose other pages hold NaN, so that a read beside it shows."""
    generator = torch.Generator().manual_seed(seed)
    count, dim = case["pages"], case["dim"]
    kv = torch.randn(2, count + 2 * SPARE, case["page_tokens"], case["kv_heads"], dim, generator=generator)
    kv[:, :SPARE] = kv[:, SPARE + count :] = float("nan")
    q = torch.randn(case["rows"], case["tokens"], case["heads"], dim, generator=generator)
    return {
        "q": q.to(device, dtype),
        "kv": kv.to(device, dtype),
        "first": SPARE,
        "count": count,
        "out": torch.full(q.shape, float("nan"), dtype=dtype, device=device),
        "scale": dim**-0.5,
    }


TEST_CASES = (
    Case("one page", sizes(1, 32, 1, 64, 1, 1, 64)),
    Case("odd sizes, two rows", sizes(2, 37, 5, 23, 2, 2, 64)),
    Case("grouped heads", sizes(1, 16, 4, 20, 6, 2, 64)),
    Case("head of 128", sizes(1, 24, 3, 40, 2, 2, 128)),
)
BENCH_CASES = (
    Case("1.3B, full window", sizes(1, THREE, 21, FRAME_480P, 12, 12, 128)),
    Case("1.3B, block of one", sizes(1, FRAME_480P, 21, FRAME_480P, 12, 12, 128)),
    Case("14B, six frames", sizes(1, SIX, 9, FRAME_480P, 40, 40, 128)),
)
