"""Block attention through torch's own (cuDNN, FlashAttention), where a row's pages are one run in ascending order.

It reads the page lists on the host, so it is for comparison and for passes that are not captured.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...errors import UsageError
from .reference import expect_one_list


def pages_are_one_run(page_table: Tensor, page_count: Tensor) -> bool:
    """Return True if each row's pages follow each other. It reads the tables, so never call it between launches."""
    return all(
        listed[:count] == list(range(listed[0], listed[0] + count))
        for listed, count in zip(page_table.tolist(), page_count.tolist(), strict=True)
    )


def runs_of(
    form: str,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [tokens, Hkv, D] of each row, as views of the pages; UsageError for calls with other features."""
    expect_one_list(form, page_table)
    for name, tensor in (("q_sink", q_sink), ("kv_scale", kv_scale), ("lse", lse)):
        if tensor is not None:
            raise UsageError(f"block_attention: implementation {form} takes no {name}; use triton or reference")
    if not pages_are_one_run(page_table, page_count):
        raise UsageError(f"block_attention: implementation {form} needs pages that follow each other; use triton")
    runs = []
    for listed, count in zip(page_table.tolist(), page_count.tolist(), strict=True):
        k, v = kv[:, listed[0] : listed[0] + count].flatten(1, 2)
        runs.append((k, v))
    return runs


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
    """Slices of the pages as keys and values; UsageError for arguments that torch's attention cannot take."""
    runs = runs_of("sdpa", kv, page_table, page_count, q_sink, kv_scale, lse)
    for row, (k, v) in enumerate(runs):
        attended = F.scaled_dot_product_attention(
            q[row].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
            scale=scale, enable_gqa=q.shape[2] != kv.shape[3],
        )  # fmt: skip
        out[row] = attended[0].transpose(0, 1)
