"""`rms_norm`: RMS norm of rows with a weight, where no rotation follows that could take it in."""

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
    name="rms_norm",
    reference=reference.rms_norm,
    outputs=("out",),
    like="x",
    implementations=(Implementation("triton", ".rms_norm.gpu:rms_norm", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x, out: [rows, dim]; out may be x. weight: [dim]. All in one dtype, sums in float32. Raises ValueError naming the
    dimension that does not fit. Source: RMSNorm (arXiv 1910.07467).
    """
    out = torch.empty_like(x) if out is None else out
    op = SPEC.name
    expect(op, "dims of x", x.ndim, 2)
    expect_one_of(op, "dtype of x", x.dtype, tuple(SPEC.tolerance))
    if x.numel() == 0:
        raise ValueError(f"{op}: x is {list(x.shape)}; expected 1 or more of each")
    for name, given, shape in (("weight", weight, (x.shape[1],)), ("out", out, tuple(x.shape))):
        expect(op, f"shape of {name}", tuple(given.shape), shape)
        expect(op, f"dtype of {name}", given.dtype, x.dtype)
    expect_together(op, x.device, weight=weight, out=out)
    expect_dense(op, x=x, weight=weight, out=out)
    torch.ops.inferix.rms_norm(x, weight, out, eps)
    return out


@torch.library.custom_op("inferix::rms_norm", mutates_args=("out",))
def _op(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    SPEC.choose(x)(x, weight, out, eps)


@_op.register_fake
def _(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    return None


__all__ = ["SPEC", "rms_norm"]
