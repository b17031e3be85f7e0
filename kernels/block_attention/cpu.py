"""Block attention on a CPU through torch's fused attention, over the listed pages.

Pages that follow each other in the store are read in place; others are copied once, run by run. Queries that are
rotated for the sink attend to it by themselves, and the two results are joined by their log-sum-exp.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..spec import indexable

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # with the log-sum-exp


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
    """Row by row and list by list; the sums are in float32 or better. See the public function for shapes."""
    groups = q.shape[2] // kv.shape[3]
    lists = page_table.shape[1] if page_table.ndim == 3 else 1
    each = q.shape[2] // lists  # heads of a list
    counts = page_count.flatten().tolist()
    sinks = [0] * len(counts) if sink_count is None else sink_count.flatten().tolist()
    for index, listed in enumerate(page_table.flatten(0, -2).tolist()):
        row, part = divmod(index, lists)
        heads = slice(part * each, (part + 1) * each)
        early = sinks[index] if q_sink is not None else 0
        parts = []
        # Apart, since the window alone is often one run of pages, which is not copied.
        for queries, pages in ((q_sink, listed[:early]), (q, listed[early : counts[index]])):
            if queries is None or not pages:
                continue
            stored = tokens(kv, pages, kv_scale, q.dtype)
            if groups > 1:
                stored = stored.repeat_interleave(groups, dim=2)
            k, v = stored[:, :, heads].transpose(1, 2)[:, None]  # [1, heads of the list, K, D] each
            parts.append(attend(heads_first(queries, row, heads, k), k, v, scale=scale))
        attended, sums = parts[0] if len(parts) == 1 else joined(*parts)
        out[row, :, heads] = attended[0].transpose(0, 1)
        if lse is not None:
            lse[row, heads] = sums[0]


def heads_first(q: Tensor, row: int, heads: slice, like: Tensor) -> Tensor:
    """Queries [1, heads, T, D] of a row, in the dtype of its keys."""
    return q[row : row + 1, :, heads].transpose(1, 2).to(like.dtype)


def joined(sink: tuple[Tensor, Tensor], window: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over both parts of the keys, [1, H, T, D], and its log-sum-exp [1, H, T]."""
    (early, early_sums), (late, late_sums) = sink, window
    share = torch.sigmoid(early_sums - late_sums)[..., None]
    return torch.lerp(late.to(share.dtype), early.to(share.dtype), share), torch.logaddexp(early_sums, late_sums)


def tokens(kv: Tensor, pages: list[int], kv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys and values [2, tokens, Hkv, D] of listed pages, a view of the store where the pages are one run.

    Pages with scales are restored in float32 or better.
    """
    spans = runs(pages)
    store = indexable(kv)
    views = [store[:, first:stop] for first, stop in spans]
    listed = views[0] if len(views) == 1 else torch.cat(views, dim=1)
    if kv_scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        listed = listed.view(kv.dtype).to(wide) * kv_scale[:, pages].to(wide)[:, :, None, :, None]
    return listed.flatten(1, 2)


def runs(pages: list[int]) -> list[tuple[int, int]]:
    """Each run of pages that follow each other: the first, and the one after the last."""
    starts = [0, *(place for place in range(1, len(pages)) if pages[place] != pages[place - 1] + 1), len(pages)]
    return [(pages[first], pages[first] + stop - first) for first, stop in pairwise(starts)]
