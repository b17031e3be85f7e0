"""Attention over one run of pages through torch's own, with the backend that torch chooses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .run import keys_and_values


def dense_attention(q: Tensor, kv: Tensor, first: int, count: int, out: Tensor, scale: float) -> None:
    """One call for all rows, whose result is copied into its place."""
    k, v = (part.transpose(1, 2) for part in keys_and_values(kv, first, count, len(q)))
    groups = q.shape[2] != kv.shape[3]
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale, enable_gqa=groups)
    out.copy_(attended.transpose(1, 2))
