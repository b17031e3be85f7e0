"""`linear_lowp`: a linear layer on FP8 or INT8 operands, with bias and GELU in its last step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    ARCHITECTURES,
    Implementation,
    KernelSpec,
    expect,
    expect_dense,
    expect_one_of,
    expect_together,
)
from . import reference
from .reference import LIMITS, pack

SPEC = KernelSpec(
    name="linear_lowp",
    reference=reference.linear_lowp,
    outputs=("out",),
    like="x",
    implementations=(
        Implementation("scaled_mm", ".linear_lowp.scaled_mm:linear_lowp", (89, 90, 100, 120), (torch.float8_e4m3fn,)),
        Implementation("triton", ".linear_lowp.gpu:linear_lowp", ARCHITECTURES, tuple(LIMITS)),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


def linear_lowp(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """gelu((x * x_scale) @ (weight * weight_scale)^T + bias), GELU (tanh) only where asked for.

    x: [M, K], as `adaln` leaves it with a row_scale. weight: [N, K], packed once by `pack`. Both FP8 (e4m3) or both
    INT8; K is a multiple of 16 there where torch's own matmul is to serve. x_scale: float32 [M] or [1];
    weight_scale: float32 [N] or [1]. bias: [N] and out: [M, N] in `dtype`. Sums are in float32 (INT8: exact).

    Raises ValueError naming the dimension that does not fit. Source: FP8 formats (arXiv 2209.05433); per-token and
    per-channel scales as in SmoothQuant (arXiv 2211.10438).
    """
    op = SPEC.name
    expect(op, "dims of x", x.ndim, 2)
    expect(op, "dims of weight", weight.ndim, 2)
    if x.numel() == 0 or weight.numel() == 0:
        raise ValueError(f"{op}: x is {list(x.shape)}, weight {list(weight.shape)}; expected 1 or more of each")
    out = x.new_empty(len(x), len(weight), dtype=dtype) if out is None else out
    expect_one_of(op, "dtype of x", x.dtype, tuple(LIMITS))
    expect(op, "dtype of weight", weight.dtype, x.dtype)
    expect(op, "inner size of weight", weight.shape[1], x.shape[1])
    expect_one_of(op, "dtype of out", out.dtype, tuple(SPEC.tolerance))
    expect(op, "shape of out", tuple(out.shape), (len(x), len(weight)))
    for name, scale, size in (("x_scale", x_scale, len(x)), ("weight_scale", weight_scale, len(weight))):
        expect_one_of(op, f"shape of {name}", tuple(scale.shape), ((size,), (1,)))
        expect_one_of(op, f"dtype of {name}", scale.dtype, (torch.float32, torch.float64))
    if bias is not None:
        expect(op, "shape of bias", tuple(bias.shape), (len(weight),))
        expect(op, "dtype of bias", bias.dtype, out.dtype)
    expect_together(op, x.device, weight=weight, x_scale=x_scale, weight_scale=weight_scale, bias=bias, out=out)
    expect_dense(op, x=x, weight=weight, x_scale=x_scale, weight_scale=weight_scale, bias=bias, out=out)
    torch.ops.inferix.linear_lowp(x, weight, x_scale, weight_scale, bias, out, gelu)
    return out


@torch.library.custom_op("inferix::linear_lowp", mutates_args=("out",))
def _op(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    SPEC.choose(x)(x, weight, x_scale, weight_scale, bias, out, gelu)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    return None


__all__ = ["LIMITS", "SPEC", "linear_lowp", "pack"]
