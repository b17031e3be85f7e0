"""LoRA adapter on a set of weights of a running model, applied and removed in place between two blocks.

Weights are changed in place, so captured graphs that read them stay valid. The original weights of changed layers are
copied to host memory, so that removing the adapter restores them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UsageError, quoted
from ...models.family import AdapterUpdate, merged
from ...models.files import finite
from ...models.registry import family_of
from ...models.transformer import Transformer


class Adapter:
    """Applies LoRAs to a model. Owns copies of the original weights of changed layers, by name."""

    def __init__(self, model: Transformer) -> None:
        self.family = family_of(model.spec)
        self.weights = dict(model.named_parameters())
        self.originals: dict[str, Tensor] = {}

    def apply(self, lora: str | Path, scale: float, partial: bool = False) -> None:
        """Merge a LoRA into the weights, `scale` times, and remove the one applied before; raises as `read`."""
        self.merge(self.read(lora, scale, partial), scale)

    @torch.no_grad()
    def read(self, lora: str | Path, scale: float, partial: bool = False) -> Mapping[str, AdapterUpdate]:
        """Read the updates of a LoRA that is to be merged `scale` times, by name. Weights stay unchanged.

        UsageError for a file that is no LoRA or is for another model (with `partial`, only if no layer fits).
        InferixError for a damaged file.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise UsageError(f"scale is {quoted(scale)}; expected a number, 1 for the adapter as it is")
        if any(weight.is_meta for weight in self.weights.values()):
            raise UsageError(f"lora is {quoted(lora)}, but the weights are in the programs of an exported engine; "
                             "merge it at the export")  # fmt: skip
        updates = self.family.read_adapter(lora, self.weights, partial)
        updates = {name: update.to(self.weights[name].device) for name, update in updates.items()}
        for name in updates:
            weight, original = self.weights[name], self.originals.get(name)
            before = weight if original is None else original.to(weight.device)
            finite(lora, name, merged(name, before, updates, scale))
        return updates

    @torch.no_grad()
    def merge(self, updates: Mapping[str, AdapterUpdate], scale: float) -> None:
        """Merge updates that were read, `scale` times, and remove those merged before."""
        self.remove()
        for name in updates:
            weight = self.weights[name]
            self.originals[name] = weight.to("cpu", copy=True)
            weight.copy_(merged(name, weight, updates, scale))

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the original weights; does nothing without an adapter."""
        for name, tensor in self.originals.items():
            self.weights[name].copy_(tensor)
        self.originals = {}
