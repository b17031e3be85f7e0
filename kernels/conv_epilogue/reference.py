"""Bias, residual, ReLU and spread of channels after a convolution, in plain torch: definition of the op, and cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case


def conv_epilogue(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, parts: int, relu: bool
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    for added in (bias, residual):
        y = y if added is None else y + added.to(wide)
    y = F.relu(y) if relu else y
    out.copy_(y.to(out.dtype).unflatten(-1, (parts, -1)).movedim(-2, 1).flatten(0, 1))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """With bias and residual where the case says so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    frames, height, width, channels = (case[name] for name in ("frames", "height", "width", "channels"))
    parts, added = case["parts"], case.options.get("added", ())
    wide, size = parts * channels, (frames * parts, height, width, channels)
    return {
        "x": normal(frames, height, width, wide),
        "bias": normal(wide) if "bias" in added else None,
        "residual": normal(frames, height, width, wide) if "residual" in added else None,
        "out": torch.full(size, float("nan"), dtype=dtype, device=device),
        "parts": parts,
        "relu": case.options.get("relu", False),
    }


def sizes(frames: int, height: int, width: int, channels: int, parts: int = 1) -> dict[str, int]:
    return {"frames": frames, "height": height, "width": width, "channels": channels, "parts": parts}


SUM = ("bias", "residual")
TEST_CASES = (
    Case("one pixel", sizes(1, 1, 1, 16)),
    Case("sum", sizes(2, 3, 5, 24), {"added": SUM}),
    Case("sum, relu", sizes(2, 3, 5, 24), {"added": SUM, "relu": True}),
    Case("residual alone", sizes(2, 3, 5, 24), {"added": ("residual",)}),
    Case("two frames of one", sizes(2, 3, 5, 24, parts=2), {"added": ("bias",)}),
    Case("more channels than a tile", sizes(1, 2, 2, 384, parts=2)),
)
BENCH_CASES = (
    Case("240x416, 192 channels, four frames", sizes(4, 240, 416, 192), {"added": SUM}),
    Case("two frames of one, 120x208, 384 channels", sizes(2, 120, 208, 384, parts=2), {"added": ("bias",)}),
    Case("120x208, 384 channels, two frames", sizes(2, 120, 208, 384), {"added": SUM}),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
