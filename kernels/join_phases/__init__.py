"""`join_phases`: the four phases of a convolution of upsampled frames, put together as pixels."""

from __future__ import annotations

from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="join_phases",
    reference=reference.join_phases,
    outputs=("out",),
    like="x",
    args={
        "x": Arg("frames rows columns wide", ANY_FLOAT),
        "bias": Arg("wide//4", ("x",)),
        "out": Arg("frames 2*rows-2 2*columns-2 wide//4", ("x",)),
    },
    rules=("wide % 4 == 0", "rows > 1", "columns > 1"),
    family="elementwise",
    label="phases to pixels",
    flops="frames * rows * columns * wide",
    implementations=(Implementation("triton", ".join_phases.gpu:join_phases", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def join_phases(x: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Pixels of four phases, plus a bias.

    x: [frames, H + 1, W + 1, 4 * C], a 2x2 convolution with padding 1 by the weights of the phases (0, 0), (0, 1),
    (1, 0) and (1, 1). bias: [C]. out: [frames, 2 * H, 2 * W, C]: pixel (2i + a, 2j + b) is phase (a, b) of x at
    (i + a, j + b). All in one dtype, sums in float32. Raises UsageError naming the argument that does not fit.
    """
    if out is None:
        frames, rows, columns, wide = x.shape
        out = x.new_empty(frames, 2 * rows - 2, 2 * columns - 2, wide // 4)
    OP(x, bias, out)
    return out


__all__ = ["SPEC", "join_phases"]
