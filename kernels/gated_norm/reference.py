"""Norm of a gated update and residual sum in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case


def gated_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    out: Tensor,
    normed: Tensor | None,
    eps: float,
    next_eps: float,
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gates = gate.to(wide).repeat_interleave(x.shape[1] // gate.shape[1], dim=1)
    dim = x.shape[-1:]
    total = x.to(wide) + F.layer_norm(update.to(wide) * gates, dim, weight.to(wide), bias.to(wide), eps)
    out.copy_(total.to(out.dtype))
    if next_weight is not None and next_bias is not None and normed is not None:
        normed.copy_(F.layer_norm(total, dim, next_weight.to(wide), next_bias.to(wide), next_eps).to(normed.dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """wide: update, gate and weights in float32. next: the norm after the sum, too."""
    generator = torch.Generator().manual_seed(seed)
    rows, frames, per_frame, dim = (case[name] for name in ("rows", "frames", "per_frame", "dim"))
    tokens, is_next = (rows, frames * per_frame, dim), bool(case.options.get("next"))
    kept = torch.promote_types(dtype, torch.float32) if case.options.get("wide") else dtype

    def draw(*shape: int, dtype: torch.dtype = kept) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    empty = torch.full(tokens, float("nan"), dtype=dtype, device=device)
    return {
        "x": draw(*tokens, dtype=dtype) + 0.5,
        "update": draw(*tokens) + 0.25,
        "gate": draw(rows, frames, dim),
        "weight": draw(dim),
        "bias": draw(dim),
        "next_weight": draw(dim, dtype=dtype) if is_next else None,
        "next_bias": draw(dim, dtype=dtype) if is_next else None,
        "out": empty,
        "normed": empty.clone() if is_next else None,
        "eps": 1e-6,
        "next_eps": 1e-5,
    }


def sizes(rows: int, frames: int, per_frame: int, dim: int) -> dict[str, int]:
    return {"rows": rows, "frames": frames, "per_frame": per_frame, "dim": dim}


WIDE, NEXT = {"wide": True}, {"next": True}
TEST_CASES = (
    Case("one token", sizes(1, 1, 1, 64)),
    Case("odd sizes", sizes(2, 3, 5, 72), WIDE),
    Case("odd sizes, next norm", sizes(2, 3, 5, 72), WIDE | NEXT),
    Case("next norm, one dtype", sizes(1, 2, 3, 40), NEXT),
)
BENCH_CASES = (
    Case("MAGI-1 4.5B, four chunks", sizes(1, 24, 2025, 3072), WIDE | NEXT),
    Case("MAGI-1 24B, one chunk", sizes(1, 6, 3600, 6144), WIDE | NEXT),
    Case("MAGI-1 24B, one chunk, after the feed-forward", sizes(1, 6, 3600, 6144), NEXT),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
