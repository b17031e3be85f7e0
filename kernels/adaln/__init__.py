"""`adaln`: gated residual, layer norm and modulation between two matmuls, in one pass over the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, FP8, Arg, Implementation, KernelSpec
from . import reference


def detail(given: frozenset[str]) -> str:
    """The variant of a call: with or without residual and gate, modulated or with weights."""
    residual = "" if "update" not in given else "gated residual, " if "gate" in given else "residual, "
    return residual + ("modulated norm" if "shift" in given else "norm")


TOKENS, EACH_FRAME = "rows tokens dim", "rows frames dim"
SPEC = KernelSpec(
    name="adaln",
    reference=reference.adaln,
    outputs=("residual", "normed", "row_scale"),
    like="x",
    args={
        "x": Arg(TOKENS, ANY_FLOAT),
        "update": Arg(TOKENS, ("x",)),
        "gate": Arg("rows gate_frames dim", ("x",)),
        "shift": Arg(EACH_FRAME, ("x",)),
        "scale": Arg(EACH_FRAME, ("x",)),
        "weight": Arg("dim", ("x",)),
        "bias": Arg("dim", ("x",)),
        "residual": Arg(TOKENS, ("x",)),
        "normed": Arg(TOKENS, ("x", FP8)),
        "row_scale": Arg("rows tokens", (torch.float32,)),
    },
    rules=("tokens % frames == 0", "tokens % gate_frames == 0"),
    needs=(("gate", "update"), ("shift", "scale"), ("scale", "shift"), ("weight", "bias"), ("bias", "weight")),
    scaled={"normed": "row_scale"},
    family="norm and gate",
    label="adaln",
    flops="12 * rows * tokens * dim",
    detail=detail,
    implementations=(
        Implementation("triton", ".adaln.gpu:adaln", ARCHITECTURES, FLOATS),
        Implementation("cpu", ".adaln.cpu:adaln", cpu=True),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def adaln(
    x: Tensor,
    *,
    update: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    normed: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual = x + gate * update; normed = LayerNorm(residual) * (1 + scale) + shift, or * weight + bias.

    x, update, residual: [R, T, d]. gate, shift, scale: [R, F, d], one of each per frame of T / F tokens; F divides
    T. weight, bias: [d]. All in one dtype; sums are in float32. Arguments left out skip their step; shift and scale,
    and weight and bias, come in pairs. With `row_scale`, float32 [R, T], `normed` must be FP8 (e4m3) and holds
    result / row_scale, the largest entry of each token at 448. Returns (residual, normed).

    Raises UsageError naming the argument that does not fit.
    Source: adaptive layer norm of DiT (arXiv 2212.09748), per frame as in Self-Forcing (arXiv 2506.08009).
    """
    residual = torch.empty_like(x) if residual is None else residual
    normed = torch.empty_like(x) if normed is None else normed
    OP(x, update, gate, shift, scale, weight, bias, residual, normed, row_scale, eps)
    return residual, normed


__all__ = ["SPEC", "adaln"]
