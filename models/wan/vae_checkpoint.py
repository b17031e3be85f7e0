"""Find and read decoders of latents: a VAE (one file, or diffusers' folder) or the tiny decoder TAEHV.

Names are the original's or diffusers', in any container and under any prefix. Sizes come from the tensors' shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UsageError, quoted
from ..files import fill, read_json, read_tensors
from ..state_dicts import choose_state_dict, find_weight_files
from .taehv import TinyDecoder, tiny_spec_from_shapes
from .vae import CausalVae
from .vae_names import to_original, vae_spec_from_shapes
from .vae_spec import VaeSpec

ORIGINAL_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
VAE_FILES = (  # as published: the original, then single files of other tools
    *ORIGINAL_VAES, "wan_2.1_vae.safetensors", "wan2.2_vae.safetensors", "wan_2.2_vae.safetensors",
    "Wan2_1_VAE_bf16.safetensors", "Wan2_1_VAE_fp32.safetensors", "Wan2_2_VAE_bf16.safetensors",
    "Wan2_2_VAE_fp32.safetensors", "Wan2.1_VAE.safetensors", "Wan2.2_VAE.safetensors",
)  # fmt: skip
DIFFUSERS_VAE = "diffusion_pytorch_model"
VAE_CLASS = "AutoencoderKLWan"
TINY_DECODERS = ("taew2_1.pth", "taew2_2.pth", "taew2_1.safetensors", "taew2_2.safetensors")

Decoder = CausalVae | TinyDecoder


def find_vae(places: Iterable[Path]) -> Path | None:
    """Find the VAE's file in the first of `places` that has one; a place is a file, or a folder in any layout."""
    for place in places:
        folders = (place, place / "vae")
        if file := first_file([place, *(folder / name for folder in folders for name in VAE_FILES)]):
            return file
        for folder in folders:
            config = read_json(folder / "config.json") or {}
            known = folder.name == "vae" or config.get("_class_name") == VAE_CLASS
            source = find_weight_files(folder, DIFFUSERS_VAE) if known else None
            if source and len(source.files) == 1:
                return source.files[0]
    return None


def find_tiny_decoder(places: Iterable[Path]) -> Path | None:
    """Find TAEHV's file in the first of `places` that has one."""
    return first_file(place / name for place in places for name in TINY_DECODERS)


def first_file(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def build_vae(
    spec: VaeSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: Any, source: object
) -> CausalVae:
    with torch.device("meta"):
        module = CausalVae(spec)
    return fill(module, tensors, dtype, device, source)


def vae_file(spec: VaeSpec) -> str:
    """Return the original's file name for a VAE."""
    return ORIGINAL_VAES[spec.shortcuts]


def load_decoder(path: Path, dtype: torch.dtype, device: Any) -> Decoder:
    """Load a Wan VAE or a TAEHV decoder, by the content of the file. Raises CheckpointError if it is neither."""
    kind = "Wan VAE or TAEHV decoder"
    _, tensors = choose_state_dict(path, read_tensors(path), kind, lambda part: is_vae(part) or is_tiny(part))
    return load_tiny_decoder(path, dtype, device) if is_tiny(tensors) else load_vae(path, dtype, device)


def is_vae(tensors: Mapping[str, Tensor]) -> bool:
    """Return True for the names of a Wan VAE, the original's or diffusers'."""
    return "conv2.weight" in tensors or "post_quant_conv.weight" in tensors


def is_tiny(tensors: Mapping[str, Tensor]) -> bool:
    """Return True for the names of TAEHV's decoder."""
    return "decoder.22.weight" in tensors


def load_tiny_decoder(path: Path, dtype: torch.dtype, device: Any) -> TinyDecoder:
    """Load TAEHV's decoder and skip the encoder in its file."""
    _, content = choose_state_dict(path, read_tensors(path), "TAEHV decoder", is_tiny)
    tensors = {name: tensor for name, tensor in content.items() if name.startswith("decoder.")}
    try:
        spec = tiny_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{quoted(path)} is no TAEHV decoder: its sizes are not in it ({error})") from error
    with torch.device("meta"):
        module = TinyDecoder(spec)
    return fill(module, tensors, dtype, device, path)


def load_vae(path: Path, dtype: torch.dtype | None, device: Any) -> CausalVae:
    """Load a VAE from a file with the original's or diffusers' names; dtype None keeps the file's."""
    _, tensors = choose_state_dict(path, read_tensors(path), "Wan VAE", is_vae)
    dtype = dtype or next(iter(tensors.values())).dtype
    try:
        spec = vae_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{quoted(path)} is no Wan VAE: tensors that show its sizes are missing ({error})"
        ) from error
    sizes = (spec.z_dim, spec.base_channels, spec.decoder_channels, spec.num_res_blocks, spec.patch, *spec.multipliers)
    if min(sizes) < 1 or len(spec.temporal_down) != len(spec.multipliers) - 1:
        raise CheckpointError(f"{quoted(path)} is no Wan VAE: {len(spec.multipliers)} levels of sizes {sizes}")
    spec = with_statistics(path, spec)
    if "conv2.weight" in tensors:
        with torch.device("meta"):
            ours = CausalVae(spec).state_dict()
        back = {to_original(name, spec): name for name in ours}
        tensors = {back.get(name, name): tensor for name, tensor in tensors.items()}
    return build_vae(spec, tensors, dtype, device, path)


def with_statistics(path: Path, spec: VaeSpec) -> VaeSpec:
    """Read the mean and deviation of latents from the config beside a VAE, else take the published ones.

    Raises UsageError if the config is another VAE's or has invalid numbers.
    """
    config = read_json(path.parent / "config.json") or {}
    if config.get("_class_name") != VAE_CLASS:
        config = {}
    for key, size in (("z_dim", spec.z_dim), ("base_dim", spec.base_channels), ("num_res_blocks", spec.num_res_blocks)):
        if config.get(key, size) != size:
            raise UsageError(
                f"config.json beside {quoted(path)} is not of this VAE: {key} is {quoted(config[key])}, the tensors "
                "have "
                f"{size}; remove or replace it"
            )
    mean, deviation = config.get("latents_mean", spec.mean), config.get("latents_std", spec.std)
    for key, values in (("latents_mean", mean), ("latents_std", deviation)):
        numbers = isinstance(values, (list, tuple)) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6 for value in values
        )
        if not numbers or len(values) != spec.z_dim or (key == "latents_std" and min(values) <= 0):
            where = f"config.json beside {quoted(path)}" if key in config else quoted(path)
            raise UsageError(f"{where}: {key} is {quoted(values)}; expected {spec.z_dim} numbers")
    return replace(spec, mean=tuple(mean), std=tuple(deviation))
