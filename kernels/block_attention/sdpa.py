"""Block attention through torch's own: right where a row's pages are one run in ascending order.

The caller promises that (`pages_are_one_run`); it serves as a baseline, and where cuDNN or FlashAttention is faster.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pages_are_one_run(page_table: Tensor, page_count: Tensor) -> bool:
    """Whether each row's pages follow each other; reads the tables, so never between launches of a block."""
    return all(
        listed[:count] == list(range(listed[0], listed[0] + count))
        for listed, count in zip(page_table.tolist(), page_count.tolist(), strict=True)
    )


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
    """Slices of the pages as keys and values; ValueError for what torch's attention cannot do."""
    for name, tensor in (("q_sink", q_sink), ("kv_scale", kv_scale), ("lse", lse)):
        if tensor is not None:
            raise ValueError(f"block_attention: implementation sdpa takes no {name}; use triton or reference")
    if not pages_are_one_run(page_table, page_count):
        raise ValueError("block_attention: implementation sdpa needs pages that follow each other; use triton")
    for row, (listed, count) in enumerate(zip(page_table.tolist(), page_count.tolist(), strict=True)):
        k, v = kv[:, listed[0] : listed[0] + count].flatten(1, 2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            q[row].transpose(0, 1)[None], k[None], v[None], scale=scale, enable_gqa=q.shape[2] != kv.shape[3]
        )
        out[row] = attended[0].transpose(0, 1)
