"""`swiglu`: SiLU of one half of a projection times the other half, in one pass."""

from __future__ import annotations

from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="swiglu",
    reference=reference.swiglu,
    outputs=("out",),
    like="x",
    args={"x": Arg("rows 2*width", ANY_FLOAT), "out": Arg("rows width", ("x",))},
    family="elementwise",
    label="swiglu",
    flops="5 * rows * width",
    implementations=(Implementation("triton", ".swiglu.gpu:swiglu", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def swiglu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x[:, :n]) * x[:, n:], x [M, 2n], out [M, n], in one dtype; the product is in float32.

    Raises UsageError naming the argument that does not fit. Source: GLU variants (arXiv 2002.05202).
    """
    out = x.new_empty(len(x), x.shape[-1] // 2) if out is None else out
    OP(x, out)
    return out


__all__ = ["SPEC", "swiglu"]
