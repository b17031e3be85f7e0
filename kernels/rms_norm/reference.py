"""RMS norm over the last dimension with a weight in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import FRAME_480P, Case


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    out.copy_(scaled.to(out.dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows, dim = case["rows"], case["dim"]
    x = torch.randn(rows, dim, generator=generator) * 3 + 0.5
    weight = torch.randn(dim, generator=generator)
    return {
        "x": x.to(device, dtype),
        "weight": weight.to(device, dtype),
        "out": torch.full((rows, dim), float("nan"), dtype=dtype, device=device),
        "eps": 1e-6,
    }


def sizes(rows: int, dim: int) -> dict[str, int]:
    return {"rows": rows, "dim": dim}


TEST_CASES = (Case("one row", sizes(1, 64)), Case("odd sizes", sizes(7, 72)), Case("wide", sizes(3, 1536)))
BENCH_CASES = (
    Case("1.3B, three frames", sizes(3 * FRAME_480P, 1536)),
    Case("14B, six frames", sizes(6 * FRAME_480P, 5120)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
