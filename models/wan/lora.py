"""LoRA adapters, merged into the weights as they are loaded: W + scale * B A, summed in float32.

Names are those of PEFT (`lora_A`, `lora_B`) or of trainers that write `lora_down`, `lora_up` and `alpha`; module
names are the original's or diffusers'. Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InferixError, UsageError
from ..files import read_json, read_tensors
from .names import TABLES, from_format

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
PART = re.compile(r"^(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))$")


@dataclass(frozen=True)
class Update:
    """One module's update: down [rank, in], up [out, rank], and the factor of their product."""

    down: Tensor
    up: Tensor
    scale: float

    def to(self, device: torch.device) -> Update:
        """The same update there."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]


def read_lora(path: str | Path) -> dict[str, Update]:
    """Updates by our module names from a file, or from an adapter folder; alpha is the rank where none is told."""
    path = Path(path)
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("*.pt")])
        if len(files) != 1:
            raise UsageError(f"LoRA folder {str(path)!r} holds {len(files)} weight files; name the one to use")
        path = files[0]
    elif not path.is_file():
        raise UsageError(f"no LoRA {str(path)!r}: no such file or folder")
    content = read_tensors(path)
    tensors: Mapping[str, Tensor] = content.get("generator_lora", content)
    told = (read_json(path.parent / "adapter_config.json") or {}).get("lora_alpha")
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = PART.match(name)
        if part is None or not isinstance(tensor, Tensor):
            raise UsageError(f"{path} is no LoRA: it holds {name!r}; expected names that end in .lora_A.weight")
        side = {"A": "down", "B": "up", None: "alpha"}.get(part["side"], part["side"])
        halves.setdefault(our_module(part["module"]), {})[side] = tensor
    updates = {}
    for module, found in halves.items():
        if not {"down", "up"} <= found.keys() or found["down"].shape[0] != found["up"].shape[1]:
            raise InferixError(f"{path}: {module} has no matching pair of LoRA matrices; the file is not complete")
        rank = found["down"].shape[0]
        alpha = float(found["alpha"]) if "alpha" in found else float(told if told is not None else rank)
        updates[module] = Update(found["down"], found["up"], alpha / rank)
    return updates


def our_module(name: str) -> str:
    """A module's name in ours, from whichever table knows it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for form in TABLES:
        ours = from_format(form, name)
        if ours != name:
            return ours
    return name


def check_lora(source: object, updates: Mapping[str, Update], tensors: Mapping[str, Tensor]) -> None:
    """UsageError listing the modules that the model lacks or that have another shape there."""
    wrong = []
    for module, update in updates.items():
        weight = tensors.get(f"{module}.weight")
        if weight is None:
            wrong.append(f"{module}: not in the model")
        elif math.prod(update.shape) != weight.numel():
            wrong.append(f"{module}: {list(update.shape)}, the model has {list(weight.shape)}")
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UsageError(f"LoRA {source} is for another base model: {'; '.join(wrong[:8])}{more}")


def merged(name: str, tensor: Tensor, updates: Mapping[str, Update], factor: float = 1.0) -> Tensor:
    """A weight with its update, in the weight's dtype; other tensors as they are."""
    update = updates.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if update is None:
        return tensor
    change = update.up.float() @ update.down.float() * (update.scale * factor)
    return (tensor.float() + change.view(tensor.shape)).to(tensor.dtype)
