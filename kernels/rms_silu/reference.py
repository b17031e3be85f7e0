"""Channel norm and SiLU of a VAE in plain torch: the definition of the op and its cases."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case


def rms_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    tail: Tensor | None,
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    for added in (bias, residual):
        y = y if added is None else y + added.to(wide)
    if total is not None:
        total.copy_(y.to(total.dtype))
    out.copy_(F.silu(F.normalize(y, dim=-1) * math.sqrt(x.shape[-1]) * gamma.to(wide)).to(out.dtype))
    if tail is not None:
        tail.copy_(out[-len(tail) :])


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """With bias, residual, total and tail where the case says so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    pixels, channels = case["pixels"], case["channels"]
    x, gamma = normal(pixels, channels), normal(channels)
    x[0] = 0  # a pixel without a direction
    added = case.options.get("added", ())
    return {
        "x": x,
        "gamma": gamma,
        "bias": normal(channels) if "bias" in added else None,
        "residual": normal(pixels, channels) if "residual" in added else None,
        "total": torch.full_like(x, float("nan")) if "total" in added else None,
        "out": torch.full_like(x, float("nan")),
        "tail": torch.full_like(x[: case["tail"]], float("nan")) if case["tail"] else None,
    }


def sizes(pixels: int, channels: int, tail: int = 0) -> dict[str, int]:
    return {"pixels": pixels, "channels": channels, "tail": tail}


SUM = ("bias", "residual", "total")
TEST_CASES = (
    Case("one pixel", sizes(1, 16)),
    Case("odd sizes", sizes(37, 24)),
    Case("more channels than a tile", sizes(5, 384)),
    Case("bias", sizes(37, 24), {"added": ("bias",)}),
    Case("bias, residual, total, tail", sizes(37, 24, tail=21), {"added": SUM}),
    Case("all of it once more", sizes(5, 24, tail=5)),
    Case("residual alone", sizes(5, 96), {"added": ("residual",)}),
)
BENCH_CASES = (
    Case("480x832, 96 channels, four frames", sizes(4 * 480 * 832, 96)),
    Case("480x832, 96 channels, four frames, residual", sizes(4 * 480 * 832, 96, 2 * 480 * 832), {"added": SUM}),
    Case("240x416, 192 channels, four frames", sizes(4 * 240 * 416, 192)),
    Case("60x104, 384 channels, one frame", sizes(60 * 104, 384)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
