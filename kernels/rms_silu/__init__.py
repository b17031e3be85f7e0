"""`rms_silu`: residual sum, norm and activation between two convolutions of a VAE, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference


def detail(given: frozenset[str]) -> str:
    """The variant of a call: with what is added before the norm."""
    return ", ".join([*sorted(given & {"bias", "residual"}), "norm"])


PIXELS = "pixels channels"
SPEC = KernelSpec(
    name="rms_silu",
    reference=reference.rms_silu,
    outputs=("total", "out", "tail"),
    like="x",
    args={
        "x": Arg(PIXELS, ANY_FLOAT),
        "gamma": Arg("channels", ("x",)),
        "bias": Arg("channels", ("x",)),
        "residual": Arg(PIXELS, ("x",)),
        "total": Arg(PIXELS, ("x",)),
        "out": Arg(PIXELS, ("x",)),
        "tail": Arg("tail_pixels channels", ("x",)),
    },
    rules=("tail_pixels <= pixels",),
    detail=detail,
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


def rms_silu(
    x: Tensor,
    gamma: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    out: Tensor | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """silu(y / ||y|| * sqrt(C) * gamma) over the channels of each pixel, y = x + bias + residual.

    x, residual, total, out: [pixels, C], channels last; out may be x. bias: [C], of the convolution that made x. gamma:
    [C]. total: receives y, rounded to its dtype; the norm reads y before that. tail: receives the last pixels of out.
    All in one dtype, sums in float32; a pixel that is all 0 stays 0. Raises UsageError naming the argument that does
    not fit. Source: the VAE of Wan 2.1 (arXiv 2503.20314).
    """
    out = torch.empty_like(x) if out is None else out
    OP(x, gamma, bias, residual, total, out, tail)
    return out


__all__ = ["SPEC", "rms_silu"]
