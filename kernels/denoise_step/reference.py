"""One solver step over a block in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..philox import normals, philox4x32
from ..spec import Case

MASK = 0xFFFFFFFF


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
) -> None:
    """In float64 where inputs are, else the sums in float32; see the public function for shapes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    channels, height, width = x.shape[2:]
    velocity = tokens.to(wide).unflatten(-1, (patch_height, patch_width, channels))
    velocity = velocity.unflatten(1, (x.shape[1], height // patch_height, width // patch_width))
    velocity = velocity.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
    weights = coefficients.to(wide)
    clean = x.to(wide) - weights[0, 0] * velocity
    terms = [x.to(wide), clean, noise_of(x, frames, key, draw, stream).to(wide)]
    if history is not None:
        terms += list(history.to(wide))
    for row, result in enumerate((out, corrected), start=1):
        if result is not None:
            parts = (weight * term for weight, term in zip(weights[row], terms, strict=True))
            total = sum(parts, torch.zeros_like(clean))
            result.copy_(total.to(result.dtype))
    if x0 is not None:
        x0.copy_(clean.to(x0.dtype))


def noise_of(x: Tensor, frames: Tensor, key: Tensor, draw: int, stream: int) -> Tensor:
    """Normals [R, F, C, H, W] of each row's key and absolute frames, as `philox.philox_normals` defines them."""
    elements = x[0, 0].numel()
    quads = torch.arange((elements + 3) // 4, device=x.device)
    noise = torch.empty(x.shape, device=x.device)
    for row, seed in enumerate(key.tolist()):
        counters = torch.zeros(x.shape[1], len(quads), 4, dtype=torch.int64, device=x.device)
        counters[..., 0] = quads
        counters[..., 1] = frames[row].long()[:, None]
        counters[..., 2], counters[..., 3] = draw, stream
        words = philox4x32(counters, (seed & MASK, (seed >> 32) & MASK))
        noise[row] = normals(words).flatten(1)[:, :elements].reshape(x.shape[1:])
    return noise


def renoise_coefficients(sigma: float, following: float) -> Tensor:
    """Coefficients of Self-Forcing's step: x0, then noise of the next level added; `following` 0 leaves x0."""
    return torch.tensor([[sigma, 0.0, 0.0], [0.0, 1.0 - following, following]])


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ("rows", "frames", "channels", "height", "width")
    rows, frames, channels, height, width = (case[name] for name in names)
    patch = case.options.get("patch", 2)
    kept = case.options.get("history", 0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (rows, frames, channels, height, width)
    per_frame = height * width // patch**2
    empty = torch.full(shape, float("nan"), dtype=dtype, device=device)
    coefficients = renoise_coefficients(0.75, case.options.get("following", 0.5))
    if kept:
        coefficients = torch.cat((coefficients, torch.tensor([[0.0, 0.3, 0.0]])))
        coefficients = torch.cat((coefficients, 0.4 * draw(3, kept)), dim=1)
    return {
        "tokens": draw(rows, frames * per_frame, patch**2 * channels).to(device, dtype),
        "x": draw(*shape).to(device, dtype),
        "frames": (torch.randint(0, 5000, (rows, 1), generator=generator) + torch.arange(frames)).int().to(device),
        "key": torch.randint(-(2**62), 2**62, (rows,), generator=generator).to(device),
        "coefficients": coefficients.to(device),
        "history": draw(kept, *shape).to(device, dtype) if kept else None,
        "out": empty,
        "x0": empty.clone() if kept else None,
        "corrected": empty.clone() if kept else None,
        "patch_height": patch,
        "patch_width": patch,
        "draw": 2,
        "stream": 0,
    }


def sizes(rows: int, frames: int, channels: int, height: int, width: int) -> dict[str, int]:
    return {"rows": rows, "frames": frames, "channels": channels, "height": height, "width": width}


TEST_CASES = (
    Case("one patch", sizes(1, 1, 4, 2, 2)),
    Case("a tail of three", sizes(2, 2, 3, 3, 3), {"patch": 1}),
    Case("two rows, three frames", sizes(2, 3, 5, 4, 6)),
    Case("last step", sizes(1, 2, 4, 4, 4), {"following": 0.0}),
    Case("multistep", sizes(2, 2, 4, 4, 6), {"history": 3, "following": 0.0}),
)
BENCH_CASES = (
    Case("1.3B, three frames", sizes(1, 3, 16, 60, 104)),
    Case("14B, six frames", sizes(1, 6, 16, 60, 104)),
    Case("5B, eight frames", sizes(1, 8, 48, 44, 80)),
    Case("5B, multistep", sizes(1, 8, 48, 44, 80), {"history": 3, "following": 0.0}),
    Case("four sessions", sizes(4, 3, 16, 60, 104)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
