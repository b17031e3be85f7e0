"""`linear_gelu`: a linear layer with GELU (tanh) in its last step.

On a GPU it is torch's own matmul with the epilogue of cuBLASLt, whose GELU is the tanh form. Elsewhere torch's op of
that name takes the exact GELU, so the layer and its GELU are called one after the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .spec import Arg, OpSpec

FACTOR = 2 * math.sqrt(2 / math.pi)


def reference(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """See the public function for shapes."""
    if x.is_cuda:
        torch.ops.aten._addmm_activation.out(bias, x, weight.t(), use_gelu=True, out=out)
    elif x.dtype in (torch.float32, torch.float64):
        gelu_into(out, F.linear(x, weight, bias))
    else:
        torch.ops.aten.gelu.out(F.linear(x, weight, bias), approximate="tanh", out=out)


def gelu_into(out: Tensor, x: Tensor) -> None:
    """Write GELU (tanh) of x, as x * sigmoid(2z), since torch's tanh takes three times as long."""
    twice_z = torch.addcmul(x.new_full((), FACTOR), x, x, value=FACTOR * 0.044715).mul_(x)
    torch.mul(x, twice_z.sigmoid_(), out=out)


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
