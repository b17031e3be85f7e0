"""Faster layers for the transformer on a CPU: fewer passes over the tokens, and time embeddings once per timestep.

`with_cpu_layers` copies a model and shares its weights. The result equals that of the plain layers to rounding, in
float32 and float64; in dtypes of 16 bits the plain layers compute, and only the time embedding is kept.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.rms_norm.cpu import rms_scale
from ..cross_attention import TextKeyValues
from ..transformer import FrameContext, KeyValues
from .transformer import Block, Head, RMSNorm, TimeEmbedding

WIDE = (torch.float32, torch.float64)
Part = TypeVar("Part", bound=nn.Module)
Content = tuple[tuple[int, ...], torch.dtype, bytes]
KEPT = 32  # time embeddings: more than the steps of two schedules


class CpuRMSNorm(RMSNorm):
    """The same norm in three passes over `x`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in WIDE:
            return super().forward(x)
        return (x * rms_scale(x, self.eps)).mul_(self.weight)


class CpuBlock(Block):
    """The same layer, with fused multiplies and adds."""

    def forward(
        self, x: Tensor, modulation: Tensor, context: TextKeyValues, kv: KeyValues, frames: FrameContext | None = None
    ) -> Tensor:
        if x.dtype not in WIDE or modulation.dtype != x.dtype or self.modulation.dtype != x.dtype:
            return super().forward(x, modulation, context, kv, frames)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (self.modulation + modulation).unbind(2)
        x = gated(x, self.self_attn(modulated(x, shift_sa, scale_sa, self.eps), self.layer, kv), gate_sa)
        x = self.follow_camera(x, frames)
        x = x + self.cross_attn(self.norm_cross(x), self.layer, context)
        return gated(x, self.ffn(modulated(x, shift_ff, scale_ff, self.eps)), gate_ff)


class CpuHead(Head):
    """The same layer, with fused multiplies and adds."""

    def forward(self, x: Tensor, e: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype not in WIDE or not self.modulation.dtype == x.dtype == dtype:
            return super().forward(x, e, dtype)
        shift, scale = (self.modulation + e[:, :, None]).unbind(2)
        out: Tensor = self.linear(modulated(x, shift, scale, self.eps))
        return out


class CpuTimeEmbedding(TimeEmbedding):
    """Keeps the last embeddings: the passes of a block and of all later blocks have the same few timesteps.

    Weights that change call for another copy of the model.
    """

    kept: OrderedDict[tuple[Content, ...], tuple[Tensor, Tensor]]

    def forward(self, timesteps: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        key = tuple(content(part) for part in (timesteps, added) if part is not None)
        if key not in self.kept:
            self.kept[key] = super().forward(timesteps, added)
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: CpuRMSNorm, Block: CpuBlock, Head: CpuHead, TimeEmbedding: CpuTimeEmbedding
}  # fmt: skip


def with_cpu_layers(model: Part) -> Part:
    """Copy a model on the CPU, sharing its weights, with faster layers; a model elsewhere is returned unchanged."""
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        return model
    return converted(model)


def converted(part: Part) -> Part:
    """Copy a module and all in it, without its weights, as the layers of `LAYERS`."""
    copied = copy.copy(part)
    if (faster := LAYERS.get(type(part))) is not None:
        copied.__class__ = faster  # type: ignore[assignment]
    if isinstance(copied, CpuTimeEmbedding):
        copied.kept = OrderedDict()
    copied.__dict__["_modules"] = {name: converted(inner) for name, inner in part.named_children()}
    return copied


def content(tensor: Tensor) -> Content:
    """Shape, dtype and bytes of a small tensor."""
    return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift per frame; x [B, F*P, d], shift and scale [B, F, d]."""
    if shift.shape[1] == 1:
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
    frames = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], frames, 1 + scale[:, :, None]).flatten(1, 2)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update per frame."""
    if gate.shape[1] == 1:
        return torch.addcmul(x, update, gate)
    frames = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, frames), update.unflatten(1, frames), gate[:, :, None]).flatten(1, 2)
