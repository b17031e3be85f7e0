"""linear_lowp through torch's scaled matmul (cuBLAS), GELU after it: GPUs with FP8, results in bfloat16.

That matmul takes inner and outer sizes that are multiples of 16 and, with a scale to a row, gives bfloat16 only; what
it does not take goes to Triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_lowp(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    """Scales per row of both operands; other combinations are widened to that. Sums are in float32."""
    if x.shape[1] % 16 or len(weight) % 16 or out.dtype != torch.bfloat16:
        from .gpu import linear_lowp as triton_linear

        return triton_linear(x, weight, x_scale, weight_scale, bias, out, gelu)
    rows = x_scale.float().expand(len(x))[:, None].contiguous()
    columns = weight_scale.float().expand(len(weight))[None].contiguous()
    result = torch._scaled_mm(x, weight.T, scale_a=rows, scale_b=columns, bias=bias, out_dtype=out.dtype)
    out.copy_(F.gelu(result, approximate="tanh") if gelu else result)
