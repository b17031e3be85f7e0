"""Attention over listed pages in plain torch: the definition of the op and its cases."""

from __future__ import annotations

import math
from itertools import product
from random import Random
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ..spec import FP8, FRAME_480P, Case, indexable


def block_attention(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
    scale: float,
) -> None:
    """Row by row and list by list, in float32 or better; see the public function for shapes."""
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // kv.shape[3]
    lists = page_table.shape[1] if page_table.ndim == 3 else 1
    each = q.shape[2] // lists  # heads of a list
    table, counts = page_table.reshape(len(q), lists, -1), page_count.reshape(len(q), lists)
    sinks = None if sink_count is None else sink_count.reshape(len(q), lists)
    for row, part in product(range(len(q)), range(lists)):
        heads = slice(part * each, (part + 1) * each)
        pages = table[row, part, : int(counts[row, part])].long()
        k, v = indexable(kv)[:, pages].view(kv.dtype).to(wide)
        if kv_scale is not None:
            k, v = (kept * by[:, None, :, None] for kept, by in zip((k, v), kv_scale[:, pages].to(wide), strict=True))
        k, v = (kept.flatten(0, 1).repeat_interleave(groups, dim=1)[:, heads].transpose(0, 1) for kept in (k, v))
        scores = q[row, :, heads].to(wide).transpose(0, 1) @ k.transpose(1, 2) * scale
        if q_sink is not None and sinks is not None:
            early = int(sinks[row, part]) * kv.shape[2]
            scores[..., :early] = q_sink[row, :, heads].to(wide).transpose(0, 1) @ k[:, :early].transpose(1, 2) * scale
        out[row, :, heads] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
        if lse is not None:
            lse[row, heads] = scores.logsumexp(-1).to(lse.dtype)


def expect_one_list(form: str, page_table: Tensor) -> None:
    """UsageError for page lists by head group, which a form of the op does not read."""
    if page_table.ndim != 2:
        raise UsageError(
            f"block_attention: implementation {form} reads one list of pages a row, but page_table is "
            f"{list(page_table.shape)}, a list for each head group; use reference"
        )


def merge_partials(outs: Tensor, lses: Tensor) -> Tensor:
    """Attention over all keys from attention over parts of them: outs [N, R, T, H, D], lses [N, R, H, T]."""
    weights = torch.softmax(lses, dim=0).transpose(2, 3)[..., None]
    return (outs * weights).sum(0)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Random pages, listed in an order of their own (shuffled, runs or one), fewer in later rows.

    Pages that no row lists hold NaN, and places of the table beyond a row's count no page, so that a stale read shows.
    No value is read from a tensor, so that fake tensors will do where shapes are enough.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, count, heads, kv_heads, dim = (case[name] for name in ("rows", "pages", "heads", "kv_heads", "dim"))
    spare = 3
    fp8 = bool(case.options.get("fp8"))
    kv = torch.randn(2, rows * count + spare, case["page_tokens"], kv_heads, dim, generator=generator)
    order = list(range(spare, rows * count + spare))
    arranged = case.options.get("order", "shuffled")
    if arranged == "shuffled":
        Random(seed).shuffle(order)
    elif arranged == "runs":  # three runs a row: the middle of the list comes first
        cut = count // 3
        order = [
            page
            for row in range(rows)
            for part in (slice(cut, 2 * cut), slice(0, cut), slice(2 * cut, count))
            for page in order[row * count : (row + 1) * count][part]
        ]
    each = [max(1, count - row) for row in range(rows)]
    listed = [order[row * count : row * count + each[row]] for row in range(rows)]
    table = torch.tensor([[*pages, *[-1] * (count - len(pages))] for pages in listed], dtype=torch.int32)
    counts = torch.tensor(each, dtype=torch.int32)
    unlisted = set(range(kv.shape[1])).difference(*listed)
    kv[:, torch.tensor(sorted(unlisted))] = float("nan")
    q = torch.randn(rows, case["tokens"], heads, dim, generator=generator)
    sinks = case.options.get("sinks")
    inputs: dict[str, Any] = {
        "q": q.to(device, dtype),
        "kv": kv.to(device, dtype),
        "page_table": table.to(device),
        "page_count": counts.to(device),
        "q_sink": None,
        "sink_count": None,
        "kv_scale": None,
        "scale": 1 / math.sqrt(dim),
        "out": torch.full((rows, case["tokens"], heads, dim), float("nan"), dtype=dtype, device=device),
        "lse": None,
    }
    if sinks:
        inputs["q_sink"] = torch.randn(q.shape, generator=generator).to(device, dtype)
        inputs["sink_count"] = torch.tensor([min(row % (sinks + 1) + 1, count) for row in range(rows)]).int().to(device)
    if fp8:
        scales = torch.rand(2, kv.shape[1], kv_heads, generator=generator) * 0.1 + 0.02
        page = torch.arange(kv.shape[1])
        if alike := case.options.get("alike"):  # that many neighbouring pages share a scale, others for the values
            scales = torch.stack((scales[0, page // alike], scales[1, (page + alike // 2) // alike]))
        inputs["kv_scale"] = scales.to(device)
        inputs["kv"] = (kv * 20).to(FP8).to(device)
    if case.options.get("lse"):
        inputs["lse"] = torch.full((rows, heads, case["tokens"]), float("nan"), device=device)
    return inputs


def sizes(rows: int, tokens: int, pages: int, page_tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    return {
        "rows": rows, "tokens": tokens, "pages": pages, "page_tokens": page_tokens,
        "heads": heads, "kv_heads": kv_heads, "dim": dim,
    }  # fmt: skip


TEST_CASES = (
    Case("one page, one tile", sizes(1, 32, 1, 64, 1, 1, 64), {"order": "one"}),
    Case("tails everywhere", sizes(1, 37, 5, 23, 2, 2, 64), {"lse": True}),
    Case("runs, grouped heads", sizes(2, 16, 6, 16, 6, 2, 64), {"order": "runs"}),
    Case("unequal rows, sink in a run", sizes(3, 20, 5, 12, 2, 1, 64), {"sinks": 2, "lse": True, "order": "one"}),
    Case("head of 128", sizes(1, 24, 3, 40, 2, 2, 128), {"sinks": 1}),
    Case("fp8 pages", sizes(2, 18, 4, 20, 2, 1, 64), {"fp8": True, "sinks": 1}),
    Case("fp8 pages in runs", sizes(1, 17, 6, 20, 1, 1, 64), {"fp8": True, "order": "one", "alike": 4, "lse": True}),
    Case("pages of a tile and more", sizes(1, 20, 3, 136, 2, 1, 128)),
    Case("long pages, sink", sizes(2, 12, 2, 130, 1, 1, 128), {"sinks": 1, "lse": True, "order": "one"}),
)
THREE, SIX = 3 * FRAME_480P, 6 * FRAME_480P  # tokens of blocks of three and six frames
BENCH_CASES = (
    Case("1.3B, full window", sizes(1, THREE, 21, FRAME_480P, 12, 12, 128), {"order": "one"}),
    Case("1.3B, full window, three runs", sizes(1, THREE, 21, FRAME_480P, 12, 12, 128), {"order": "runs"}),
    Case("1.3B, full window, scattered", sizes(1, THREE, 21, FRAME_480P, 12, 12, 128), {"order": "shuffled"}),
    Case("1.3B, window 12, sink rotated", sizes(1, THREE, 12, FRAME_480P, 12, 12, 128), {"order": "runs", "sinks": 3}),
    Case("1.3B, block of one", sizes(1, FRAME_480P, 21, FRAME_480P, 12, 12, 128), {"order": "one"}),
    Case("1.3B, four sessions", sizes(4, THREE, 21, FRAME_480P, 12, 12, 128), {"order": "runs"}),
    Case("1.3B, fp8 pages", sizes(1, THREE, 21, FRAME_480P, 12, 12, 128), {"order": "one", "fp8": True, "alike": 64}),
    Case("1.3B, fp8, scale to a page", sizes(1, THREE, 21, FRAME_480P, 12, 12, 128), {"order": "one", "fp8": True}),
    Case("14B, six frames", sizes(1, SIX, 9, FRAME_480P, 40, 40, 128), {"order": "one"}),
    Case("5B, eight frames", sizes(1, 7040, 32, 880, 24, 24, 128), {"order": "one"}),
    Case("grouped heads 24:8", sizes(1, 2048, 8, 1024, 24, 8, 128), {"order": "one"}),
    Case("small world", sizes(1, 64, 10, 64, 4, 4, 64), {"order": "one"}),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
