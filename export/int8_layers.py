"""Linear layers of an engine on INT8 operands, as `lowp` int8 has them: weights by channel, activations by token.

The op is a chain of standard operators in ONNX around MatMulInteger; the writer of ONNX translates it. Activations are
unsigned there, 128 above their value: ONNX Runtime's signed product is five times slower than that in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..graphs.rewrites.lowp import PrecisionMap
from ..kernels.linear_lowp.reference import pack
from ..models.transformer import Transformer
from ..runtime.execution.lowp_reference import check_layers, with_packed_layers


@torch.library.custom_op("inferix_export::linear_int8", mutates_args=())
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Product [..., N] of rows x [..., K], rounded to int8 by row, and weight int8 [K, N] times its scale [N]."""
    rows, by = pack(x.flatten(0, -2), torch.int8)
    product = (rows.to(x.dtype) @ weight.to(x.dtype)) * by[:, None] * scale
    return product.reshape(*x.shape[:-1], weight.shape[1])


@linear_int8.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


class Int8Linear(nn.Module):
    """Linear layer that keeps its weight in INT8, as `PackedLinear` makes it at every call."""

    weight: Tensor
    scale: Tensor

    def __init__(self, plain: nn.Linear, kind: torch.dtype) -> None:
        super().__init__()
        assert kind == torch.int8
        weight, scale = pack(plain.weight, kind)
        self.register_buffer("weight", weight.T.contiguous())
        self.register_buffer("scale", scale)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N]."""
        product = linear_int8(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


def with_int8_layers(model: Transformer, precision: PrecisionMap) -> Transformer:
    """Copy a model with the layers of a precision map in INT8; UsageError for a pattern that names none."""
    if precision.kind != "int8":
        raise UsageError(f"lowp is {precision.kind}, which no program has; expected int8")
    check_layers(model, precision)
    return with_packed_layers(model, precision, Int8Linear)
