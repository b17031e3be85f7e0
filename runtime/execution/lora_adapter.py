"""A LoRA on the weights of a running model, applied and removed in place between two blocks.

Weights are written where they lie, so graphs that read them stay as they are. What was there before is kept on the
host, of the layers that an adapter changes, so that it comes off without rounding.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...models.files import finite
from ...models.wan.lora import fitting, merged, read_lora


class Adapter:
    """Owns what the weights of changed layers were, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def apply(self, lora: str | Path, scale: float, partial: bool = False) -> None:
        """Weights with a LoRA merged in, `scale` times, in place of the one that is on.

        UsageError for what is none or is for another model (if `partial`, only if nothing of it fits), InferixError for
        a broken file; both leave the weights.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise UsageError(f"scale is {scale!r}; expected a number, 1 for the adapter as it is")
        updates = fitting(read_lora(lora), self.weights, partial)
        updates = {name: update.to(self.weights[name].device) for name, update in updates.items()}
        for name in updates:
            weight = self.weights[name]
            finite(lora, name, merged(name, self.before.get(name, weight).to(weight.device), updates, scale))
        self.remove()
        for name in updates:
            weight = self.weights[name]
            self.before[name] = weight.to("cpu", copy=True)
            weight.copy_(merged(name, weight, updates, scale))

    @torch.no_grad()
    def remove(self) -> None:
        """Weights as they were; nothing to do where none is on."""
        for name, tensor in self.before.items():
            self.weights[name].copy_(tensor)
        self.before = {}
