"""linear_lowp through torch's scaled matmul (cuBLAS), which writes into `out`; GELU after it, in place.

GPUs with FP8, results in bfloat16. That matmul takes inner and outer sizes that are multiples of 16 and, with a scale
to a row, gives bfloat16 only; what it does not take goes to Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def linear_lowp(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool,
    fast: bool = False,
) -> None:  # fmt: skip
    """Scales per row of both operands; other combinations are widened to that.

    fast: sums stay in the tensor cores, which on sm_90 keep some 14 bits of them; else they are in float32.
    """
    if x.shape[1] % 16 or len(weight) % 16 or out.dtype != torch.bfloat16:
        from .gpu import linear_lowp as triton_linear

        return triton_linear(x, weight, x_scale, weight_scale, bias, out, gelu)
    rows, columns = each(x_scale, len(x)).unsqueeze(1), each(weight_scale, len(weight)).unsqueeze(0)
    aten._scaled_mm.out(x, weight.t(), rows, columns, bias, out_dtype=out.dtype, use_fast_accum=fast, out=out)
    if gelu:
        aten.gelu.out(out, approximate="tanh", out=out)


def linear_lowp_fast(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    """The same with fast sums; `inferix bench kernels --tune` takes it where its error is within the op's tolerance."""
    linear_lowp(x, weight, x_scale, weight_scale, bias, out, gelu, fast=True)


def each(scale: Tensor, count: int) -> Tensor:
    """A scale for each of `count` rows, float32 [count]; the tensor itself where it is that."""
    wide = scale if scale.dtype == torch.float32 else scale.float()
    return wide if len(wide) == count else wide.expand(count).contiguous()
