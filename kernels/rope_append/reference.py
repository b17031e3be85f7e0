"""Rotation of queries and keys and the write into pages, in plain torch: definition and cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..qk_norm_rope_append import reference as with_norm
from ..qk_norm_rope_append.reference import rotated, sizes, token_cos_sin, write_pages
from ..spec import Case


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
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(torch.promote_types(q.dtype, torch.float32), rope_time.dtype)
    cos_sin = token_cos_sin(rope_time, rope_rows, rope_columns).to(wide)
    out.copy_(rotated(q.to(wide), cos_sin, half_split))
    if rope_sink is not None and q_sink is not None:
        sink_cos_sin = token_cos_sin(rope_sink, rope_rows, rope_columns).to(wide)
        q_sink.copy_(rotated(q.to(wide), sink_cos_sin, half_split))
    write_pages(rotated(k.to(wide), cos_sin, half_split), v.to(wide), kv, pages, kv_scale)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """pairs: of each axis, fewer than fill a head."""
    inputs = with_norm.make_inputs(case, dtype, device, seed)
    heads, kv_heads, dim = case["heads"], case["kv_heads"], case["dim"]
    parts = inputs.pop("qkv").split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in parts)
    out = inputs.pop("q")
    for name in ("q_weight", "k_weight", "eps"):
        del inputs[name]
    if pairs := case.options.get("pairs"):
        for name in ("rope_time", "rope_rows", "rope_columns", "rope_sink"):
            table = inputs[name]
            inputs[name] = None if table is None else table[..., :pairs, :].contiguous()
    return {"q": q, "k": k, "v": v, "out": out, "half_split": bool(case.options.get("half_split")), **inputs}


APART = {"half_split": True, "pairs": 16}  # MAGI-1's: a part of a head, in pairs that lie apart
TEST_CASES = (
    *with_norm.TEST_CASES,
    Case("pairs that lie apart", sizes(1, 2, 2, 3, 2, 1, 64), {"half_split": True}),
    Case("a part of a head, apart", sizes(2, 1, 2, 3, 6, 2, 64), {"half_split": True, "pairs": 8, "sinks": True}),
    Case("a part of a head, side by side", sizes(1, 1, 3, 2, 3, 1, 64), {"pairs": 8}),
    Case("fp8 pages, apart", sizes(1, 1, 2, 2, 3, 1, 128), {"fp8": True, **APART}),
)
TOLERANCE = with_norm.TOLERANCE
BENCH_CASES = (
    *with_norm.BENCH_CASES,
    Case("MAGI-1 4.5B, four chunks", sizes(4, 6, 45, 45, 24, 8, 128), APART),
    Case("MAGI-1 24B, four chunks", sizes(4, 6, 45, 80, 48, 8, 128), APART),
)
