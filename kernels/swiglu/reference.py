"""SwiGLU of a joined projection in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Case


def swiglu(x: Tensor, out: Tensor) -> None:
    """In float32 or better; see the public function for shapes."""
    gate, value = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    out.copy_((F.silu(gate) * value).to(out.dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(case["rows"], 2 * case["width"], generator=generator)
    out = torch.full((case["rows"], case["width"]), float("nan"), dtype=dtype, device=device)
    return {"x": x.to(device, dtype), "out": out}


def sizes(rows: int, width: int) -> dict[str, int]:
    return {"rows": rows, "width": width}


TEST_CASES = (
    Case("one row", sizes(1, 16)),
    Case("odd sizes", sizes(7, 72)),
    Case("wider than a tile", sizes(2, 1100)),
)
BENCH_CASES = (Case("MAGI-1 24B, one chunk", sizes(21600, 16384)), Case("a frame", sizes(3600, 16384)))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
