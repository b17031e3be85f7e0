"""`linear_gelu`: a linear layer with GELU (tanh) in its last step.

On a GPU it is torch's own matmul with the epilogue of cuBLASLt, whose GELU is the tanh form. Elsewhere torch's op of
that name takes the exact GELU, so the layer and its GELU are called one after the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import expect

NAME = "linear_gelu"


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu(x @ weight^T + bias), GELU in its tanh form; x [M, K], weight [N, K], bias [N], out [M, N], in one dtype.

    Raises ValueError naming the dimension that does not fit. Source: GELU (arXiv 1606.08415).
    """
    expect(NAME, "dims of x", x.ndim, 2)
    expect(NAME, "inner size of weight", weight.shape[-1], x.shape[-1])
    expect(NAME, "shape of bias", tuple(bias.shape), (len(weight),))
    out = x.new_empty(len(x), len(weight)) if out is None else out
    expect(NAME, "shape of out", tuple(out.shape), (len(x), len(weight)))
    torch.ops.inferix.linear_gelu(x, weight, bias, out)
    return out


@torch.library.custom_op("inferix::linear_gelu", mutates_args=("out",))
def _op(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    if x.is_cuda:
        torch.ops.aten._addmm_activation.out(bias, x, weight.t(), use_gelu=True, out=out)
    else:
        torch.ops.aten.gelu.out(F.linear(x, weight, bias), approximate="tanh", out=out)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    return None
