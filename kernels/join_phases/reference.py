"""Phases of an upsampled convolution to pixels in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import Case


def join_phases(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns, channels = x.shape[1] - 1, x.shape[2] - 1, out.shape[-1]
    for number in range(4):
        down, right = divmod(number, 2)
        phase = x[:, down : down + rows, right : right + columns, number * channels : (number + 1) * channels].to(wide)
        out[:, down::2, right::2] = (phase if bias is None else phase + bias.to(wide)).to(out.dtype)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """With a bias where the case says so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    frames, height, width, channels = (case[name] for name in ("frames", "height", "width", "channels"))
    size = (frames, 2 * height, 2 * width, channels)
    return {
        "x": normal(frames, height + 1, width + 1, 4 * channels),
        "bias": normal(channels) if case.options.get("bias") else None,
        "out": torch.full(size, float("nan"), dtype=dtype, device=device),
    }


def sizes(frames: int, height: int, width: int, channels: int) -> dict[str, int]:
    """Of the small frames."""
    return {"frames": frames, "height": height, "width": width, "channels": channels}


TEST_CASES = (
    Case("one pixel", sizes(1, 1, 1, 16)),
    Case("odd sizes", sizes(2, 3, 5, 24), {"bias": True}),
    Case("more channels than a tile", sizes(1, 2, 2, 384)),
)
BENCH_CASES = (
    Case("to 480x832, 96 channels, four frames", sizes(4, 240, 416, 96), {"bias": True}),
    Case("to 240x416, 192 channels, four frames", sizes(4, 120, 208, 192), {"bias": True}),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
