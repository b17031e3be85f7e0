"""`frame_noise`: a block's noise as an op of a traced pass; plain torch on every device.

It gives, as a tensor, the noise that `denoise_step` draws within its kernel, for passes without that kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .denoise_step.reference import noise_of
from .op import Op
from .spec import Arg, OpSpec


def reference(frames: Tensor, key: Tensor, out: Tensor, draw: int, stream: int) -> None:
    """See the public function for shapes."""
    out.copy_(noise_of(out, frames, key, draw, stream))


SPEC = OpSpec(
    name="frame_noise",
    reference=reference,
    outputs=("out",),
    like="out",
    args={"frames": Arg("rows frames"), "key": Arg("rows"), "out": Arg("rows frames channels height width")},
    dense=False,
    family="solver",
    label="noise",
    flops="rows * frames * channels * height * width",
    reads_host=("reference",),  # its seeds
)
OP = Op(SPEC)


def frame_noise(frames: Tensor, key: Tensor, size: tuple[int, int, int], *, draw: int, stream: int = 0) -> Tensor:
    """Normals, float32 [R, F, *size], of each row's seed and absolute frames; equal to `philox.philox_normals`.

    frames: int32 [R, F]. key: int64 [R], seeds. size: (C, H, W). Raises UsageError for shapes that do not fit.
    Source: Philox (Salmon et al., SC 2011).
    """
    out = torch.empty(*frames.shape, *size, device=frames.device, dtype=torch.float32)
    OP(frames, key, out, draw, stream)
    return out
