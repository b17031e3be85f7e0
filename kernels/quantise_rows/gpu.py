"""quantise_rows in Triton: one program per row, which it reads once and keeps in registers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import LIMITS, Case, expect_fp8


@dataclass(frozen=True)
class Config:
    """Warps to a row."""

    warps: int


# By the width of a row: up to 32 numbers of it to a thread.
CONFIGS = ((1024, Config(2)), (2048, Config(4)), (4096, Config(8)), (1 << 30, Config(16)))


@triton.jit
def _quantise(
    x_ptr, out_ptr, scale_ptr, dim, LIMIT: tl.constexpr, ROUND: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = offs < dim
    y = tl.load(x_ptr + row * dim + offs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    if GELU:
        y = y - y / (1.0 + tl.exp2(2.302208198 * (y + 0.044715 * y * y * y)))  # tanh in exponentials of base 2
    scale = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / LIMIT
    tl.store(scale_ptr + row, scale)
    y = tl.minimum(tl.maximum(y / scale, -LIMIT), LIMIT)
    if ROUND:
        y = tl.floor(y + 0.5)
    tl.store(out_ptr + row * dim + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


def quantise_rows(x: Tensor, out: Tensor, scale: Tensor, gelu: bool, config: Config | None = None) -> None:
    """Launch for tensors that were checked."""
    if out.dtype != torch.int8:
        expect_fp8("quantise_rows", x.device)
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    config = config or next(config for width, config in CONFIGS if block <= width)
    launchable(_quantise)[(rows,)](
        x, out, scale, dim, LIMIT=LIMITS[out.dtype], ROUND=out.dtype == torch.int8, GELU=gelu, BLOCK=block,
        num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(warps) for warps in (2, 4, 8, 16)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"int8 gelu": {"int8": True, "gelu": True}}
    if capability >= 89:
        variants |= {"fp8": {}, "fp8 gelu": {"gelu": True}}
    return {
        f"{name} bf16 d{dim}": make_inputs(Case(name, sizes(2, dim), options), torch.bfloat16, "cpu", 0)
        for name, options in variants.items()
        for dim in (1536, 8960)
    }
