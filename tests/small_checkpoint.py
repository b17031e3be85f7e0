"""A transformer of 0.2 million weights in published layouts, as dicts of tensors, and files of it."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from inferix.models.registry import MODELS
from inferix.models.wan.names import to_format
from inferix.models.wan.random import random_transformer_state

SPEC = dataclasses.replace(
    MODELS["wan-tiny"], name="custom", dim=128, ffn_dim=32, num_heads=1, kv_heads=1, text_dim=8, default_size=(832, 480)
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
Q, UP = "blocks.0.self_attn.q", "blocks.0.ffn.0"  # a square layer and one that is not, in the original's names
OURS = {Q: Q, UP: "blocks.0.ffn.up"}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors in our names."""
    return random_transformer_state(SPEC, seed, torch.float32)


def published(form: str = "original", seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors in the names of `original` or `diffusers`."""
    return {to_format(form, name): tensor for name, tensor in weights(seed).items()}


def save(tensors: dict, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def save_json(content: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def same(actual: dict, expected: dict) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
