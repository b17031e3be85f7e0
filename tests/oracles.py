"""Independent forms that fast or incremental code is compared with, and random weights that make outputs differ."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from inferix.kernels.attention import attention
from inferix.kernels.rope import Angles, rotate
from inferix.models.wan.spec import MODELS, ModelSpec
from inferix.models.wan.transformer import WanTransformer

TINY = dataclasses.replace(
    MODELS["wan-tiny"], name="test", dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, text_len=12
)


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Fill every parameter with seeded normals around 1 for norm weights and 0 for the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module


def tiny_transformer(spec: ModelSpec = TINY, dtype: torch.dtype = torch.float64, **kwargs: str) -> WanTransformer:
    model = WanTransformer(spec, **kwargs)
    randomise(model)
    return model.to(dtype).eval().requires_grad_(False)


class DenseAttention:
    """All frames in one call under a mask: no cache, no state."""

    def __init__(self, angles: Angles, mask: Tensor | None = None, rope: torch.dtype = torch.float64) -> None:
        self.angles, self.mask, self.rope = angles, mask, rope

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (rotate(part, self.angles, self.rope) for part in (q, k))
        return attention(q, k, v, self.mask)


def frame_mask(contexts: list[tuple[int, ...]], tokens: int) -> Tensor:
    """Bool [F*tokens, F*tokens]: row frame f sees the frames in contexts[f]."""
    frames = len(contexts)
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for row, seen in enumerate(contexts):
        mask[row, list(seen)] = True
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
