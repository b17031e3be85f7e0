"""Channel norm and SiLU of a VAE in plain torch: the definition of the op and its cases."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case


def rms_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.normalize(x.to(wide), dim=-1) * math.sqrt(x.shape[-1]) * gamma.to(wide)
    out.copy_(F.silu(normed).to(out.dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case["pixels"], case["channels"], generator=generator)
    x[0] = 0  # a pixel without a direction
    return {
        "x": x.to(device, dtype),
        "gamma": torch.randn(case["channels"], generator=generator).to(device, dtype),
        "out": torch.full(x.shape, float("nan"), dtype=dtype, device=device),
    }


def sizes(pixels: int, channels: int) -> dict[str, int]:
    return {"pixels": pixels, "channels": channels}


TEST_CASES = (
    Case("one pixel", sizes(1, 16)),
    Case("odd sizes", sizes(37, 24)),
    Case("more channels than a tile", sizes(5, 384)),
)
BENCH_CASES = (
    Case("480x832, 96 channels, four frames", sizes(4 * 480 * 832, 96)),
    Case("240x416, 192 channels, four frames", sizes(4 * 240 * 416, 192)),
    Case("60x104, 384 channels, one frame", sizes(60 * 104, 384)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
