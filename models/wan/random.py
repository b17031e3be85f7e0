"""Random weights of a named model's parts; see `models.random`."""


from __future__ import annotations

import torch
from torch import Tensor

from ..random import random_state
from ..spec import ModelSpec
from ..text.spec import UMT5_XXL
from .taehv import TinyDecoder
from .transformer import WanTransformer
from .vae import CausalVae
from .vae_spec import TAEW21, TAEW22, TINY_VAE, TINY_VAE22, WAN21_VAE, WAN22_VAE, VaeSpec


def random_transformer_state(spec: ModelSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.device("meta"):
        module = WanTransformer(spec)
    return random_state(module, seed, dtype)


def random_vae_state(spec: VaeSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.device("meta"):
        module = CausalVae(spec)
    return random_state(module, seed, dtype)


def vae_for(spec: ModelSpec) -> VaeSpec:
    """Return the VAE sizes of a model: small for the small models, which have a small text encoder too."""
    small = spec.text_dim != UMT5_XXL.dim
    if spec.vae_stride[1] == WAN22_VAE.spatial_stride:
        return TINY_VAE22 if small else WAN22_VAE
    return TINY_VAE if small else WAN21_VAE


def random_tiny_decoder_state(spec: ModelSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw random weights of the TAEHV decoder for a model's latents."""
    with torch.device("meta"):
        module = TinyDecoder(TAEW22 if spec.vae_stride[1] == TAEW22.spatial_stride else TAEW21)
    return random_state(module, seed, dtype)
