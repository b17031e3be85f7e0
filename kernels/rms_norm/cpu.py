"""RMS norm on a CPU in three passes over the rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out.copy_((wide * rms_scale(wide, eps)).mul_(weight))


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, which stays as 1, in three calls."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), eps), length, length, value=1 / x.shape[-1]).rsqrt_()
