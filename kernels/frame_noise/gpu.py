"""frame_noise in Triton: one program per stretch of a frame, four elements to each Philox counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..denoise_step.gpu import _noise
from ..launch import launchable
from ..spec import Case


@dataclass(frozen=True)
class Config:
    """Counters to a program, four elements each, and warps."""

    quads: int
    warps: int


CONFIG = Config(128, 4)


@triton.jit(do_not_specialize=["draw", "stream"])  # one kernel for all steps; and a 1 would be no tensor
def _frame_noise(
    frames_ptr, key_ptr, out_ptr, count, size, frames_stride, draw, stream, QUADS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1).to(tl.int64)  # of all frames of all rows
    row = index // count
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)  # [QUADS], Philox counters
    element = tl.program_id(0) * QUADS * 4 + tl.arange(0, QUADS * 4)  # [QUADS * 4], of a frame
    frame = tl.load(frames_ptr + row * frames_stride + index % count).to(tl.uint32)
    noise = _noise(tl.load(key_ptr + row), quad.to(tl.uint32), frame, draw.to(tl.uint32), stream.to(tl.uint32), QUADS)
    tl.store(out_ptr + index * size + element, noise.to(out_ptr.dtype.element_ty), mask=element < size)


def frame_noise(
    frames: Tensor, key: Tensor, out: Tensor, draw: int, stream: int, config: Config = CONFIG
) -> None:  # fmt: skip
    """Launch for tensors that were checked; rows of `frames` may lie apart, `out` is dense."""
    rows, count, *size = out.shape
    elements = size[0] * size[1] * size[2]
    assert out.is_contiguous() and frames.stride(1) == 1
    launchable(_frame_noise)[(triton.cdiv(elements, 4 * config.quads), rows * count)](
        frames, key, out, count, elements, frames.stride(0), draw, stream, QUADS=config.quads, num_warps=config.warps
    )


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(128, 4), Config(128, 2), Config(256, 4), Config(512, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    case = Case("", sizes(1, 3, 16, 60, 104), {"draw": 1})
    return {
        f"{str(dtype)[6:]}": make_inputs(case, dtype, "cpu", 0) for dtype in (torch.float32, torch.bfloat16)
    }
