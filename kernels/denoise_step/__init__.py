"""`denoise_step`: from what the network said to the latents of the next noise level, noise drawn on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    ARCHITECTURES,
    FLOATS,
    Implementation,
    KernelSpec,
    expect,
    expect_dense,
    expect_one_of,
    expect_together,
)
from . import reference
from .reference import renoise_coefficients

SPEC = KernelSpec(
    name="denoise_step",
    reference=reference.denoise_step,
    outputs=("out", "x0", "corrected"),
    like="x",
    implementations=(Implementation("triton", ".denoise_step.gpu:denoise_step", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
    reads_host=("reference",),
)


def denoise_step(
    tokens: Tensor,
    x: Tensor,
    frames: Tensor,
    key: Tensor,
    coefficients: Tensor,
    *,
    patch: tuple[int, int],
    draw: int,
    stream: int = 0,
    history: Tensor | None = None,
    out: Tensor | None = None,
    x0: Tensor | None = None,
    corrected: Tensor | None = None,
) -> Tensor:
    """x0 = x - c[0, 0] * velocity; out = c[1] . (x, x0, noise, *history); corrected = c[2] . (the same).

    tokens: [R, F * H/ph * W/pw, ph * pw * C], the head's output, channels fastest. x, out, x0, corrected:
    [R, F, C, H, W], all in one dtype. frames: int32 [R, F], absolute. key: int64 [R], seeds. coefficients:
    float32 [2 or 3, 3 + K] (`renoise_coefficients`; a multistep solver's weights), a third row with `corrected`.
    history: [K, R, F, C, H, W], what a multistep solver remembers. out may be x. The noise is that of
    `philox.frame_noise(seed, frame, draw, stream)`: words are equal bit for bit, normals to 4e-6.

    Raises ValueError naming the dimension that does not fit.
    Source: Self-Forcing (arXiv 2506.08009); UniPC (arXiv 2302.04867); Philox (Salmon et al., SC 2011).
    """
    out = torch.empty_like(x) if out is None else out
    args = (tokens, x, frames, key, coefficients, history, out, x0, corrected, *patch)
    check(*args)
    torch.ops.inferix.denoise_step(*args, draw, stream)
    return out


@torch.library.custom_op("inferix::denoise_step", mutates_args=("out", "x0", "corrected"))
def _op(
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
) -> None:
    args = (tokens, x, frames, key, coefficients, history, out, x0, corrected, patch_height, patch_width)
    SPEC.choose(x)(*args, draw, stream)


@_op.register_fake
def _(
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
) -> None:
    return None


def check(
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
) -> None:
    """ValueError unless the tensors fit each other."""
    op = SPEC.name
    expect(op, "dims of x", x.ndim, 5)
    expect_one_of(op, "dtype of x", x.dtype, tuple(SPEC.tolerance))
    rows, count, channels, height, width = x.shape
    if x.numel() == 0:
        raise ValueError(f"{op}: x is {list(x.shape)}; expected 1 or more of each")
    for name, size, patch in (("height", height, patch_height), ("width", width, patch_width)):
        if patch < 1 or size % patch:
            raise ValueError(f"{op}: {name} {size} of x is no multiple of the patch's {patch}")
    per_frame = height * width // (patch_height * patch_width)
    kept = 0 if history is None else len(history)
    shapes = {
        "tokens": (tokens, (rows, count * per_frame, patch_height * patch_width * channels), x.dtype),
        "frames": (frames, (rows, count), torch.int32),
        "key": (key, (rows,), torch.int64),
        "coefficients": (coefficients, (2 if corrected is None else 3, 3 + kept), coefficients.dtype),
        "history": (history, (kept, *x.shape), x.dtype),
        "out": (out, tuple(x.shape), x.dtype),
        "x0": (x0, tuple(x.shape), x.dtype),
        "corrected": (corrected, tuple(x.shape), x.dtype),
    }
    for name, (given, shape, dtype) in shapes.items():
        if given is not None:
            expect(op, f"shape of {name}", tuple(given.shape), shape)
            expect(op, f"dtype of {name}", given.dtype, dtype)
    expect_one_of(op, "dtype of coefficients", coefficients.dtype, (torch.float32, torch.float64))
    everything = {name: given for name, (given, _, _) in shapes.items()}
    expect_together(op, x.device, **everything)
    expect_dense(op, x=x, **everything)


__all__ = ["SPEC", "denoise_step", "renoise_coefficients"]
