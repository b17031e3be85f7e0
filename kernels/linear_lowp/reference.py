"""A linear layer on FP8 or INT8 numbers in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import FRAME_480P, LIMITS, Case


def linear_lowp(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(x_scale.dtype, torch.float32)
    result = (x.to(wide) @ weight.to(wide).T) * x_scale.to(wide)[:, None] * weight_scale.to(wide)
    if bias is not None:
        result = result + bias.to(wide)
    out.copy_((F.gelu(result, approximate="tanh") if gelu else result).to(out.dtype))


def pack(weight: Tensor, dtype: torch.dtype, per_channel: bool = True) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as FP8 or INT8 and its scales, float32 [N] or, per tensor, [1]."""
    limit = LIMITS[dtype]
    most = weight.float().abs().amax(1) if per_channel else weight.float().abs().amax().reshape(1)
    scale = most.clamp(min=1e-12) / limit
    scaled = (weight.float() / (scale[:, None] if per_channel else scale)).clamp(-limit, limit)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows, inner, width = case["rows"], case["inner"], case["width"]
    kind = torch.int8 if case.options.get("int8") else torch.float8_e4m3fn
    per_token = not case.options.get("per_tensor")
    x, x_scale = pack(torch.randn(rows, inner, generator=generator), kind, per_token)
    weight, weight_scale = pack(torch.randn(width, inner, generator=generator) / inner**0.5, kind, per_token)
    bias = torch.randn(width, generator=generator) if case.options.get("bias") else None
    return {
        "x": x.to(device),
        "weight": weight.to(device),
        "x_scale": x_scale.to(device),
        "weight_scale": weight_scale.to(device),
        "bias": None if bias is None else bias.to(device, dtype),
        "out": torch.full((rows, width), float("nan"), dtype=dtype, device=device),
        "gelu": bool(case.options.get("gelu")),
    }


def sizes(rows: int, inner: int, width: int) -> dict[str, int]:
    return {"rows": rows, "inner": inner, "width": width}


TEST_CASES = (
    Case("fp8, tails", sizes(33, 80, 48), {"bias": True}),
    Case("fp8, per tensor", sizes(16, 64, 32), {"per_tensor": True}),
    Case("fp8, gelu", sizes(20, 96, 40), {"bias": True, "gelu": True}),
    Case("int8, tails", sizes(18, 72, 56), {"int8": True}),
    Case("int8, gelu", sizes(32, 64, 32), {"int8": True, "bias": True, "gelu": True}),
)
BENCH_CASES = tuple(
    Case(f"{name}, {kind}", sizes(3 * FRAME_480P, inner, width), {"bias": True, "int8": kind == "int8", "gelu": gelu})
    for kind in ("fp8", "int8")
    for name, inner, width, gelu in (
        ("1.3B qkv", 1536, 4608, False), ("1.3B ffn up", 1536, 8960, True), ("1.3B ffn down", 8960, 1536, False),
        ("14B qkv", 5120, 15360, False), ("14B ffn up", 5120, 13824, True),
    )
)  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
