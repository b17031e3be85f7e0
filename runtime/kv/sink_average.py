"""Exponential moving average of the attention sink: each frame that leaves the window is averaged into a sink frame.

The average is over keys before rotation, token by token. Keys are stored rotated, and rotation is linear: a key stored
at position e is R(e) k, so at position s it is R(s - e) R(e) k, and
R(s) (a k_sink + (1 - a) k) = a K_sink + (1 - a) R(s - e) K. Rows and columns are equal in both frames, so only the
temporal pairs rotate. Values are not rotated. The average is stored in float32 or better, since bfloat16 would lose a
change of (1 - a). Source: Reward Forcing (arXiv 2512.04678), `EMA-Sink`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.rope import Rope


def average_frame(sink: Tensor, leaving: Tensor, rope: Rope, cos_sin: Tensor, decay: float) -> Tensor:
    """Return decay * sink + (1 - decay) * leaving, keys and values [layers, 2, page_tokens, heads, head_dim].

    cos_sin: [temporal pairs, 2], the rotation from the position of the leaving frame to that of the sink frame.
    """
    keys, values = leaving.to(sink.dtype).unbind(1)
    keys = rope.rotate_time(keys, cos_sin.to(sink.dtype))
    return decay * sink + (1 - decay) * torch.stack((keys, values), dim=1)
