"""Read MAGI-1's published autoencoder: a folder with `config.json` and one file of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UsageError, quoted
from ..files import fill, read_json
from ..state_dicts import WeightFiles, choose_state_dict, read_weight_files
from .vae import VitVae
from .vae_spec import VIT_VAE, VitVaeSpec

VAE_FILE = "diffusion_pytorch_model.safetensors"
CONFIG = "ddconfig"
FIXED = {
    "double_z": True, "ln_in_attn": True, "qkv_bias": True, "conv_last_layer": True, "norm_code": False,
    "use_rope": False, "use_final_proj": False,
}  # fmt: skip


def find_vae(folders: Sequence[Path]) -> Path | None:
    """Find the weights in the first of some folders that has them, or that has a folder `vae` with them."""
    files = (folder / name / VAE_FILE for folder in folders for name in ("vae", "") if (folder / name).is_dir())
    return next((file for file in files if file.exists()), None)


def is_vae(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.patch_embed.proj.weight" in tensors and "decoder.proj_in.weight" in tensors


def load_vae(path: Path, dtype: torch.dtype | None, device: Any) -> VitVae:
    """Load an autoencoder. dtype: None as stored.

    Raises UsageError for a file of another, CheckpointError for a broken one.
    """
    _, tensors = choose_state_dict(path, read_weight_files(WeightFiles((path,))), "MAGI-1 autoencoder", is_vae)
    spec = read_spec(path, tensors, (read_json(path.parent / "config.json") or {}).get(CONFIG) or {})
    with torch.device("meta"):
        module = VitVae(spec)
    return fill(module, tensors, dtype or next(iter(tensors.values())).dtype, device, path)


def read_spec(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> VitVaeSpec:
    """Read sizes from shapes, and the heads and the grid of positions from the config, else from their counts."""
    wrong = [f"{key} is {quoted(config[key])}" for key, value in FIXED.items() if config.get(key, value) is not value]
    if wrong:
        raise UsageError(f"{CONFIG} beside {quoted(path)} is of another autoencoder ({'; '.join(wrong)}); use MAGI-1's")
    try:
        dim, _, *patch = tensors["encoder.patch_embed.proj.weight"].shape
        places = tensors["encoder.pos_embed"].shape[1] - 1
        ffn = len(tensors["encoder.blocks.0.mlp.fc1.weight"])
        z = tensors["decoder.proj_in.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{quoted(path)} is no complete MAGI-1 autoencoder: no {error} in it") from error
    layers = len({layer[1] for name in tensors if (layer := re.match(r"encoder\.blocks\.(\d+)\.", name))})
    frames = config.get("video_length", 16) // patch[0]
    side = config.get("video_size", patch[1] * math.isqrt(max(1, places // max(1, frames)))) // patch[1]
    heads = config.get("num_heads", dim // 64)
    if frames * side * side != places or heads < 1 or dim % heads or len(patch) != 3 or dim % math.prod(patch):
        raise CheckpointError(
            f"{quoted(path)} is no MAGI-1 autoencoder: {places} positions for {frames} x {side} x {side}, "
            f"{heads} heads, {dim} wide"
        )
    return replace(
        VIT_VAE, z_dim=z, dim=dim, num_layers=layers, num_heads=heads, ffn_dim=ffn,
        patch=(patch[0], patch[1], patch[2]), grid=(frames, side, side),
    )  # fmt: skip


def vae_config(spec: VitVaeSpec) -> dict[str, Any]:
    """The config that is written beside an autoencoder."""
    sizes = {
        "embed_dim": spec.dim, "depth": spec.num_layers, "num_heads": spec.num_heads,
        "mlp_ratio": spec.ffn_dim / spec.dim, "patch_size": spec.patch[1], "patch_length": spec.patch[0],
        "video_size": spec.grid[1] * spec.patch[1], "video_length": spec.grid[0] * spec.patch[0], "z_chans": spec.z_dim,
    }  # fmt: skip
    return {"_class_name": "ViTVAE", CONFIG: sizes | FIXED}
