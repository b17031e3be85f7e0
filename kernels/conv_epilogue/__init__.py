"""`conv_epilogue`: what follows a convolution of frames, in one pass into the input of the next one."""

from __future__ import annotations

from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

FRAMES = "frames height width wide"
SPEC = KernelSpec(
    name="conv_epilogue",
    reference=reference.conv_epilogue,
    outputs=("out",),
    like="x",
    args={
        "x": Arg(FRAMES, ANY_FLOAT),
        "bias": Arg("wide", ("x",)),
        "residual": Arg(FRAMES, ("x",)),
        "out": Arg("frames*parts height width channels", ("x",)),
    },
    rules=("wide == parts * channels",),
    family="elementwise",
    label="bias, residual, relu",
    flops="3 * frames * height * width * wide",
    implementations=(Implementation("triton", ".conv_epilogue.gpu:conv_epilogue", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def conv_epilogue(
    x: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    parts: int = 1,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Add bias and residual, apply ReLU if `relu`, and spread channels over frames.

    x, residual: [frames, H, W, parts * C]; bias: [parts * C]. out: [frames * parts, H, W, C]: part p of the channels of
    frame f is frame f * parts + p. All in one dtype, sums in float32. Raises UsageError naming the argument that does
    not fit.
    """
    if out is None:
        frames, height, width, wide = x.shape
        out = x.new_empty(frames * parts, height, width, wide // parts)
    OP(x, bias, residual, out, parts, relu)
    return out


__all__ = ["SPEC", "conv_epilogue"]
