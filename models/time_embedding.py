"""Sinusoidal embedding of timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(timesteps: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[cos, sin] of timesteps times 10000^(-i / (dim/2)), [..., dim], computed in `dtype`."""
    index = torch.arange(dim // 2, dtype=dtype, device=timesteps.device)
    angle = timesteps.to(dtype)[..., None] * torch.exp(-math.log(10000.0) * index / (dim // 2))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
