"""rms_silu in Triton: a tile of pixels to a program, all their channels at once."""

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
    """Entries of a tile, whatever the number of channels, and warps."""

    entries: int
    warps: int


CONFIG = Config(4096, 4)


@triton.jit
def _rms_silu(x_ptr, gamma_ptr, out_ptr, pixels, channels, root, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = (pixel < pixels) & (channel < channels)  # [PIXELS, BLOCK]
    x = tl.load(x_ptr + pixel * channels + channel, mask=inside, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)  # [PIXELS]
    y = x / norm[:, None] * root * tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + pixel * channels + channel, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_silu(x: Tensor, gamma: Tensor, out: Tensor, config: Config = CONFIG) -> None:
    """Launch for tensors that were checked."""
    pixels, channels = x.shape
    block = triton.next_power_of_2(channels)
    tile = max(1, config.entries // block)
    launchable(_rms_silu)[(triton.cdiv(pixels, tile),)](
        x, gamma, out, pixels, channels, channels**0.5, PIXELS=tile, BLOCK=block, num_warps=config.warps
    )


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(entries, warps) for entries in (2048, 4096, 8192) for warps in (4, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    return {
        f"bf16 c{channels}": make_inputs(Case("", sizes(64, channels)), torch.bfloat16, "cpu", 0)
        for channels in (96, 384)
    }
