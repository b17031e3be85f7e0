"""Rows in low precision in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_lowp.reference import pack
from ..spec import FP8, FRAME_480P, Case


def quantise_rows(x: Tensor, out: Tensor, scale: Tensor, gelu: bool) -> None:
    """In float32; see the public function for shapes."""
    packed, by = pack(F.gelu(x.float(), approximate="tanh") if gelu else x, out.dtype)
    out.copy_(packed)
    scale.copy_(by)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(case["rows"], case["dim"], generator=generator)
    x[0] = 0  # a row without a largest entry
    kind = torch.int8 if case.options.get("int8") else FP8
    return {
        "x": x.to(device, dtype),
        "out": torch.full(x.shape, 99.0, device=device).to(kind),
        "scale": torch.full(x.shape[:1], float("nan"), device=device),
        "gelu": bool(case.options.get("gelu")),
    }


def sizes(rows: int, dim: int) -> dict[str, int]:
    return {"rows": rows, "dim": dim}


TEST_CASES = (
    Case("fp8", sizes(3, 72)),
    Case("fp8, gelu", sizes(4, 96), {"gelu": True}),
    Case("int8", sizes(5, 40), {"int8": True}),
    Case("int8, gelu", sizes(2, 130), {"int8": True, "gelu": True}),
)
BENCH_CASES = (
    Case("1.3B attention out", sizes(3 * FRAME_480P, 1536)),
    Case("1.3B ffn, gelu", sizes(3 * FRAME_480P, 8960), {"gelu": True}),
    Case("14B ffn, gelu", sizes(3 * FRAME_480P, 13824), {"gelu": True}),
)
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
