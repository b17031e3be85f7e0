"""Gated residual, LayerNorm, scale and shift in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import FP8, FRAME_480P, LIMITS, Case


def adaln(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    normed: Tensor,
    row_scale: Tensor | None,
    eps: float,
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def tokens(per_frame: Tensor) -> Tensor:
        """[R, F, d] to [R, T, d]."""
        return per_frame.to(wide).repeat_interleave(x.shape[1] // per_frame.shape[1], dim=1)

    total = x.to(wide)
    if update is not None:
        total = total + (update.to(wide) if gate is None else update.to(wide) * tokens(gate))
    residual.copy_(total.to(residual.dtype))
    result = F.layer_norm(total, total.shape[-1:], eps=eps)
    if weight is not None and bias is not None:
        result = result * weight.to(wide) + bias.to(wide)
    if shift is not None and scale is not None:
        result = result * (1 + tokens(scale)) + tokens(shift)
    if row_scale is not None:
        by = result.abs().amax(-1).clamp(min=1e-12) / LIMITS[FP8]
        row_scale.copy_(by.to(row_scale.dtype))
        result = result / by[..., None]
    normed.copy_(result.to(normed.dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows, frames, per_frame, dim = (case[name] for name in ("rows", "frames", "per_frame", "dim"))
    kind = case.options.get("kind", "modulated")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tokens = (rows, frames * per_frame, dim)
    modulated, fp8 = kind != "affine", bool(case.options.get("fp8"))
    empty = torch.full(tokens, float("nan"), dtype=dtype, device=device)
    return {
        "x": draw(*tokens) + 0.5,
        "update": draw(*tokens) if kind != "first" else None,
        "gate": draw(rows, frames, dim) if kind == "modulated" else None,
        "shift": draw(rows, frames, dim) if modulated else None,
        "scale": draw(rows, frames, dim) if modulated else None,
        "weight": None if modulated else draw(dim),
        "bias": None if modulated else draw(dim),
        "residual": empty,
        "normed": empty.to(FP8) if fp8 else empty.clone(),
        "row_scale": torch.full(tokens[:2], float("nan"), device=device) if fp8 else None,
        "eps": 1e-6,
    }


def sizes(rows: int, frames: int, per_frame: int, dim: int) -> dict[str, int]:
    return {"rows": rows, "frames": frames, "per_frame": per_frame, "dim": dim}


TEST_CASES = (
    Case("one token", sizes(1, 1, 1, 64)),
    Case("odd sizes", sizes(2, 3, 5, 72)),
    Case("affine, plain residual", sizes(1, 2, 3, 40), {"kind": "affine"}),
    Case("no residual", sizes(2, 1, 4, 48), {"kind": "first"}),
    Case("fp8 for the next matmul", sizes(1, 2, 4, 96), {"fp8": True}),
)
BENCH_CASES = (
    Case("1.3B, three frames", sizes(1, 3, FRAME_480P, 1536)),
    Case("1.3B, affine", sizes(1, 3, FRAME_480P, 1536), {"kind": "affine"}),
    Case("1.3B, fp8", sizes(1, 3, FRAME_480P, 1536), {"fp8": True}),
    Case("1.3B, 21 frames", sizes(1, 21, FRAME_480P, 1536)),
    Case("14B, six frames", sizes(1, 6, FRAME_480P, 5120)),
    Case("5B, eight frames", sizes(1, 8, 880, 3072)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
