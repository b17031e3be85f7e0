"""`gated_norm`: gate, layer norm and residual sum after a matmul, and the layer norm before the next, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference


def detail(given: frozenset[str]) -> str:
    """The variant of a call: with or without the norm after the sum."""
    return "gated norm, residual, norm" if "normed" in given else "gated norm, residual"


TOKENS, OR_WIDE = "rows tokens dim", ("x", torch.float32)
SPEC = KernelSpec(
    name="gated_norm",
    reference=reference.gated_norm,
    outputs=("out", "normed"),
    like="x",
    args={
        "x": Arg(TOKENS, ANY_FLOAT),
        "update": Arg(TOKENS, OR_WIDE),
        "gate": Arg("rows frames dim", OR_WIDE),
        "weight": Arg("dim", OR_WIDE),
        "bias": Arg("dim", OR_WIDE),
        "next_weight": Arg("dim", ("x",)),
        "next_bias": Arg("dim", ("x",)),
        "out": Arg(TOKENS, ("x",)),
        "normed": Arg(TOKENS, ("x",)),
    },
    rules=("tokens % frames == 0",),
    needs=(("next_weight", "next_bias"), ("next_bias", "normed"), ("normed", "next_weight")),
    family="norm and gate",
    label="gated norm",
    flops="18 * rows * tokens * dim",
    detail=detail,
    implementations=(Implementation("triton", ".gated_norm.gpu:gated_norm", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def gated_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    eps: float = 1e-6,
    next_eps: float = 1e-6,
    out: Tensor | None = None,
    normed: Tensor | None = None,
) -> Tensor:
    """out = x + LayerNorm(gate * update) * weight + bias; normed = LayerNorm(out) * next_weight + next_bias.

    x, update, out, normed: [R, T, d]. gate: [R, F, d], one per frame of T / F tokens; F divides T. weights and biases:
    [d]. out, normed, next_weight and next_bias are in the dtype of x; update, gate, weight and bias in it or in
    float32; sums are in float32. next_weight, next_bias and normed are given together or not at all. Returns out.

    Raises UsageError naming the argument that does not fit.
    Source: the sandwich norms of MAGI-1 (arXiv 2505.13211).
    """
    out = torch.empty_like(x) if out is None else out
    OP(x, update, gate, weight, bias, next_weight, next_bias, out, normed, eps, next_eps)
    return out


__all__ = ["SPEC", "gated_norm"]
