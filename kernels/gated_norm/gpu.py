"""gated_norm in Triton: one program per token, the whole row in registers, read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..adaln.gpu import Config, candidates
from ..launch import launchable
from ..spec import Case

__all__ = ["CONFIGS", "Config", "candidates", "compile_cases", "gated_norm"]

# By the width of a row. With 8 warps to a row of 4096, registers are spilled on sm_80.
CONFIGS = ((1024, Config(4)), (2048, Config(8)), (1 << 30, Config(16)))


@triton.jit
def _normed(x, weight_ptr, bias_ptr, offs, inside, dim, eps):
    """Layer norm of a row [BLOCK] with weight and bias."""
    mean = tl.sum(x, 0) / dim
    centred = tl.where(inside, x - mean, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, 0) / dim + eps)
    y = y * tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    return y + tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gated_norm(
    x_ptr, update_ptr, gate_ptr, weight_ptr, bias_ptr, next_weight_ptr, next_bias_ptr, out_ptr, normed_ptr,
    tokens, frames, dim, eps, next_eps, BLOCK: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, offs = token // tokens, tl.arange(0, BLOCK)
    inside = offs < dim
    place = token * dim + offs  # [BLOCK]: x is [rows * tokens, dim]
    frame = row * frames + (token % tokens) // (tokens // frames)  # gate: [rows * frames, dim]
    update = tl.load(update_ptr + place, mask=inside, other=0.0).to(tl.float32)
    update *= tl.load(gate_ptr + frame * dim + offs, mask=inside, other=0.0).to(tl.float32)
    total = _normed(update, weight_ptr, bias_ptr, offs, inside, dim, eps)
    total += tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)
    if NEXT:
        y = _normed(total, next_weight_ptr, next_bias_ptr, offs, inside, dim, next_eps)
        tl.store(normed_ptr + place, y.to(normed_ptr.dtype.element_ty), mask=inside)


def gated_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    out: Tensor,
    normed: Tensor | None,
    eps: float,
    next_eps: float,
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked; x is passed for tensors that are not given; the kernel does not use it."""
    rows, tokens, dim = x.shape
    block = triton.next_power_of_2(dim)
    config = config or next(config for width, config in CONFIGS if block <= width)
    given = [x if tensor is None else tensor for tensor in (next_weight, next_bias)]
    launchable(_gated_norm)[(rows * tokens,)](
        x, update, gate, weight, bias, *given, out, x if normed is None else normed,
        tokens, gate.shape[1], dim, eps, next_eps, BLOCK=block, NEXT=normed is not None, num_warps=config.warps,
    )  # fmt: skip


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import NEXT, WIDE, make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"wide": {**WIDE}, "next": {**NEXT}}
    return {
        f"{name} bf16 d{dim}": make_inputs(Case(name, sizes(1, 2, 4, dim), options), torch.bfloat16, "cpu", 0)
        for name, options in variants.items()
        for dim in (3072, 6144)
    }
