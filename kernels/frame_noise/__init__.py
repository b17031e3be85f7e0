"""`frame_noise`: a block's noise as a tensor, by Philox from seeds and absolute frames.

The noise is that of `denoise_step`, as a tensor: for the start of a block, and for passes without that kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="frame_noise",
    reference=reference.frame_noise,
    outputs=("out",),
    like="out",
    args={
        "frames": Arg("rows frames", (torch.int32,)),
        "key": Arg("rows", (torch.int64,)),
        "out": Arg("rows frames channels height width", ANY_FLOAT),
    },
    dense=False,  # frames may be some of a wider list
    family="solver",
    label="noise",
    flops="rows * frames * channels * height * width",
    implementations=(Implementation("triton", ".frame_noise.gpu:frame_noise", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    reads_host=("reference",),  # its seeds
    stack=64,  # the float64 cosine's digits of pi, for huge angles
)
OP = Op(SPEC)


def frame_noise(
    frames: Tensor,
    key: Tensor,
    size: tuple[int, int, int],
    *,
    draw: int,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normals [R, F, *size] of each row's seed and absolute frames; equal to `philox.philox_normals`, to 4e-6 on a GPU.

    frames: int32 [R, F]. key: int64 [R], seeds. size: (C, H, W). dtype: what float32 normals are rounded to. Raises
    UsageError for shapes that do not fit. Source: Philox (Salmon et al., SC 2011).
    """
    out = torch.empty(*frames.shape, *size, device=frames.device, dtype=dtype)
    OP(frames, key, out, draw, stream)
    return out


__all__ = ["SPEC", "frame_noise"]
