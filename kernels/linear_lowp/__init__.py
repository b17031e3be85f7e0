"""`linear_lowp`: a linear layer on FP8 or INT8 operands, with bias and GELU in its last step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FP8, LIMITS, Arg, Implementation, KernelSpec
from . import reference
from .reference import pack

SCALES = (torch.float32, torch.float64)
SPEC = KernelSpec(
    name="linear_lowp",
    reference=reference.linear_lowp,
    outputs=("out",),
    like="x",
    args={
        "x": Arg("rows inner", tuple(LIMITS)),
        "weight": Arg("width inner", ("x",)),
        "x_scale": Arg("rows|1", SCALES),
        "weight_scale": Arg("width|1", SCALES),
        "bias": Arg("width", ("out",)),
        "out": Arg("rows width", ANY_FLOAT),
    },
    family="packed matmul",
    label="linear, low bits",
    flops="2 * rows * inner * width",
    implementations=(
        Implementation("scaled_mm", ".linear_lowp.scaled_mm:linear_lowp", (89, 90, 100, 120), (FP8,)),
        Implementation("triton", ".linear_lowp.gpu:linear_lowp", ARCHITECTURES, tuple(LIMITS)),
        Implementation("scaled_mm_fast", ".linear_lowp.scaled_mm:linear_lowp_fast", (89, 90, 100, 120), (FP8,)),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    tensor_cores=True,
)
OP = Op(SPEC)


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

    Raises UsageError naming the argument that does not fit. Source: FP8 formats (arXiv 2209.05433); per-token and
    per-channel scales as in SmoothQuant (arXiv 2211.10438).
    """
    out = x.new_empty(len(x), len(weight), dtype=dtype) if out is None else out
    OP(x, weight, x_scale, weight_scale, bias, out, gelu)
    return out


__all__ = ["LIMITS", "SPEC", "linear_lowp", "pack"]
