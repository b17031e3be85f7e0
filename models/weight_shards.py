"""Weights divided over ranks: parts of each large matrix, or consecutive layers.

Of a matrix each rank keeps an equal part, and gathers the whole when a layer runs: the result has the same bits as with
the whole matrix in memory, in every layout of a pass; one matrix at a time is whole (ZeRO stage 3, arXiv 1910.02054).
Of layers each rank keeps some, and passes the tokens on to the rank of the next ones (GPipe, arXiv 1811.06965).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..graphs.shards import Axis, Stage
from ..kernels.collectives import all_gather, hand_over
from .fingerprints import fingerprint_of, sampled


class Gathered(nn.Module):
    """A matrix of a shape from the parts [ceil(numel / ranks)] that ranks have of it."""

    def __init__(self, shape: torch.Size, axis: Axis) -> None:
        super().__init__()
        self.shape, self.axis = shape, axis

    def forward(self, part: Tensor) -> Tensor:
        parts = all_gather(part, ranks=self.axis.size, group=self.axis.group)
        return parts.flatten()[: math.prod(self.shape)].view(self.shape)


class WeightShards(ABC):
    """A rank's part of a model's weights. samples: of every weight, for the fingerprint of the whole."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, Tensor]] = []

    @abstractmethod
    def divide(self, module: nn.Module) -> None:
        """Make a whole model the rank's part, in memory that is not filled."""

    @abstractmethod
    def own(self, name: str, weight: Tensor) -> tuple[str, Tensor] | None:
        """Name and tensor that the rank's part has in place of a weight; None where it has none."""

    def part(self, name: str, weight: Tensor, dtype: torch.dtype) -> tuple[str, Tensor] | None:
        """`own`, and note a sample of the weight; nothing else of it is read."""
        self.samples.append((name, sampled(weight).to(dtype)))
        return self.own(name, weight)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the whole weights, of which `part` was asked for all."""
        return fingerprint_of(self.samples)


class MatrixShards(WeightShards):
    """A rank's parts of the weights of some linear layers, by name. axis: ranks that have the others."""

    def __init__(self, layers: Iterable[str], axis: Axis) -> None:
        super().__init__()
        self.layers, self.axis = tuple(layers), axis
        self.names = {f"{layer}.weight": f"{layer}.parametrizations.weight.original" for layer in self.layers}

    def divide(self, module: nn.Module) -> None:
        for name in self.layers:
            layer = module.get_submodule(name)
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            part = weight.new_empty(part_of(weight.numel(), self.axis.size))
            layer.weight = nn.Parameter(part, requires_grad=False)
            parametrize.register_parametrization(layer, "weight", Gathered(weight.shape, self.axis), unsafe=True)

    def own(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        if name not in self.names:
            return name, weight
        size = part_of(weight.numel(), self.axis.size)
        part = weight.flatten()[self.axis.place * size : (self.axis.place + 1) * size]
        return self.names[name], F.pad(part, (0, size - len(part)))


class LayerShards(WeightShards):
    """A rank's consecutive layers, numbered from 0 there, and all that is no layer.

    layers: name of the list of layers. count: of all.
    """

    def __init__(self, layers: str, count: int, stage: Stage) -> None:
        super().__init__()
        self.list, self.stage, self.kept = layers, stage, stage.layers(count)

    def divide(self, module: nn.Module) -> None:
        layers = module.get_submodule(self.list)
        assert isinstance(layers, nn.ModuleList)
        own = layers[self.kept.start : self.kept.stop]
        for part in own.modules():
            if isinstance(number := getattr(part, "layer", None), int):
                vars(part)["layer"] = number - self.kept.start  # the rank has keys and values of its own layers alone
        parent, _, name = self.list.rpartition(".")
        setattr(module.get_submodule(parent), name, own)
        if self.stage.before:
            own[0].register_forward_pre_hook(self.received)
        if self.stage.after:
            own[-1].register_forward_hook(self.passed_on)

    def received(self, layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tokens of the layers before, in place of those that this rank has embedded; a hook."""
        x, *others = inputs
        return hand_over(x, group=self.stage.before), *others

    def passed_on(self, layer: nn.Module, inputs: tuple[Any, ...], x: Tensor) -> Tensor:
        """Give the tokens to the rank of the next layers; a hook."""
        return hand_over(x, group=self.stage.after)

    def own(self, name: str, weight: Tensor) -> tuple[str, Tensor] | None:
        if not name.startswith(f"{self.list}."):
            return name, weight
        number, _, rest = name.removeprefix(f"{self.list}.").partition(".")
        if int(number) not in self.kept:
            return None
        return f"{self.list}.{int(number) - self.kept.start}.{rest}", weight


def part_of(count: int, ranks: int) -> int:
    """Numbers of a weight of `count` numbers that each rank keeps."""
    return -(-count // ranks)
