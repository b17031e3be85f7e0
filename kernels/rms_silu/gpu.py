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
def _rms_silu(
    x_ptr, gamma_ptr, bias_ptr, residual_ptr, total_ptr, out_ptr, tail_ptr, pixels, tail, channels, root,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = (pixel < pixels) & (channel < channels)  # [PIXELS, BLOCK]
    place = pixel * channels + channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if TOTAL:
        tl.store(total_ptr + place, x.to(total_ptr.dtype.element_ty), mask=inside)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)  # [PIXELS]
    y = x / norm[:, None] * root * tl.load(gamma_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
    if TAIL:
        last = pixel - pixels + tail
        tl.store(tail_ptr + last * channels + channel, y.to(out_ptr.dtype.element_ty), mask=inside & (last >= 0))


def rms_silu(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    tail: Tensor | None,
    config: Config = CONFIG,
) -> None:
    """Launch for tensors that were checked; x is passed for tensors that are not given; the kernel does not use it."""
    pixels, channels = x.shape
    block = triton.next_power_of_2(channels)
    tile = max(1, config.entries // block)
    given = [x if tensor is None else tensor for tensor in (bias, residual, total)]
    last = 0 if tail is None else len(tail)
    launchable(_rms_silu)[(triton.cdiv(pixels, tile),)](
        x, gamma, *given, out, x if tail is None else tail, pixels, last, channels, channels**0.5,
        PIXELS=tile, BLOCK=block, BIAS=bias is not None, RESIDUAL=residual is not None, TOTAL=total is not None,
        TAIL=tail is not None, num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(entries, warps) for entries in (2048, 4096, 8192) for warps in (4, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import SUM, make_inputs, sizes

    variants: dict[str, tuple[int, dict[str, object]]] = {"": (0, {}), "sum tail ": (32, {"added": SUM})}
    return {
        f"{name}bf16 c{channels}": make_inputs(Case("", sizes(64, channels, tail), options), torch.bfloat16, "cpu", 0)
        for name, (tail, options) in variants.items()
        for channels in (96, 384)
    }
