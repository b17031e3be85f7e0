"""Softmax attention over whole keys and values, in the [batch, tokens, heads, channels] layout of the models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q [B, T, n, c] over k, v [B, K, k, c], scale 1/sqrt(c); returns [B, T, n, c].

    Of n heads of queries, n / k neighbours share a head of keys and values.

    `mask` is bool [T, K], or with the dims of batch and heads before these, True where a query may look.
    """
    if k.shape[2] != q.shape[2]:
        k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for part in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)
