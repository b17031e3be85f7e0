"""adaln in Triton: one program per token, the whole row in registers, read once and written once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import Case, expect_fp8


@dataclass(frozen=True)
class Config:
    """Warps to a token."""

    warps: int


# By the width of a row: about 16 numbers of it to a thread.
CONFIGS = ((1024, Config(2)), (2048, Config(4)), (4096, Config(8)), (1 << 30, Config(16)))


@triton.jit
def _adaln(
    x_ptr, update_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, residual_ptr, normed_ptr, row_scale_ptr,
    tokens, gate_frames, frames, dim, eps,
    BLOCK: tl.constexpr, UPDATE: tl.constexpr, GATE: tl.constexpr, MODULATE: tl.constexpr, AFFINE: tl.constexpr,
    QUANTISE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, offs = token // tokens, tl.arange(0, BLOCK)
    inside = offs < dim
    x = tl.load(x_ptr + token * dim + offs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]: x is [rows * tokens, dim]
    if UPDATE:
        update = tl.load(update_ptr + token * dim + offs, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            frame = row * gate_frames + (token % tokens) // (tokens // gate_frames)  # gate: [rows * gate_frames, dim]
            update *= tl.load(gate_ptr + frame * dim + offs, mask=inside, other=0.0).to(tl.float32)
        x += update
    tl.store(residual_ptr + token * dim + offs, x.to(residual_ptr.dtype.element_ty), mask=inside)
    mean = tl.sum(x, 0) / dim
    centred = tl.where(inside, x - mean, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, 0) / dim + eps)
    if AFFINE:
        y = y * tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        y += tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if MODULATE:
        frame = row * frames + (token % tokens) // (tokens // frames)
        y = y * (1.0 + tl.load(scale_ptr + frame * dim + offs, mask=inside, other=0.0).to(tl.float32))
        y += tl.load(shift_ptr + frame * dim + offs, mask=inside, other=0.0).to(tl.float32)
    if QUANTISE:
        row_scale = tl.maximum(tl.max(tl.where(inside, tl.abs(y), 0.0), 0), 1e-12) / 448.0
        tl.store(row_scale_ptr + token, row_scale)
        y = y / row_scale
    tl.store(normed_ptr + token * dim + offs, y.to(normed_ptr.dtype.element_ty), mask=inside)


def adaln(
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
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked; x is passed for tensors that are not given; the kernel does not read it."""
    if row_scale is not None:
        expect_fp8("adaln", x.device)
    rows, tokens, dim = x.shape
    given = [x if tensor is None else tensor for tensor in (update, gate, shift, scale, weight, bias)]
    block = triton.next_power_of_2(dim)
    config = config or next(config for width, config in CONFIGS if block <= width)
    launchable(_adaln)[(rows * tokens,)](
        x, *given, residual, normed, x if row_scale is None else row_scale,
        tokens, 1 if gate is None else gate.shape[1], 1 if shift is None else shift.shape[1], dim, eps,
        BLOCK=block, UPDATE=update is not None, GATE=gate is not None, MODULATE=shift is not None,
        AFFINE=weight is not None, QUANTISE=row_scale is not None,
        num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(warps) for warps in (1, 2, 4, 8, 16)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"modulated": {}, "affine": {"kind": "affine"}, "first": {"kind": "first"}}
    if capability >= 89:
        variants["fp8"] = {"fp8": True}
    return {
        f"{name} bf16 d{dim}": make_inputs(Case(name, sizes(1, 2, 4, dim), options), torch.bfloat16, "cpu", 0)
        for name, options in variants.items()
        for dim in (1536, 5120)
    }
