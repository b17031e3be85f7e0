"""`rms_silu`: the norm and activation before every convolution of a VAE, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="rms_silu",
    reference=reference.rms_silu,
    outputs=("out",),
    like="x",
    args={
        "x": Arg("pixels channels", ANY_FLOAT),
        "gamma": Arg("channels", ("x",)),
        "out": Arg("pixels channels", ("x",)),
    },
    family="norm and gate",
    label="rms norm, silu",
    flops="8 * pixels * channels",
    implementations=(Implementation("triton", ".rms_silu.gpu:rms_silu", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def rms_silu(x: Tensor, gamma: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x / ||x|| * sqrt(C) * gamma) over the channels of each pixel.

    x, out: [pixels, C], channels last; out may be x. gamma: [C]. All in one dtype, sums in float32; a pixel that is
    all 0 stays 0. Raises UsageError naming the argument that does not fit. Source: the VAE of Wan 2.1
    (arXiv 2503.20314).
    """
    out = torch.empty_like(x) if out is None else out
    OP(x, gamma, out)
    return out


__all__ = ["SPEC", "rms_silu"]
