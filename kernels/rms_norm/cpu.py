"""RMS norm on a CPU in three passes over the rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scaled = wide * (length.square() / x.shape[-1] + eps).rsqrt()
    out.copy_(scaled.mul_(weight))
