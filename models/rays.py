"""Rays of a camera as channels of latent frames.

Each pixel has six entries: where the camera has moved to, and the direction of its ray, both in the axes of the frame
before. Pixels of a latent place are folded into channels. Source: LingBot-World (github.com/robbyant/lingbot-world).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_rays(intrinsics: tuple[float, float, float, float], size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Unit directions [h, w, 3] through the centres of the pixels of a picture of `size` (height, width)."""
    (fx, fy, cx, cy), (height, width) = intrinsics, size
    y = (torch.arange(height, dtype=dtype) + 0.5 - cy) / fy
    x = (torch.arange(width, dtype=dtype) + 0.5 - cx) / fx
    rays = torch.stack((*torch.broadcast_tensors(x, y[:, None]), torch.ones(height, width, dtype=dtype)), dim=-1)
    return rays / rays.norm(dim=-1, keepdim=True)


def folded(x: Tensor, stride: int) -> Tensor:
    """Channels [F, c*s*s, h/s, w/s] of pixels [F, c, h, w]: index s*s*c + s*dy + dx."""
    x = x.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # [F, c, H, dy, W, dx]
    return x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def ray_channels(
    motions: Tensor, intrinsics: tuple[float, float, float, float], size: tuple[int, int], stride: int
) -> Tensor:
    """Rays [F, 6*s*s, h/s, w/s] of motions [F, 4, 4] into each latent frame; s is `stride`, size is (height, width).

    intrinsics: (fx, fy, cx, cy) in pixels of the picture.
    """
    height, width = size
    rays = pixel_rays(intrinsics, size, motions.dtype)
    directions = torch.einsum("fij,hwj->fihw", motions[:, :3, :3], rays)
    origins = motions[:, :3, 3, None, None].expand(-1, -1, height, width)
    return folded(torch.cat((origins, directions), dim=1), stride)
