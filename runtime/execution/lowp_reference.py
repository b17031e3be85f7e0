"""Plain reference of low-precision linear layers, for executor `eager` and the tests of the graphs' rewrite `lowp`.

Weights are quantised at every call, so that the model follows changes of its weights. This is slow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...graphs.rewrites.lowp import KINDS, PrecisionMap
from ...kernels.linear_lowp.reference import linear_lowp, pack
from ...models.transformer import Transformer


class PackedLinear(nn.Module):
    """Linear layer on FP8 or INT8 operands: activations scaled by token, weights by output channel."""

    def __init__(self, plain: nn.Linear, kind: torch.dtype) -> None:
        super().__init__()
        self.plain, self.kind = plain, kind

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N]."""
        rows, row_scale = pack(x.reshape(-1, x.shape[-1]), self.kind)
        weight, weight_scale = pack(self.plain.weight, self.kind)
        out = x.new_empty(len(rows), len(weight))
        linear_lowp(rows, weight, row_scale, weight_scale, self.plain.bias, out, gelu=False)
        return out.unflatten(0, x.shape[:-1])


def with_packed_layers(
    model: Transformer, precision: PrecisionMap, packed: Callable[[nn.Linear, torch.dtype], nn.Module] = PackedLinear
) -> Transformer:
    """Copy a model, sharing its weights, with the layers of the precision map replaced by those that `packed` makes."""

    def converted(part: nn.Module, name: str) -> nn.Module:
        if isinstance(part, nn.Linear) and precision.has(name):
            return packed(part, KINDS[precision.kind])
        copied = copy.copy(part)
        parts = part.named_children()
        copied.__dict__["_modules"] = {child: converted(inner, f"{name}.{child}".lstrip(".")) for child, inner in parts}
        return copied

    made = converted(model, "")
    assert isinstance(made, Transformer)
    return made


def check_layers(model: nn.Module, precision: PrecisionMap) -> None:
    """Raise UsageError for a pattern of the map that matches no layer of the model."""
    precision.check(name for name, part in model.named_modules() if isinstance(part, nn.Linear))
