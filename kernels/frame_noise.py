"""`frame_noise`: a block's noise as an op of a traced pass; plain torch on every device.

It is what `denoise_step` draws within its kernel, as a tensor, for passes in which that kernel is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .denoise_step.reference import noise_of
from .spec import expect

NAME = "frame_noise"


def frame_noise(frames: Tensor, key: Tensor, size: tuple[int, int, int], *, draw: int, stream: int = 0) -> Tensor:
    """Normals, float32 [R, F, *size], of each row's seed and absolute frames; those of `philox.frame_noise`.

    frames: int32 [R, F]. key: int64 [R], seeds. size: (C, H, W). Raises ValueError for shapes that do not fit.
    Source: Philox (Salmon et al., SC 2011).
    """
    expect(NAME, "dims of frames", frames.ndim, 2)
    expect(NAME, "shape of key", tuple(key.shape), (len(frames),))
    out = torch.empty(*frames.shape, *size, device=frames.device, dtype=torch.float32)
    torch.ops.inferix.frame_noise(frames, key, out, draw, stream)
    return out


@torch.library.custom_op("inferix::frame_noise", mutates_args=("out",))
def _op(frames: Tensor, key: Tensor, out: Tensor, draw: int, stream: int) -> None:
    out.copy_(noise_of(out, frames, key, draw, stream))


@_op.register_fake
def _(frames: Tensor, key: Tensor, out: Tensor, draw: int, stream: int) -> None:
    return None
