"""rms_norm in Triton: one program per row, the whole row in registers, read once and written once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import Case


@dataclass(frozen=True)
class Config:
    """Warps to a row."""

    warps: int


# By the width of a row: about 16 numbers of it to a thread.
CONFIGS = ((1024, Config(2)), (2048, Config(4)), (4096, Config(8)), (1 << 30, Config(16)))


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < dim
    x = tl.load(x_ptr + row * dim + offs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]: x is [rows, dim]
    y = x / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
    y = y * tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * dim + offs, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float, config: Config | None = None) -> None:
    """Launch for tensors that were checked."""
    rows, dim = x.shape
    block = triton.next_power_of_2(dim)
    config = config or next(config for width, config in CONFIGS if block <= width)
    launchable(_rms_norm)[(rows,)](x, weight, out, dim, eps, BLOCK=block, num_warps=config.warps)


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(warps) for warps in (1, 2, 4, 8, 16)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    return {f"bf16 d{dim}": make_inputs(Case("", sizes(4, dim)), torch.bfloat16, "cpu", 0) for dim in (1536, 5120)}
