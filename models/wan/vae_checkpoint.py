"""Finding and reading a VAE: the original file or diffusers' folder, sizes read off the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InferixError
from ..files import fill, read_tensors
from .vae import CausalVae, VaeSpec
from .vae_names import to_original, vae_spec_from_shapes

ORIGINAL_VAE = "Wan2.1_VAE.pth"
DIFFUSERS_VAE = "diffusion_pytorch_model.safetensors"


def find_vae(places: Iterable[Path]) -> Path | None:
    """The VAE's file in the first place that has one: a file, or a folder of either format."""
    for place in places:
        for path in (place, place / ORIGINAL_VAE, place / "vae" / DIFFUSERS_VAE, place / DIFFUSERS_VAE):
            if path.is_file():
                return path
    return None


def build_vae(
    spec: VaeSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: Any, source: object
) -> CausalVae:
    with torch.device("meta"):
        module = CausalVae(spec)
    return fill(module, tensors, dtype, device, source)


def vae_file(spec: VaeSpec) -> str:
    """What the original calls a VAE's file."""
    return ORIGINAL_VAE


def load_vae(path: Path, dtype: torch.dtype | None, device: Any) -> CausalVae:
    """A VAE from the original `.pth` or from diffusers' file; dtype None keeps the file's."""
    tensors = read_tensors(path)
    dtype = dtype or next(iter(tensors.values())).dtype
    names = "original" if "conv2.weight" in tensors else "diffusers"
    try:
        spec = vae_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, names)
    except KeyError as error:
        raise InferixError(f"{path} is no Wan 2.1 VAE: it has no {error}") from error
    if names == "original":
        with torch.device("meta"):
            ours = CausalVae(spec).state_dict()
        back = {to_original(name, spec): name for name in ours}
        tensors = {back.get(name, name): tensor for name, tensor in tensors.items()}
    return build_vae(spec, tensors, dtype, device, path)
