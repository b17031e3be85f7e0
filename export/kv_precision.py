"""Keys and values of a past in INT8, with a scale for each frame and head, as pages of `kv_dtype` int8 have them.

The ops are what ONNX has as QuantizeLinear and DequantizeLinear over rows; the writer of ONNX translates them.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 127.0
SMALLEST = 1e-12  # of the largest entry of a frame and head; below it a scale would be 0


@torch.library.custom_op("inferix_export::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor, scale: Tensor) -> Tensor:
    """Rows x [R, C] over their scale [R], rounded to int8, half to even."""
    return (x / scale[:, None]).round().clamp(-LIMIT - 1, LIMIT).to(torch.int8)


@quantise_rows.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("inferix_export::dequantise_rows", mutates_args=())
def dequantise_rows(x: Tensor, scale: Tensor) -> Tensor:
    """Rows x int8 [R, C] times their scale [R], float32."""
    return x.to(scale.dtype) * scale[:, None]


@dequantise_rows.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [F, P, n, c] as int8, and their scales float32 [F, n]."""
    scale = x.abs().amax((1, 3)).clamp(min=SMALLEST) / LIMIT
    rows = x.transpose(1, 2)
    return quantise_rows(rows.flatten(2).flatten(0, 1), scale.flatten()).reshape(rows.shape).transpose(1, 2), scale


def dequantised(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [F, P, n, c] of int8 entries and scales [F, n]."""
    rows = x.transpose(1, 2)
    return dequantise_rows(rows.flatten(2).flatten(0, 1), scale.flatten()).reshape(rows.shape).transpose(1, 2)
