"""Self-attention of a pass over pages stored in fewer bits than the model computes in.

New keys and values are made in a small buffer in the model's dtype and quantised from there into their pages, a
scale for each page and head. FP8 pages are then read where they lie; what the attention kernels cannot read, INT8
or another float, is restored into the buffer, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.kv_pages import kv_pages
from .paged_attention import append, attend_parts
from .tables import PassTables


@dataclass(frozen=True)
class StagedAttention:
    """`KeyValues` of one pass, as `PagedAttention` is.

    staging: [2, slots, P, n, c] in the model's dtype. kv: per layer [2, pages, P, n, c]; scales: per layer float32
    [2, pages, n], or None for pages of a float without a scale. parts: tables whose `pages` are slots of staging.
    written: slots and pages, int32 [N] each, of the pass's own frames. seen: pages and slots, int32 [M] each, of
    all frames that are read through staging, where `page_table` lists slots; None where it lists pages.
    """

    parts: Sequence[PassTables]
    kv: Sequence[Tensor]
    scales: Sequence[Tensor] | None
    staging: Tensor
    written: tuple[Tensor, Tensor]
    seen: tuple[Tensor, Tensor] | None
    rope_rows: Tensor
    rope_columns: Tensor
    half_split: bool = False

    @property
    def slots(self) -> int:
        """Slots of the staging buffer that the pass uses."""
        slots, _ = self.written if self.seen is None else self.seen
        return len(slots)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate, quantise into the pages, and attend to those listed; all [B, T, n, c]."""
        kv, scale = self.kv[layer], None if self.scales is None else self.scales[layer]
        queries = append(self.parts, q, k, v, self.rope_rows, self.rope_columns, self.staging, None, self.half_split)
        kv_pages(self.staging, self.written[0], kv, self.written[1], target_scale=scale)
        if self.seen is None:
            return attend_parts(self.parts, queries, q, kv, scale)
        kv_pages(kv, self.seen[0], self.staging, self.seen[1], source_scale=scale)
        return attend_parts(self.parts, queries, q, self.staging, None)
