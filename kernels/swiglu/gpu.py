"""swiglu in Triton: a stretch of a row to a program."""

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
    """Entries of a stretch, and warps."""

    entries: int
    warps: int


CONFIG = Config(1024, 4)


@triton.jit
def _swiglu(x_ptr, out_ptr, width, ENTRIES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = place < width
    gate = tl.load(x_ptr + row * 2 * width + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + (row * 2 + 1) * width + place, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out_ptr + row * width + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def swiglu(x: Tensor, out: Tensor, config: Config = CONFIG) -> None:
    """Launch for tensors that were checked."""
    rows, width = out.shape
    launchable(_swiglu)[(rows, triton.cdiv(width, config.entries))](
        x, out, width, ENTRIES=config.entries, num_warps=config.warps
    )


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(entries, warps) for entries in (512, 1024, 2048, 4096) for warps in (4, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    return {"bf16": make_inputs(Case("", sizes(4, 16384)), torch.bfloat16, "cpu", 0)}
