"""Sinusoidal embedding of timesteps."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoid(timesteps: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[cos, sin] of timesteps times 10000^(-i / (dim/2)), [..., dim], computed in `dtype`.

    Frequencies are rounded from float64, and made of numbers that float32 has, so that they are the same on every
    device and in every runtime.
    """
    index = torch.arange(dim // 2, dtype=torch.float64, device=timesteps.device)
    angle = timesteps.to(dtype)[..., None] * torch.pow(10000.0, -index / (dim // 2)).to(dtype)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
