"""`rms_silu`: the norm and activation before every convolution of a VAE, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    ARCHITECTURES,
    FLOATS,
    Implementation,
    KernelSpec,
    expect,
    expect_dense,
    expect_one_of,
    expect_together,
)
from . import reference

SPEC = KernelSpec(
    name="rms_silu",
    reference=reference.rms_silu,
    outputs=("out",),
    like="x",
    implementations=(Implementation("triton", ".rms_silu.gpu:rms_silu", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


def rms_silu(x: Tensor, gamma: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x / ||x|| * sqrt(C) * gamma) over the channels of each pixel.

    x, out: [pixels, C], channels last; out may be x. gamma: [C]. All in one dtype, sums in float32; a pixel that is
    all 0 stays 0. Raises ValueError naming the dimension that does not fit. Source: the VAE of Wan 2.1
    (arXiv 2503.20314).
    """
    out = torch.empty_like(x) if out is None else out
    op = SPEC.name
    expect(op, "dims of x", x.ndim, 2)
    expect_one_of(op, "dtype of x", x.dtype, tuple(SPEC.tolerance))
    if x.numel() == 0:
        raise ValueError(f"{op}: x is {list(x.shape)}; expected 1 or more of each")
    for name, given, shape in (("gamma", gamma, (x.shape[1],)), ("out", out, tuple(x.shape))):
        expect(op, f"shape of {name}", tuple(given.shape), shape)
        expect(op, f"dtype of {name}", given.dtype, x.dtype)
    expect_together(op, x.device, gamma=gamma, out=out)
    expect_dense(op, x=x, gamma=gamma, out=out)
    torch.ops.inferix.rms_silu(x, gamma, out)
    return out


@torch.library.custom_op("inferix::rms_silu", mutates_args=("out",))
def _op(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    SPEC.choose(x)(x, gamma, out)


@_op.register_fake
def _(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    return None


__all__ = ["SPEC", "rms_silu"]
