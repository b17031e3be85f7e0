"""Moving pages between stores of any precision, in plain torch: the definition of the op and its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import FRAME_480P, LIMITS, Case, indexable


def kv_pages(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    source_scale: Tensor | None,
    target_scale: Tensor | None,
) -> None:
    """Page by page, in float32 or better; see the public function for shapes."""
    wide = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
    from_pages, to_pages = source_pages.long(), target_pages.long()
    if source.dtype == target.dtype:
        indexable(target)[:, to_pages] = indexable(source)[:, from_pages].clone()
        if source_scale is not None and target_scale is not None:
            target_scale[:, to_pages] = source_scale[:, from_pages].clone()
        return
    pages = indexable(source)[:, from_pages].view(source.dtype).to(wide)
    if source_scale is not None:
        pages = pages * source_scale[:, from_pages].to(wide)[:, :, None, :, None]
    if target_scale is not None:
        limit = LIMITS[target.dtype]
        scale = pages.abs().amax((2, 4)).clamp(min=1e-12) / limit
        target_scale[:, to_pages] = scale.to(target_scale.dtype)
        pages = (pages / scale[:, :, None, :, None]).clamp(-limit, limit)
        if target.dtype == torch.int8:
            pages = torch.floor(pages + 0.5)
    indexable(target)[:, to_pages] = indexable(pages.to(target.dtype))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    count, tokens, heads, dim = (case[name] for name in ("pages", "page_tokens", "heads", "dim"))
    stores, scales = [], []
    for side in ("source", "target"):
        kind = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(case.options.get(side, ""), dtype)
        held = torch.randn(2, count + 2, tokens, heads, dim, generator=generator)
        scaled = kind in LIMITS
        stores.append((held * 40).clamp(-127, 127).to(device).to(kind) if scaled else held.to(device, kind))
        scale = torch.rand(2, count + 2, heads, generator=generator) * 0.1 + 0.01
        scales.append(scale.to(device) if scaled else None)
    pages = [torch.randperm(count + 2, generator=generator)[:count].int().to(device) for _ in stores]
    return {
        "source": stores[0], "source_pages": pages[0], "target": stores[1], "target_pages": pages[1],
        "source_scale": scales[0], "target_scale": scales[1],
    }  # fmt: skip


def sizes(pages: int, page_tokens: int, heads: int, dim: int) -> dict[str, int]:
    return {"pages": pages, "page_tokens": page_tokens, "heads": heads, "dim": dim}


TEST_CASES = (
    Case("gather", sizes(3, 5, 2, 64)),
    Case("to fp8", sizes(2, 37, 3, 64), {"target": "fp8"}),
    Case("to int8", sizes(2, 70, 2, 64), {"target": "int8"}),
    Case("from fp8", sizes(3, 7, 2, 128), {"source": "fp8"}),
    Case("from int8, two stretches", sizes(1, 70, 1, 64), {"source": "int8"}),
    Case("fp8 as it is", sizes(2, 6, 2, 64), {"source": "fp8", "target": "fp8"}),
)
BENCH_CASES = (
    Case("1.3B, 21 frames", sizes(21, FRAME_480P, 12, 128)),
    Case("1.3B, 21 frames to fp8", sizes(21, FRAME_480P, 12, 128), {"target": "fp8"}),
    Case("1.3B, 21 frames to int8", sizes(21, FRAME_480P, 12, 128), {"target": "int8"}),
    Case("1.3B, 21 frames from fp8", sizes(21, FRAME_480P, 12, 128), {"source": "fp8"}),
    Case("1.3B, one frame", sizes(1, FRAME_480P, 12, 128)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
