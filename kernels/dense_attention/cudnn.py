"""Attention over one run of pages through cuDNN, as torch calls it.

cuDNN gives its result in new memory, in a captured graph in memory of the graph; it is copied into its place, which
moves the size of the queries twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .run import keys_and_values

attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default  # whatever order of backends torch has


def dense_attention(q: Tensor, kv: Tensor, first: int, count: int, out: Tensor, scale: float) -> None:
    """One call for all rows, with as many heads of keys as of queries."""
    k, v = keys_and_values(kv, first, count, len(q))
    attended, *_ = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, False, scale=scale)
    out.copy_(attended.transpose(1, 2))
