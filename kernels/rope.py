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
    t, h, w = axis_angles(positions, height, width, head_dim)
    frames = len(positions)
    angle = torch.cat(
        (
            t[:, None, None].expand(frames, height, width, -1),
            h[None, :, None].expand(frames, height, width, -1),
            w[None, None, :].expand(frames, height, width, -1),
        ),
        dim=-1,
    ).flatten(0, 2)
    return Angles(angle.cos().to(device), angle.sin().to(device))


def axis_angles(positions: Sequence[int], height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of each pair by frame, row and column: float64 [F, a], [height, b], [width, b], a + 2b = head_dim / 2."""
    spatial = 2 * (head_dim // 6)
    axes = (
        (torch.tensor(positions, dtype=torch.float64), head_dim - 2 * spatial),
        (torch.arange(height, dtype=torch.float64), spatial),
        (torch.arange(width, dtype=torch.float64), spatial),
    )
    t, h, w = (torch.outer(where, THETA ** (-torch.arange(0, dim, 2).double() / dim)) for where, dim in axes)
    return t, h, w


def rotate(x: Tensor, angles: Angles, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rotate x [B, T, heads, c] by the angles of its T tokens, computing in `dtype`; returns x's dtype."""
    cos, sin = angles.cos[:, None].to(dtype), angles.sin[:, None].to(dtype)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
