"""join_phases in Triton: a tile of the large frames' pixels to a program, all their channels at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..rms_silu.gpu import CONFIG, Config
from ..spec import Case


@triton.jit
def _join_phases(
    x_ptr, bias_ptr, out_ptr, pixels, height, width, channels,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]  # of all large frames
    channel = tl.arange(0, BLOCK)[None]
    inside = (pixel < pixels) & (channel < channels)  # [PIXELS, BLOCK]
    frame, row, column = pixel // (height * width), pixel // width % height, pixel % width
    down, right = row % 2, column % 2
    place = (frame * (height // 2 + 1) + row // 2 + down) * (width // 2 + 1) + column // 2 + right
    x = tl.load(x_ptr + (place * 4 + (down * 2 + right)) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(out_ptr + pixel * channels + channel, x.to(out_ptr.dtype.element_ty), mask=inside)


def join_phases(x: Tensor, bias: Tensor | None, out: Tensor, config: Config = CONFIG) -> None:
    """Launch for tensors that were checked; x is passed for a bias that is not given; the kernel does not read it."""
    frames, height, width, channels = out.shape
    pixels = frames * height * width
    block = triton.next_power_of_2(channels)
    tile = max(1, config.entries // block)
    launchable(_join_phases)[(triton.cdiv(pixels, tile),)](
        x, x if bias is None else bias, out, pixels, height, width, channels,
        PIXELS=tile, BLOCK=block, BIAS=bias is not None, num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(entries, warps) for entries in (2048, 4096, 8192) for warps in (4, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    return {
        f"bias bf16 c{channels}": make_inputs(
            Case("", sizes(2, 4, 8, channels), {"bias": True}), torch.bfloat16, "cpu", 0
        )
        for channels in (96, 192)
    }
