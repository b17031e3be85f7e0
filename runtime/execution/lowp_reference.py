"""The model with some of its linear layers in low precision, in plain modules: what such layers mean.

Weights stay where they are and are packed at every call, so the model follows them however they change. It is as
slow as it is plain; the graphs' `lowp` is held against it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...graphs.rewrites.lowp import KINDS, PrecisionMap
from ...kernels.linear_lowp.reference import linear_lowp, pack
from ...models.wan.transformer import WanTransformer


class PackedLinear(nn.Module):
    """A linear layer that multiplies FP8 or INT8 numbers: rows packed by token, the weight by output channel."""

    def __init__(self, plain: nn.Linear, kind: torch.dtype) -> None:
        super().__init__()
        self.plain, self.kind = plain, kind

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        rows, row_scale = pack(x.reshape(-1, x.shape[-1]), self.kind)
        weight, weight_scale = pack(self.plain.weight, self.kind)
        out = x.new_empty(len(rows), len(weight))
        linear_lowp(rows, weight, row_scale, weight_scale, self.plain.bias, out, gelu=False)
        return out.unflatten(0, x.shape[:-1])


def with_packed_layers(model: WanTransformer, precision: PrecisionMap) -> WanTransformer:
    """A model of the same weights whose layers that the map has are packed; the given one stays as it is."""

    def twin(part: nn.Module, name: str) -> nn.Module:
        if isinstance(part, nn.Linear) and precision.has(name):
            return PackedLinear(part, KINDS[precision.kind])
        copied = copy.copy(part)
        parts = part.named_children()
        copied.__dict__["_modules"] = {child: twin(inner, f"{name}.{child}".lstrip(".")) for child, inner in parts}
        return copied

    found = twin(model, "")
    assert isinstance(found, WanTransformer)
    return found


def check_layers(model: nn.Module, precision: PrecisionMap) -> None:
    """UsageError for a pattern of the map that names no layer of the model."""
    precision.check(name for name, part in model.named_modules() if isinstance(part, nn.Linear))
