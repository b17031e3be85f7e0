"""`linear_wide`: a linear layer of half-precision operands with its result in float32.

Products of two half-precision numbers are exact in float32, so what converts both operands to float32 first computes
the same up to the order of its sums, at the rate of float32 and with a copy of the weight. On a GPU this is torch's
matmul with a result of another dtype; elsewhere the operands are converted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Op
from .spec import Arg, OpSpec


def reference(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """See the public function for shapes."""
    if x.is_cuda:
        torch.ops.aten.mm.dtype_out(x, weight.t(), out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weight.to(out.dtype).t(), out=out)


SPEC = OpSpec(
    name="linear_wide",
    reference=reference,
    outputs=("out",),
    like="x",
    args={"x": Arg("rows inner"), "weight": Arg("width inner"), "out": Arg("rows width")},
    dense=False,
    family="matmul",
    label="linear, float32",
    flops="2 * rows * inner * width",
)
OP = Op(SPEC)


def linear_wide(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x @ weight^T in float32; x [M, K] and weight [N, K] in float16 or bfloat16, out [M, N] in float32.

    Raises UsageError naming the argument that does not fit.
    """
    out = x.new_empty(len(x), len(weight), dtype=torch.float32) if out is None else out
    OP(x, weight, out)
    return out
