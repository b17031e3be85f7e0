"""A sink that remembers: every frame that leaves the window is averaged into it. Tensors; when is for the cache.

The average is one of keys before rotation, each token with its own in the sink's frame. Keys are stored rotated, and
rotation is linear: a key stored at place e is R(e) k, so at place s it is R(s - e) R(e) k, and
R(s) (a k_sink + (1 - a) k) = a K_sink + (1 - a) R(s - e) K. Rows and columns are the same in both, so only the pairs
of time turn. Values have no place. The average is kept in float32 or better: a change of (1 - a) would be lost in
bfloat16. Source: Reward Forcing (arXiv 2512.04678), `EMA-Sink`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def averaged(sink: Tensor, leaving: Tensor, turns: Tensor, decay: float) -> Tensor:
    """decay * sink + (1 - decay) * leaving, both keys and values [layers, 2, page_tokens, heads, head_dim].

    turns: [pairs, 2], cosines and sines of the way from where the leaving frame is stored to where the sink is.
    """
    keys, values = leaving.to(sink.dtype).unbind(1)
    return decay * sink + (1 - decay) * torch.stack((turned(keys, turns.to(sink.dtype)), values), dim=1)


def turned(keys: Tensor, turns: Tensor) -> Tensor:
    """Keys [..., head_dim] with their first pairs, those of time, turned further."""
    cos, sin = turns.unbind(-1)
    even, odd = keys[..., : 2 * len(turns)].unflatten(-1, (-1, 2)).unbind(-1)
    time = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((time, keys[..., 2 * len(turns) :]), dim=-1)
