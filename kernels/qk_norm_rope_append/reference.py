"""Norm and rotation of queries and keys and the write into pages, in plain torch: definition and cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import FP8, GRID_480P, LIMITS, Case


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    rope_sink: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    eps: float,
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads, kv_heads, dim = q.shape[2], kv.shape[3], q.shape[3]
    parts = qkv.to(wide).split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    queries, keys = (
        (part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps) * weight.to(wide)).unflatten(-1, (-1, dim))
        for part, weight in zip(parts[:2], (q_weight, k_weight), strict=True)
    )
    cos_sin = token_cos_sin(rope_time, rope_rows, rope_columns).to(wide)
    q.copy_(rotated(queries, cos_sin).to(q.dtype))
    if q_sink is not None and rope_sink is not None:
        q_sink.copy_(rotated(queries, token_cos_sin(rope_sink, rope_rows, rope_columns).to(wide)).to(q.dtype))
    write_pages(rotated(keys, cos_sin), parts[2].unflatten(-1, (-1, dim)), kv, pages, kv_scale)


def write_pages(keys: Tensor, values: Tensor, kv: Tensor, pages: Tensor, kv_scale: Tensor | None) -> None:
    """Keys and values [R, F*P, n, D] into the pages [R, F] of their frames, in the pages' dtype."""
    listed = pages.flatten().long()
    for index, part in enumerate((keys, values)):
        by_page = part.reshape(len(listed), *kv.shape[2:])
        if kv_scale is not None:
            scale = kv_scale[index, listed].to(part.dtype)[:, None, :, None]
            by_page = (by_page / scale).clamp(-LIMITS[FP8], LIMITS[FP8])
        store, new = kv[index], by_page.to(kv.dtype)
        if kv.dtype == FP8:  # torch cannot index FP8
            store, new = store.view(torch.uint8), new.view(torch.uint8)
        store.index_copy_(0, listed, new)


def token_cos_sin(time: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Cosines and sines [R, F*H*W, D/2, 2] of all tokens from each axis: [R, F, a, 2], [H, b, 2], [W, c, 2]."""
    rows, frames = time.shape[:2]
    grid = (rows, frames, len(row), len(column), -1, 2)
    return torch.cat(
        (
            time[:, :, None, None].expand(grid),
            row[None, None, :, None].expand(grid),
            column[None, None, None].expand(grid),
        ),
        dim=-2,
    ).flatten(1, 3)


def rotated(x: Tensor, cos_sin: Tensor, half_split: bool = False) -> Tensor:
    """x [R, T, n, D] with its first 2 * P channels rotated by cosines and sines [R, T, P, 2].

    half_split: channels (j, j + P) are a pair, not (2j, 2j + 1).
    """
    cos, sin = cos_sin[:, :, None].unbind(-1)
    if (width := 2 * cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotated(x[..., :width], cos_sin, half_split), x[..., width:]), dim=-1)
    if half_split:
        one, other = x.chunk(2, dim=-1)
        return torch.cat((one * cos - other * sin, one * sin + other * cos), dim=-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rope_cos_sin(angles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines and sines [..., 2] of angles, computed in float64."""
    return torch.stack((angles.double().cos(), angles.double().sin()), dim=-1).to(dtype)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ("rows", "frames", "height", "width", "heads", "kv_heads", "dim")
    rows, frames, height, width, heads, kv_heads, dim = (case[name] for name in names)
    spatial = 2 * (dim // 6)
    count, tokens = rows * frames + 2, frames * height * width

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fp8, sinks = bool(case.options.get("fp8")), bool(case.options.get("sinks"))
    frequencies = [10000.0 ** (-torch.arange(0, size, 2) / size) for size in (dim - 2 * spatial, spatial)]
    kv = draw(2, count, height * width, kv_heads, dim)
    q = torch.full((rows, tokens, heads, dim), float("nan"), dtype=dtype, device=device)
    first = torch.randint(0, 400, (rows, 1), generator=generator)
    time = (first + torch.arange(frames))[..., None] * frequencies[0]
    return {
        "qkv": draw(rows, tokens, (heads + 2 * kv_heads) * dim).to(device, dtype),
        "q_weight": (1 + 0.1 * draw(heads * dim)).to(device, dtype),
        "k_weight": (1 + 0.1 * draw(kv_heads * dim)).to(device, dtype),
        "rope_time": rope_cos_sin(time).to(device),
        "rope_rows": rope_cos_sin(torch.arange(height)[:, None] * frequencies[1]).to(device),
        "rope_columns": rope_cos_sin(torch.arange(width)[:, None] * frequencies[1]).to(device),
        "q": q,
        "kv": (kv * 20).to(FP8).to(device) if fp8 else kv.to(device, dtype),
        "pages": (torch.randperm(count, generator=generator)[: rows * frames].view(rows, frames)).int().to(device),
        "rope_sink": rope_cos_sin(time * 0.5).to(device) if sinks else None,
        "q_sink": q.clone() if sinks else None,
        "kv_scale": (torch.rand(2, count, kv_heads, generator=generator) * 0.02 + 0.01).to(device) if fp8 else None,
        "eps": 1e-6,
    }


def sizes(rows: int, frames: int, height: int, width: int, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    return {
        "rows": rows, "frames": frames, "height": height, "width": width,
        "heads": heads, "kv_heads": kv_heads, "dim": dim,
    }  # fmt: skip


TEST_CASES = (
    Case("one token", sizes(1, 1, 1, 1, 1, 1, 64)),
    Case("odd grid", sizes(2, 2, 2, 3, 3, 3, 64)),
    Case("grouped heads, sink", sizes(2, 1, 2, 3, 4, 2, 64), {"sinks": True}),
    Case("head of 128", sizes(1, 2, 2, 2, 3, 3, 128)),
    Case("fp8 pages", sizes(1, 2, 2, 3, 2, 2, 64), {"fp8": True, "sinks": True}),
)
BENCH_CASES = (
    Case("1.3B, three frames", sizes(1, 3, *GRID_480P, 12, 12, 128)),
    Case("1.3B, sink rotated", sizes(1, 3, *GRID_480P, 12, 12, 128), {"sinks": True}),
    Case("1.3B, fp8 pages", sizes(1, 3, *GRID_480P, 12, 12, 128), {"fp8": True}),
    Case("1.3B, 12 frames", sizes(1, 12, *GRID_480P, 12, 12, 128)),
    Case("14B, six frames", sizes(1, 6, *GRID_480P, 40, 40, 128)),
    Case("5B, eight frames", sizes(1, 8, 22, 40, 24, 24, 128)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
