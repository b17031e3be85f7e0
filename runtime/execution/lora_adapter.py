"""A LoRA on the weights of a running model, applied and removed in place between two blocks.

Weights are written where they lie, so graphs that read them stay as they are. What was there before is kept on the
host, of the layers that an adapter changes, so that it comes off without rounding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...models.wan.lora import check_lora, merged, read_lora


class Adapter:
    """Owns what the weights of changed layers were, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def apply(self, lora: str | Path, scale: float) -> None:
        """Weights with a LoRA merged in, `scale` times, in place of the one that is on.

        UsageError for what is none or is for another model, InferixError for a broken file; both leave the weights.
        """
        if not abs(scale) < float("inf"):
            raise UsageError(f"scale is {scale}; expected a number, 1 for the adapter as it is")
        updates = read_lora(lora)
        check_lora(lora, updates, self.weights)
        self.remove()
        for module, update in updates.items():
            name = f"{module}.weight"
            weight = self.weights[name]
            self.before[name] = weight.to("cpu", copy=True)
            weight.copy_(merged(name, weight, {module: update.to(weight.device)}, scale))

    @torch.no_grad()
    def remove(self) -> None:
        """Weights as they were; nothing to do where none is on."""
        for name, tensor in self.before.items():
            self.weights[name].copy_(tensor)
        self.before = {}
