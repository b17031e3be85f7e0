"""Large matrices divided over ranks: each rank keeps an equal part, and gathers the whole when a layer runs.

A layer's result has the same bits as with the whole matrix in memory, in every layout of a pass; one matrix at a time
is whole. Source: ZeRO stage 3 (arXiv 1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..graphs.shards import Axis
from ..kernels.collectives import all_gather
from .fingerprints import fingerprint_of, sampled


class Gathered(nn.Module):
    """A matrix of a shape from the parts [ceil(numel / ranks)] that ranks have of it."""

    def __init__(self, shape: torch.Size, axis: Axis) -> None:
        super().__init__()
        self.shape, self.axis = shape, axis

    def forward(self, part: Tensor) -> Tensor:
        parts = all_gather(part, ranks=self.axis.size, group=self.axis.group)
        return parts.flatten()[: math.prod(self.shape)].view(self.shape)


class WeightShards:
    """A rank's parts of the weights of some linear layers, by name. axis: ranks that have the others.

    samples: of every weight that was divided or passed, for the fingerprint of the whole.
    """

    def __init__(self, layers: Iterable[str], axis: Axis) -> None:
        self.layers, self.axis = tuple(layers), axis
        self.names = {f"{layer}.weight": f"{layer}.parametrizations.weight.original" for layer in self.layers}
        self.samples: list[tuple[str, Tensor]] = []

    def divide(self, module: nn.Module) -> None:
        """Make the layers keep their parts, in memory that is not filled."""
        for name in self.layers:
            layer = module.get_submodule(name)
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            part = weight.new_empty(part_of(weight.numel(), self.axis.size))
            layer.weight = nn.Parameter(part, requires_grad=False)
            parametrize.register_parametrization(layer, "weight", Gathered(weight.shape, self.axis), unsafe=True)

    def part(self, name: str, weight: Tensor, dtype: torch.dtype) -> tuple[str, Tensor]:
        """Name and tensor that a divided module has in place of a weight; nothing else of the weight is read."""
        self.samples.append((name, sampled(weight).to(dtype)))
        if name not in self.names:
            return name, weight
        size = part_of(weight.numel(), self.axis.size)
        part = weight.flatten()[self.axis.place * size : (self.axis.place + 1) * size]
        return self.names[name], F.pad(part, (0, size - len(part)))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the whole weights, of which `part` was asked for all."""
        return fingerprint_of(self.samples)


def part_of(count: int, ranks: int) -> int:
    """Numbers of a weight of `count` numbers that each rank keeps."""
    return -(-count // ranks)
