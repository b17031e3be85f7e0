"""`quantise_rows`: rows as FP8 or INT8 with a scale each, for a linear layer on low bits; GELU on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, LIMITS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="quantise_rows",
    reference=reference.quantise_rows,
    outputs=("out", "scale"),
    like="x",
    args={
        "x": Arg("rows dim", ANY_FLOAT),
        "out": Arg("rows dim", tuple(LIMITS)),
        "scale": Arg("rows", (torch.float32,)),
    },
    scaled={"out": "scale"},
    family="elementwise",
    label="quantise",
    flops="3 * rows * dim",
    implementations=(Implementation("triton", ".quantise_rows.gpu:quantise_rows", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def quantise_rows(
    x: Tensor, dtype: torch.dtype, *, gelu: bool = False, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out = y / scale of each row, where y is x, or with `gelu` gelu(x) (tanh); its largest entry is the dtype's limit.

    x: [M, K]. dtype: FP8 (e4m3) or INT8. out: [M, K] in it. scale: float32 [M]. Computed in float32. Returns
    (out, scale), operands of `linear_lowp`.

    Raises UsageError naming the argument that does not fit. Source: FP8 formats (arXiv 2209.05433); per-token scales
    as in SmoothQuant (arXiv 2211.10438).
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device) if scale is None else scale
    OP(x, out, scale, gelu)
    return out, scale


__all__ = ["SPEC", "quantise_rows"]
