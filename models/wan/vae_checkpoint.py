"""Finding and reading what decodes latents: a VAE (original file or diffusers' folder) or the tiny decoder.

Sizes are read off the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InferixError
from ..files import fill, read_json, read_tensors
from .taehv import TinyDecoder, tiny_spec_from_shapes
from .vae import CausalVae, VaeSpec
from .vae_names import to_original, vae_spec_from_shapes

ORIGINAL_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
DIFFUSERS_VAE = "diffusion_pytorch_model.safetensors"
TINY_DECODERS = ("taew2_1.pth", "taew2_2.pth", "taew2_1.safetensors", "taew2_2.safetensors")

Decoder = CausalVae | TinyDecoder


def find_vae(places: Iterable[Path]) -> Path | None:
    """The VAE's file in the first place that has one: a file, or a folder of either format."""
    for place in places:
        names = [*ORIGINAL_VAES, f"vae/{DIFFUSERS_VAE}"]
        if (read_json(place / "config.json") or {}).get("_class_name") == "AutoencoderKLWan":
            names.append(DIFFUSERS_VAE)
        if found := first_file([place, *(place / name for name in names)]):
            return found
    return None


def find_tiny_decoder(places: Iterable[Path]) -> Path | None:
    """TAEHV's file in the first place that has one."""
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
    """What the original calls a VAE's file."""
    return ORIGINAL_VAES[spec.shortcuts]


def load_decoder(path: Path, dtype: torch.dtype, device: Any) -> Decoder:
    """Whichever decoder a file holds."""
    tensors = read_tensors(path)
    return load_tiny_decoder(path, dtype, device) if "decoder.22.weight" in tensors else load_vae(path, dtype, device)


def load_tiny_decoder(path: Path, dtype: torch.dtype, device: Any) -> TinyDecoder:
    """TAEHV's decoder; the encoder in its file is left out."""
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if name.startswith("decoder.")}
    try:
        spec = tiny_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except KeyError as error:
        raise InferixError(f"{path} is no TAEHV decoder: it has no {error}") from error
    with torch.device("meta"):
        module = TinyDecoder(spec)
    return fill(module, tensors, dtype, device, path)


def load_vae(path: Path, dtype: torch.dtype | None, device: Any) -> CausalVae:
    """A VAE from the original `.pth` or from diffusers' file; dtype None keeps the file's."""
    tensors = read_tensors(path)
    dtype = dtype or next(iter(tensors.values())).dtype
    try:
        spec = vae_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except (KeyError, ZeroDivisionError) as error:
        raise InferixError(f"{path} is no Wan VAE: the tensors that tell its sizes are not in it ({error})") from error
    config = read_json(path.parent / "config.json") or {}
    if config.get("_class_name") == "AutoencoderKLWan" and "latents_mean" in config:
        spec = replace(spec, mean=tuple(config["latents_mean"]), std=tuple(config["latents_std"]))
    if "conv2.weight" in tensors:
        with torch.device("meta"):
            ours = CausalVae(spec).state_dict()
        back = {to_original(name, spec): name for name in ours}
        tensors = {back.get(name, name): tensor for name, tensor in tensors.items()}
    return build_vae(spec, tensors, dtype, device, path)
