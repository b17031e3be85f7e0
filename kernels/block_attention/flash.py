"""Block attention through the flash-attn package, where a row's pages are one run in ascending order.

The package is looked for when the form is first used. Like `sdpa` it reads the page lists on the host, so it is for
comparison and for passes that are not captured.
"""

from __future__ import annotations

from torch import Tensor

from ..dense_attention.flash import attend
from .sdpa import runs_of


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
    """Slices of the pages as keys and values; ValueError for what the package cannot do, InferixError without it."""
    for row, (k, v) in enumerate(runs_of("flash_attn", kv, page_table, page_count, q_sink, kv_scale, lse)):
        out[row] = attend(q[row : row + 1], k[None], v[None], scale)[0]
