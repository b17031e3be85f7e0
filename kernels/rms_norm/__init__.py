"""`rms_norm`: RMS norm of rows with a weight, where no rotation follows that could take it in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="rms_norm",
    reference=reference.rms_norm,
    outputs=("out",),
    like="x",
    args={"x": Arg("rows dim", ANY_FLOAT), "weight": Arg("dim", ("x",)), "out": Arg("rows dim", ("x",))},
    family="norm and gate",
    label="rms norm",
    flops="4 * rows * dim",
    implementations=(
        Implementation("triton", ".rms_norm.gpu:rms_norm", ARCHITECTURES, FLOATS),
        Implementation("cpu", ".rms_norm.cpu:rms_norm", cpu=True),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x, out: [rows, dim]; out may be x. weight: [dim]. All in one dtype, sums in float32. Raises UsageError naming the
    argument that does not fit. Source: RMSNorm (arXiv 1910.07467).
    """
    out = torch.empty_like(x) if out is None else out
    OP(x, weight, out, eps)
    return out


__all__ = ["SPEC", "rms_norm"]
