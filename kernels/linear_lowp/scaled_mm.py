"""linear_lowp through torch's scaled matmul (cuBLAS), GELU after it: GPUs with FP8, sizes that are multiples of 16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_lowp(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    """Scales per row of both operands; other combinations are widened to that."""
    if x.shape[1] % 16 or len(weight) % 16:
        from .gpu import linear_lowp as triton_linear

        return triton_linear(x, weight, x_scale, weight_scale, bias, out, gelu)
    rows = x_scale.expand(len(x))[:, None].contiguous()
    columns = weight_scale.expand(len(weight))[None].contiguous()
    kind = torch.bfloat16 if out.dtype != torch.float32 else out.dtype
    wide_bias = None if bias is None else bias.to(kind)
    result = torch._scaled_mm(x, weight.T, scale_a=rows, scale_b=columns, bias=wide_bias, out_dtype=kind)
    out.copy_(F.gelu(result, approximate="tanh") if gelu else result)
