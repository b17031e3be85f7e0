"""`linear_gelu`: a linear layer with GELU (tanh) in its last step.

On a GPU it is torch's own matmul with the epilogue of cuBLASLt, whose GELU is the tanh form. Elsewhere torch's op of
that name takes the exact GELU, so the layer and its GELU are called one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .spec import Arg, OpSpec


def reference(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """See the public function for shapes."""
    if x.is_cuda:
        torch.ops.aten._addmm_activation.out(bias, x, weight.t(), use_gelu=True, out=out)
    else:
        torch.ops.aten.gelu.out(F.linear(x, weight, bias), approximate="tanh", out=out)


SPEC = OpSpec(
    name="linear_gelu",
    reference=reference,
    outputs=("out",),
    like="x",
    args={
        "x": Arg("rows inner"), "weight": Arg("width inner"), "bias": Arg("width"), "out": Arg("rows width")
    },
    dense=False,
    family="matmul",
    label="linear, gelu",
    flops="2 * rows * inner * width",
)  # fmt: skip
OP = Op(SPEC)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu(x @ weight^T + bias), GELU in its tanh form; x [M, K], weight [N, K], bias [N], out [M, N], in one dtype.

    Raises UsageError naming the argument that does not fit. Source: GELU (arXiv 1606.08415).
    """
    out = x.new_empty(len(x), len(weight)) if out is None else out
    OP(x, weight, bias, out)
    return out
