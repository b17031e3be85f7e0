"""`denoise_step`: from the network's output to the latents of the next noise level; noise is drawn in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference
from .reference import renoise_coefficients

LATENTS = "rows frames channels height width"
SPEC = KernelSpec(
    name="denoise_step",
    reference=reference.denoise_step,
    outputs=("out", "x0", "corrected"),
    like="x",
    args={
        "x": Arg(LATENTS, ANY_FLOAT),
        "tokens": Arg(
            "rows frames*(height//patch_height)*(width//patch_width) patch_height*patch_width*channels", ("x",)
        ),
        "frames": Arg("rows frames", (torch.int32,)),
        "key": Arg("rows", (torch.int64,)),
        "coefficients": Arg("2+has_corrected 3+kept", (torch.float32, torch.float64)),
        "history": Arg(f"kept {LATENTS}", ("x",)),
        "out": Arg(LATENTS, ("x",)),
        "x0": Arg(LATENTS, ("x",)),
        "corrected": Arg(LATENTS, ("x",)),
    },
    rules=("patch_height > 0 and height % patch_height == 0", "patch_width > 0 and width % patch_width == 0"),
    defaults={"kept": 0},
    family="solver",
    label="denoise step",
    flops="rows * frames * channels * height * width * (8 + 2 * kept)",
    implementations=(Implementation("triton", ".denoise_step.gpu:denoise_step", ARCHITECTURES, FLOATS),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    reads_host=("reference",),
    stack=64,  # the float64 cosine's digits of pi, for huge angles
)
OP = Op(SPEC)


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
    history: [K, R, F, C, H, W], earlier results of a multistep solver. out may be x. The noise is that of
    `philox.philox_normals(seed, frame, draw, stream)`: words are equal bit for bit, normals to 4e-6.

    Raises UsageError naming the argument that does not fit.
    Source: Self-Forcing (arXiv 2506.08009); UniPC (arXiv 2302.04867); Philox (Salmon et al., SC 2011).
    """
    out = torch.empty_like(x) if out is None else out
    OP(tokens, x, frames, key, coefficients, history, out, x0, corrected, *patch, draw, stream)
    return out


__all__ = ["SPEC", "denoise_step", "renoise_coefficients"]
