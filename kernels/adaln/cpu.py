"""Gated residual, layer norm and modulation on a CPU: one pass over the tokens for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def adaln(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    normed: Tensor,
    row_scale: Tensor | None,
    eps: float,
) -> None:
    """In float32 and float64; other dtypes and a result with scales run as the reference."""
    if x.dtype not in (torch.float32, torch.float64) or row_scale is not None:
        reference.adaln(x, update, gate, shift, scale, weight, bias, residual, normed, row_scale, eps)
        return
    if update is None:
        residual.copy_(x)
    elif gate is None:
        torch.add(x, update, out=residual)
    else:
        frames = gate.shape[1]
        torch.addcmul(
            by_frame(x, frames), by_frame(update, frames), gate[:, :, None], out=by_frame(residual, frames)
        )
    result = F.layer_norm(residual, x.shape[-1:], weight, bias, eps)
    if shift is None or scale is None:
        normed.copy_(result)
    else:
        frames = scale.shape[1]
        torch.addcmul(
            shift[:, :, None], by_frame(result, frames), 1 + scale[:, :, None], out=by_frame(normed, frames)
        )


def by_frame(x: Tensor, frames: int) -> Tensor:
    """View tokens [R, T, d] as [R, frames, T / frames, d]."""
    return x.unflatten(1, (frames, -1))
