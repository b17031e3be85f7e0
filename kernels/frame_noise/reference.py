"""Noise of frames in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoise_step.reference import noise_of
from ..spec import Case


def frame_noise(frames: Tensor, key: Tensor, out: Tensor, draw: int, stream: int) -> None:
    """See the public function for shapes."""
    out.copy_(noise_of(out, frames, key, draw, stream))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows, count, *size = (case[name] for name in ("rows", "frames", "channels", "height", "width"))
    frames = torch.randint(0, 5000, (rows, 1), generator=generator) + torch.arange(count)
    return {
        "frames": frames.int().to(device),
        "key": torch.randint(-(2**62), 2**62, (rows,), generator=generator).to(device),
        "out": torch.full((rows, count, *size), float("nan"), dtype=dtype, device=device),
        "draw": case.options.get("draw", 0),
        "stream": case.options.get("stream", 0),
    }


def sizes(rows: int, frames: int, channels: int, height: int, width: int) -> dict[str, int]:
    return {"rows": rows, "frames": frames, "channels": channels, "height": height, "width": width}


TEST_CASES = (
    Case("a tail of three", sizes(2, 2, 3, 3, 3), {"draw": 2}),
    Case("two rows, three frames", sizes(2, 3, 5, 4, 6)),
    Case("another stream", sizes(1, 2, 4, 4, 4), {"draw": 1, "stream": 3}),
)
BENCH_CASES = (
    Case("1.3B, three frames", sizes(1, 3, 16, 60, 104)),
    Case("four sessions", sizes(4, 3, 16, 60, 104)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
