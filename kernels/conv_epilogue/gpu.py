"""conv_epilogue in Triton: a tile of pixels and a part of their channels to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..rms_silu.gpu import CONFIG, Config
from ..spec import Case


@triton.jit
def _conv_epilogue(
    x_ptr, bias_ptr, residual_ptr, out_ptr, pixels, area, channels,
    PARTS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]  # of all frames
    channel = tl.arange(0, BLOCK)[None]
    inside = (pixel < pixels) & (channel < channels)  # [PIXELS, BLOCK]
    place = (pixel * PARTS + part) * channels + channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + part * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0.0, 0.0, x)
    out_pixel = (pixel // area * PARTS + part) * area + pixel % area
    tl.store(out_ptr + out_pixel * channels + channel, x.to(out_ptr.dtype.element_ty), mask=inside)


def conv_epilogue(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    parts: int,
    relu: bool,
    config: Config = CONFIG,
) -> None:
    """Launch for tensors that were checked; x is passed for tensors that are not given; the kernel does not read it."""
    frames, height, width, _ = x.shape
    pixels, area, channels = frames * height * width, height * width, out.shape[-1]
    block = triton.next_power_of_2(channels)
    tile = max(1, config.entries // block)
    launchable(_conv_epilogue)[(triton.cdiv(pixels, tile), parts)](
        x, x if bias is None else bias, x if residual is None else residual, out, pixels, area, channels,
        PARTS=parts, PIXELS=tile, BLOCK=block, BIAS=bias is not None, RESIDUAL=residual is not None, RELU=relu,
        num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(entries, warps) for entries in (2048, 4096, 8192) for warps in (4, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import SUM, make_inputs, sizes

    variants: dict[str, tuple[dict[str, int], dict[str, object]]] = {
        "sum relu bf16 c64": (sizes(2, 4, 8, 64), {"added": SUM, "relu": True}),
        "two frames bf16 c384": (sizes(2, 4, 8, 384, parts=2), {"added": ("bias",)}),
    }
    return {
        name: make_inputs(Case("", dims, options), torch.bfloat16, "cpu", 0)
        for name, (dims, options) in variants.items()
    }
