"""3-D rotary position embedding from computed angles: any frame position, no table and so no limit.

Pairs are interleaved, (x[2j], x[2j+1]); a head of c channels has c - 4*(c//6) for time and 2*(c//6) each for
height and width (44, 42, 42 at 128). Angles are made on the host in float64.
Source: Wan 2.1 (arXiv 2503.20314); RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of the rotation of each token, float64 [T, c/2]."""

    cos: Tensor
    sin: Tensor


def rope_angles(
    positions: Sequence[int], height: int, width: int, head_dim: int, device: torch.device | str = "cpu"
) -> Angles:
    """Angles of len(positions) * height * width tokens in (frame, row, column) order, column fastest.

    `positions` are the temporal positions of the frames; rows and columns count from 0.
    """
    return token_angles(axis_angles(positions, height, width, head_dim), device)


def token_angles(axes: tuple[Tensor, Tensor, Tensor], device: torch.device | str = "cpu") -> Angles:
    """Angles of all tokens, column fastest, from those by frame [F, a], row [H, b] and column [W, c]."""
    t, h, w = axes
    grid = (len(t), len(h), len(w), -1)
    angle = torch.cat(
        (t[:, None, None].expand(grid), h[None, :, None].expand(grid), w[None, None, :].expand(grid)), dim=-1
    ).flatten(0, 2)
    return Angles(angle.cos().to(device), angle.sin().to(device))


def axis_angles(positions: Sequence[int], height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of each pair by frame, row and column: float64 [F, a], [height, b], [width, b], a + 2b = head_dim / 2."""
    places = (
        torch.tensor(positions, dtype=torch.float64),
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
    )
    t, h, w = map(torch.outer, places, axis_frequencies(head_dim))
    return t, h, w


def axis_frequencies(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angle of each pair at position 1, by time, row and column: float64 [a], [b], [b]."""
    spatial = 2 * (head_dim // 6)
    t, h, w = (
        THETA ** (-torch.arange(0, dim, 2).double() / dim) for dim in (head_dim - 2 * spatial, spatial, spatial)
    )
    return t, h, w


def rotate(x: Tensor, angles: Angles, dtype: torch.dtype = torch.float64, half_split: bool = False) -> Tensor:
    """Rotate x [B, T, heads, c] by the angles [T, P] of its T tokens, computing in `dtype`; returns x's dtype.

    The first 2 * P channels are rotated, in pairs (2j, 2j + 1), or with `half_split` (j, j + P).
    """
    width = 2 * angles.cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], angles, dtype, half_split), x[..., width:]), dim=-1)
    cos, sin = angles.cos[:, None].to(dtype), angles.sin[:, None].to(dtype)
    if half_split:
        one, other = x.to(dtype).chunk(2, dim=-1)
        return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1).to(x.dtype)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
