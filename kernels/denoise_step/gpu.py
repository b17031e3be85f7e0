"""denoise_step in Triton: one program per stretch of a frame, four elements to each Philox counter.

Box-Muller runs in float64, since the fast float32 logarithm is wrong in the last digits just where normals are
smallest; a block has so few latents that this costs nothing.
"""

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
    """Counters to a program, four elements each, and warps."""

    quads: int
    warps: int


CONFIG = Config(128, 4)


@triton.jit
def _normal_pair(first, second):
    """Two normals, float32, from two words: radius from the first, angle from the second."""
    one = (first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10).to(tl.float64)
    two = (second.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10).to(tl.float64)
    radius = tl.sqrt(-2.0 * tl.log(one))
    angle = two * 6.283185307179586
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit
def _noise(key, quad, frame, draw, stream, COUNT: tl.constexpr):
    """Normals [4 * COUNT] of COUNT counters, in the order of elements."""
    zero = quad * 0
    a, b, c, d = tl.philox(key, quad, zero + frame, zero + draw, zero + stream)
    one, two = _normal_pair(a, b)
    three, four = _normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(one, three), tl.join(two, four)), [4 * COUNT])


@triton.jit(do_not_specialize=["draw", "stream"])  # one kernel for all steps; and a 1 would be no tensor
def _step(
    tokens_ptr, x_ptr, frames_ptr, key_ptr, weights_ptr, history_ptr, out_ptr, x0_ptr, corrected_ptr,
    count, channels, height, width, draw, stream, history_stride,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, QUADS: tl.constexpr, KEPT: tl.constexpr, X0: tl.constexpr,
    CORRECTED: tl.constexpr,
):  # fmt: skip
    frame_index = tl.program_id(1).to(tl.int64)  # of all rows
    row = frame_index // count
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)  # [QUADS], Philox counters
    element = tl.program_id(0) * QUADS * 4 + tl.arange(0, QUADS * 4)  # [QUADS * 4], of [channels, height, width]
    size = channels * height * width
    inside = element < size
    channel, y, x_column = element // (height * width), (element // width) % height, element % width
    token = (y // PATCH_H) * (width // PATCH_W) + x_column // PATCH_W
    within = ((y % PATCH_H) * PATCH_W + x_column % PATCH_W) * channels + channel
    # tokens: [rows * count, tokens of a frame, PATCH_H * PATCH_W * channels]
    offs_token = frame_index * size + token * PATCH_H * PATCH_W * channels + within
    velocity = tl.load(tokens_ptr + offs_token, mask=inside, other=0.0)
    offs = frame_index * size + element
    x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    x0 = x - tl.load(weights_ptr) * velocity.to(tl.float32)
    frame = tl.load(frames_ptr + frame_index).to(tl.uint32)
    noise = _noise(tl.load(key_ptr + row), quad.to(tl.uint32), frame, draw.to(tl.uint32), stream.to(tl.uint32), QUADS)
    weights_ptr += 3 + KEPT  # weights: [2 or 3, 3 + KEPT], of x, x0, noise and history
    result = tl.load(weights_ptr) * x + tl.load(weights_ptr + 1) * x0 + tl.load(weights_ptr + 2) * noise
    corrected = result
    if CORRECTED:
        third = weights_ptr + 3 + KEPT
        corrected = tl.load(third) * x + tl.load(third + 1) * x0 + tl.load(third + 2) * noise
    for kept in tl.static_range(KEPT):
        past = tl.load(history_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        history_ptr += history_stride
        result += tl.load(weights_ptr + 3 + kept) * past
        if CORRECTED:
            corrected += tl.load(weights_ptr + 2 * 3 + KEPT + kept) * past
    tl.store(out_ptr + offs, result.to(out_ptr.dtype.element_ty), mask=inside)
    if X0:
        tl.store(x0_ptr + offs, x0.to(x0_ptr.dtype.element_ty), mask=inside)
    if CORRECTED:
        tl.store(corrected_ptr + offs, corrected.to(corrected_ptr.dtype.element_ty), mask=inside)


def denoise_step(
    tokens: Tensor,
    x: Tensor,
    frames: Tensor,
    key: Tensor,
    coefficients: Tensor,
    history: Tensor | None,
    out: Tensor,
    x0: Tensor | None,
    corrected: Tensor | None,
    patch_height: int,
    patch_width: int,
    draw: int,
    stream: int,
    config: Config = CONFIG,
) -> None:
    """Launch for tensors that were checked; x is passed for tensors that are not given; the kernel does not read it."""
    rows, count, channels, height, width = x.shape
    grid = (triton.cdiv(channels * height * width, 4 * config.quads), rows * count)
    launchable(_step)[grid](
        tokens, x, frames, key, coefficients, x if history is None else history, out, x if x0 is None else x0,
        x if corrected is None else corrected, count, channels, height, width, draw, stream, x.numel(),
        PATCH_H=patch_height, PATCH_W=patch_width, QUADS=config.quads, KEPT=0 if history is None else len(history),
        X0=x0 is not None, CORRECTED=corrected is not None, num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(128, 4), Config(128, 2), Config(256, 4), Config(256, 8), Config(512, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    case = sizes(1, 3, 16, 60, 104)
    variants: dict[str, dict[str, object]] = {"renoise": {}, "multistep": {"history": 3}}
    return {
        f"{name} bf16": make_inputs(Case(name, case, options), torch.bfloat16, "cpu", 0) | {"draw": 1}
        for name, options in variants.items()
    }
