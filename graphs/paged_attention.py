"""Self-attention of a pass over pages, in the ops that the graph compiler knows: append, then attend.

The eager runtime calls it and the tracer traces it, so that both run the same ops. All parts of a pass write
their keys and values before any of them attends, since the frames of a pass see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.block_attention import block_attention
from ..kernels.dense_attention.run import Run
from ..kernels.rope_append import rope_append
from .tables import PassTables


@dataclass(frozen=True)
class PagedAttention:
    """`KeyValues` of one pass: tokens [B, T, n, c], B sessions with the same groups.

    parts: the pass's tables, in token order; rows of a part are the sessions' groups, session by session.
    kv: per layer [2, pages, P, n, c]; scales: per layer float32 [2, pages, n] for pages of low precision, or None.
    rope_rows [H, b, 2] and rope_columns [W, c, 2]: of the token grid, P = H * W. half_split: channels (j, j + pairs)
    are rotated together, not (2j, 2j + 1). run: the pages of every list, where they are one run and stay it; else None.
    """

    parts: Sequence[PassTables]
    kv: Sequence[Tensor]
    rope_rows: Tensor
    rope_columns: Tensor
    scales: Sequence[Tensor] | None = None
    half_split: bool = False
    run: Run | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate, write into the pages, and attend to those listed; all [B, T, n, c]."""
        kv, scale = self.kv[layer], None if self.scales is None else self.scales[layer]
        queries = append(self.parts, q, k, v, self.rope_rows, self.rope_columns, kv, scale, self.half_split)
        return attend_parts(self.parts, queries, q, kv, scale)


def append(
    parts: Sequence[PassTables],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    kv: Tensor,
    scale: Tensor | None,
    half_split: bool,
) -> list[tuple[Tensor, Tensor | None]]:
    """Write keys and values of all parts; returns each part's queries [R, T, n, c], for the window and the sink."""
    queries = []
    for part, (start, stop) in zip(parts, _ranges(parts, len(q), kv.shape[2]), strict=True):
        query, key, value = (tensor[:, start:stop].reshape(part.rows, -1, *tensor.shape[2:]) for tensor in (q, k, v))
        q_sink = None if part.rope_sink is None else torch.empty_like(query)
        rotated = rope_append(
            query, key, value, part.rope_time, rope_rows, rope_columns, kv, part.pages,
            rope_sink=part.rope_sink, q_sink=q_sink, kv_scale=scale, half_split=half_split,
        )  # fmt: skip
        queries.append((rotated, q_sink))
    return queries


def attend_parts(
    parts: Sequence[PassTables],
    queries: Sequence[tuple[Tensor, Tensor | None]],
    like: Tensor,
    kv: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Attention of each part's queries over the pages listed for it, in the shape of `like`, [B, T, n, c]."""
    out = [
        block_attention(
            rotated, kv, part.page_table, part.page_count, q_sink=q_sink, sink_count=part.sink_count, kv_scale=scale
        ).reshape(len(like), -1, *like.shape[2:])
        for part, (rotated, q_sink) in zip(parts, queries, strict=True)
    ]
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _ranges(parts: Sequence[PassTables], sessions: int, page_tokens: int) -> list[tuple[int, int]]:
    """Each part's first token and the one after its last, within a session."""
    ranges, start = [], 0
    for part in parts:
        stop = start + part.rows // sessions * part.frames * page_tokens
        ranges.append((start, stop))
        start = stop
    return ranges
