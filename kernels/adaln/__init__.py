"""`adaln`: what stands between two matmuls of a block, in one pass over the residual stream."""

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
from .reference import FP8

SPEC = KernelSpec(
    name="adaln",
    reference=reference.adaln,
    outputs=("residual", "normed", "row_scale"),
    like="x",
    implementations=(Implementation("triton", ".adaln.gpu:adaln", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


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
    T. weight, bias: [d]. All in one dtype; sums are in float32. What is not given is left out; shift and scale,
    and weight and bias, come in pairs. With `row_scale`, float32 [R, T], `normed` must be FP8 (e4m3) and holds
    result / row_scale, the largest entry of each token at 448. Returns (residual, normed).

    Raises ValueError naming the dimension that does not fit.
    Source: adaptive layer norm of DiT (arXiv 2212.09748), per frame as in Self-Forcing (arXiv 2506.08009).
    """
    residual = torch.empty_like(x) if residual is None else residual
    normed = torch.empty_like(x) if normed is None else normed
    check(x, update, gate, shift, scale, weight, bias, residual, normed, row_scale)
    torch.ops.inferix.adaln(x, update, gate, shift, scale, weight, bias, residual, normed, row_scale, eps)
    return residual, normed


@torch.library.custom_op("inferix::adaln", mutates_args=("residual", "normed", "row_scale"))
def _op(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    normed: Tensor,
    row_scale: Tensor | None,
    eps: float,
) -> None:
    SPEC.choose(x)(x, update, gate, shift, scale, weight, bias, residual, normed, row_scale, eps)


@_op.register_fake
def _(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    normed: Tensor,
    row_scale: Tensor | None,
    eps: float,
) -> None:
    return None


def check(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    normed: Tensor,
    row_scale: Tensor | None,
) -> None:
    """ValueError unless the tensors fit each other."""
    op = SPEC.name
    expect(op, "dims of x", x.ndim, 3)
    rows, tokens, dim = x.shape
    expect_one_of(op, "dtype of x", x.dtype, tuple(SPEC.tolerance))
    if x.numel() == 0:
        raise ValueError(f"{op}: x is {list(x.shape)}; expected 1 or more of each")
    expect(op, "shift and scale are both given", shift is None, scale is None)
    expect(op, "weight and bias are both given", weight is None, bias is None)
    if gate is not None and update is None:
        raise ValueError(f"{op}: gate is given without an update to scale; give both, or none")
    for name, tensor in {"gate": gate, "shift": shift, "scale": scale}.items():
        if tensor is not None:
            expect(op, f"dims of {name}", tensor.ndim, 3)
            frames = tensor.shape[1]
            expect(op, f"shape of {name}", tuple(tensor.shape), (rows, frames, dim))
            if frames == 0 or tokens % frames:
                raise ValueError(f"{op}: {tokens} tokens of x are no multiple of {frames} frames of {name}")
    for name, tensor in {"update": update, "residual": residual, "normed": normed}.items():
        if tensor is not None:
            expect(op, f"shape of {name}", tuple(tensor.shape), (rows, tokens, dim))
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None:
            expect(op, f"shape of {name}", tuple(tensor.shape), (dim,))
    if row_scale is not None:
        expect(op, "shape of row_scale", tuple(row_scale.shape), (rows, tokens))
        expect(op, "dtype of row_scale", row_scale.dtype, torch.float32)
    same = {"update": update, "gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
    for name, tensor in (same | {"residual": residual}).items():
        if tensor is not None:
            expect(op, f"dtype of {name}", tensor.dtype, x.dtype)
    expect(op, "dtype of normed", normed.dtype, x.dtype if row_scale is None else FP8)
    everything = same | {"residual": residual, "normed": normed, "row_scale": row_scale}
    expect_together(op, x.device, **everything)
    expect_dense(op, x=x, **everything)


__all__ = ["SPEC", "adaln"]
