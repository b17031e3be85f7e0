"""The causal Wan transformer in textbook form: per-frame timesteps, self-attention through a `KeyValues` argument.

`forward` does not depend on the storage of keys and values: self-attention is `kv.attend(layer, q, k, v)`, so the same
model runs over a contiguous cache, over pages, or in one dense masked pass.
Shapes: B batch, F latent frames, P tokens per frame, T = F*P, n heads, c head width, d = n*c.
Source: Wan 2.1 (arXiv 2503.20314); Self-Forcing (arXiv 2506.08009) for the causal form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.rope import axis_frequencies
from ..cross_attention import TextKeyValues
from ..rope import Rope
from ..spec import ModelSpec
from ..time_embedding import sinusoid
from ..transformer import PRECISIONS, FrameContext, KeyValues, Precision, TextContext, Transformer


class RMSNorm(nn.Module):
    """RMS norm over the full width, in float32 or better, before the split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.q, self.k, self.v, self.o = (
            nn.Linear(spec.dim, width) for width in (spec.dim, spec.kv_dim, spec.kv_dim, spec.dim)
        )
        self.norm_q, self.norm_k = (RMSNorm(width, spec.eps) for width in (spec.dim, spec.kv_dim))

    def forward(self, x: Tensor, layer: int, kv: KeyValues) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        return self.o(kv.attend(layer, q, k, v).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.q, self.k, self.v, self.o = (
            nn.Linear(spec.dim, width) for width in (spec.dim, spec.kv_dim, spec.kv_dim, spec.dim)
        )
        self.norm_q, self.norm_k = (RMSNorm(width, spec.eps) for width in (spec.dim, spec.kv_dim))
        if spec.image_dim is not None:
            self.k_image, self.v_image = (nn.Linear(spec.dim, spec.kv_dim) for _ in range(2))
            self.norm_k_image = RMSNorm(spec.kv_dim, spec.eps)

    def text_keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.norm_k(self.k(text)), self.v(text))

    def image_keys(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self._split(self.norm_k_image(self.k_image(image)), self.v_image(image))

    def _split(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.unflatten(-1, (-1, self.head_dim)), v.unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, layer: int, context: TextKeyValues) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (-1, self.head_dim))
        return self.o(context.attend(layer, q).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.dim, spec.ffn_dim)
        self.down = nn.Linear(spec.ffn_dim, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class CameraEmbedding(nn.Module):
    """Tokens [B, T, d] of a camera's rays [B, F, C, H, W], folded to latent places."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        channels = spec.frame_channels - spec.condition_channels
        self.projection = nn.Linear(channels * math.prod(spec.patch), spec.dim)
        self.linear_1 = nn.Linear(spec.dim, spec.dim)
        self.linear_2 = nn.Linear(spec.dim, spec.dim)

    def forward(self, rays: Tensor) -> Tensor:
        height, width = self.patch
        patches = rays.unflatten(4, (-1, width)).unflatten(3, (-1, height))  # [B, F, C, rows, dy, columns, dx]
        x = self.projection(patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3))
        return x + self.linear_2(F.silu(self.linear_1(x)))


class CameraModulation(nn.Module):
    """Scale and shift [B, T, d] of one layer's residual stream from a camera's tokens, whatever the noise level."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.scale, self.shift = (nn.Linear(spec.dim, spec.dim) for _ in range(4))

    def forward(self, camera: Tensor) -> tuple[Tensor, Tensor]:
        u = camera + self.linear_2(F.silu(self.linear_1(camera)))
        return self.scale(u), self.shift(u)


class Block(nn.Module):
    def __init__(self, spec: ModelSpec, layer: int, precision: Precision) -> None:
        super().__init__()
        self.layer, self.eps, self.precision = layer, spec.eps, precision
        self.modulation = nn.Parameter(torch.zeros(1, 6, spec.dim))
        self.self_attn = SelfAttention(spec)
        self.norm_cross = nn.LayerNorm(spec.dim, spec.eps)
        self.cross_attn = CrossAttention(spec)
        self.ffn = FeedForward(spec)
        if spec.camera_channels is not None:
            self.camera = CameraModulation(spec)

    def forward(
        self, x: Tensor, modulation: Tensor, context: TextKeyValues, kv: KeyValues, frames: FrameContext | None = None
    ) -> Tensor:
        """x [B, T, d], modulation [B, F, 6, d]. Linear layers compute in the dtype of the layer's norm."""
        dtype = self.norm_cross.weight.dtype
        wide = modulation_dtype(self.precision, dtype)
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = (
            self.modulation.to(wide) + modulation.to(wide)
        ).unbind(2)
        norm = modulated(x, shift_sa, scale_sa, self.eps).to(dtype)
        x = gated(x, self.self_attn(norm, self.layer, kv), gate_sa)
        x = self.follow_camera(x, frames)
        norm = F.layer_norm(
            x.to(wide), x.shape[-1:], self.norm_cross.weight.to(wide), self.norm_cross.bias.to(wide), self.eps
        ).to(dtype)
        x = x + self.cross_attn(norm, self.layer, context)
        return gated(x, self.ffn(modulated(x, shift_ff, scale_ff, self.eps).to(dtype)), gate_ff)

    def follow_camera(self, x: Tensor, frames: FrameContext | None) -> Tensor:
        """Scale and shift the residual stream as the camera says; unchanged for a model without one."""
        if frames is None or frames.camera is None:
            return x
        scale, shift = self.camera(frames.camera) if frames.modulation is None else frames.modulation[self.layer]
        return (1 + scale) * x + shift


class TimeEmbedding(nn.Module):
    def __init__(self, spec: ModelSpec, precision: Precision) -> None:
        super().__init__()
        self.freq_dim, self.precision = spec.freq_dim, precision
        self.linear_1 = nn.Linear(spec.freq_dim, spec.dim)
        self.linear_2 = nn.Linear(spec.dim, spec.dim)
        self.projection = nn.Linear(spec.dim, 6 * spec.dim)

    def forward(self, timesteps: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """timesteps [B, F] to e [B, F, d], `added` included, and its projection [B, F, 6, d].

        The MLP is in modulation's dtype.
        """
        dtype = self.projection.weight.dtype
        wide = modulation_dtype(self.precision, dtype)
        x = sinusoid(timesteps, self.freq_dim, self.precision.sinusoid).to(wide)
        x = F.linear(x, self.linear_1.weight.to(wide), self.linear_1.bias.to(wide))
        x = F.linear(F.silu(x), self.linear_2.weight.to(wide), self.linear_2.bias.to(wide))
        if not self.precision.residual:
            x = x.to(dtype)
        if added is not None:
            x = x + added
        return x, widened(self.projection, F.silu(x)).unflatten(-1, (6, -1))


class ActionEmbedding(nn.Module):
    """MLP from a frame's action vector [B, F, action_dim] to an addend of its timestep embedding [B, F, d]."""

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(action_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TextEmbedding(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(spec.text_dim, spec.dim)
        self.linear_2 = nn.Linear(spec.dim, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class ImageEmbedding(nn.Module):
    def __init__(self, spec: ModelSpec, image_dim: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(image_dim)
        self.linear_1 = nn.Linear(image_dim, image_dim)
        self.linear_2 = nn.Linear(image_dim, spec.dim)
        self.norm_out = nn.LayerNorm(spec.dim)
        self.position = (
            nn.Parameter(torch.zeros(1, spec.image_tokens, image_dim)) if spec.image_tokens is not None else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:  # the features of two images in sequence
            x = x.reshape(-1, *self.position.shape[1:]) + self.position
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(x)))))


class Head(nn.Module):
    def __init__(self, spec: ModelSpec, precision: Precision) -> None:
        super().__init__()
        self.eps, self.precision = spec.eps, precision
        self.modulation = nn.Parameter(torch.zeros(1, 2, spec.dim))
        self.linear = nn.Linear(spec.dim, math.prod(spec.patch) * spec.out_channels)

    def forward(self, x: Tensor, e: Tensor, dtype: torch.dtype) -> Tensor:
        """Patches [B, T, ph*pw*C] in `dtype`."""
        wide = modulation_dtype(self.precision, x.dtype)
        shift, scale = (self.modulation.to(wide) + e.to(wide)[:, :, None]).unbind(2)
        return widened(self.linear, modulated(x, shift, scale, self.eps)).to(dtype)


class WanTransformer(Transformer):
    """Predicts the flow velocity of F latent frames, each at its own timestep."""

    def __init__(self, spec: ModelSpec, precision: str = "reference") -> None:
        super().__init__()
        self.spec, self.precision = spec, PRECISIONS[precision]
        self.patch_embedding = nn.Conv3d(spec.in_channels, spec.dim, (1, *spec.patch), (1, *spec.patch))
        self.text_embedding = TextEmbedding(spec)
        self.time_embedding = TimeEmbedding(spec, self.precision)
        if spec.grid is not None:
            self.position_embedding = nn.Parameter(torch.zeros(*spec.grid, spec.dim))
        if spec.action_dim is not None:
            self.action_embedding = ActionEmbedding(spec.dim, spec.action_dim)
        if spec.image_dim is not None:
            self.image_embedding = ImageEmbedding(spec, spec.image_dim)
        if spec.camera_channels is not None:
            self.camera_embedding = CameraEmbedding(spec)
        self.blocks = nn.ModuleList(Block(spec, layer, self.precision) for layer in range(spec.num_layers))
        self.head = Head(spec, self.precision)

    @property
    def rope(self) -> Rope:
        return Rope(*axis_frequencies(self.spec.head_dim))

    def embed_text(self, text: Tensor, image: Tensor | None = None) -> TextContext:
        """Compute the cross-attention keys and values of a prompt, once for all passes.

        text: [B, text_len, text_dim], zero rows after the prompt; they are attended to, as in training.
        image: [B, rows, image_dim] features of the image encoder, for I2V models.
        """
        if (image is None) != (self.spec.image_dim is None):
            raise ValueError(f"{self.spec.name}: image features are {'missing' if image is None else 'not used'}")
        rows = self.text_embedding(text)
        blocks = [block.cross_attn for block in self.blocks if isinstance(block, Block)]
        text_keys = tuple(attn.text_keys(rows) for attn in blocks)
        if image is None:
            return TextContext(text_keys, None)
        image_rows = self.image_embedding(image)
        return TextContext(text_keys, tuple(attn.image_keys(image_rows) for attn in blocks))

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: TextKeyValues,
        kv: KeyValues,
        actions: Tensor | None = None,
        origin: tuple[int, int] | None = None,
        frames: FrameContext | None = None,
    ) -> Tensor:
        """Predict the velocity, noise - x0, [B, F, C, H, W] of latents [B, F, C, H, W], in their dtype.

        timesteps: [B, F] in 0..1000. actions: [B, F, action_dim], for models that have them: the action that leads to
        each frame. origin: see `embed_latents`. frames: of `embed_frames`, for models with condition channels.
        """
        if (actions is None) != (self.spec.action_dim is None):
            raise ValueError(f"{self.spec.name}: actions are {'missing' if actions is None else 'not used'}")
        if (frames is None) != (self.spec.frame_channels == 0):
            raise ValueError(f"{self.spec.name}: frames are {'missing' if frames is None else 'not used'}")
        (height, width), dtype = latents.shape[-2:], latents.dtype
        latents = latents.to(self.patch_embedding.weight.dtype)
        if frames is not None:
            latents = torch.cat((latents, frames.condition), dim=2)
        x = self.embed_latents(latents, origin)
        if self.precision.residual:
            x = x.to(modulation_dtype(self.precision, x.dtype))
        e, modulation = self.time_embedding(timesteps, None if actions is None else self.action_embedding(actions))
        for block in self.blocks:
            x = block(x, modulation, context, kv, frames)
        return self.unpatchify(self.head(x, e, dtype), height, width)

    def embed_frames(self, channels: Tensor, each_layer: bool = True) -> FrameContext:
        condition, rays = channels.split(
            [self.spec.condition_channels, channels.shape[2] - self.spec.condition_channels], dim=2
        )
        if self.spec.camera_channels is None:
            return FrameContext(condition)
        camera = self.camera_embedding(rays)
        if not each_layer:
            return FrameContext(condition, camera)
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return FrameContext(condition, camera, tuple(block.camera(camera) for block in blocks))

    def embed_latents(self, latents: Tensor, origin: tuple[int, int] | None = None) -> Tensor:
        """Tokens [B, T, d] of latents [B, F, C, H, W].

        origin: row and column of the first token in the position grid; None for the middle of the grid.
        """
        x = self.patch_embedding(latents.transpose(1, 2))
        if self.spec.grid is not None:
            middle = ((most - size) // 2 for most, size in zip(self.spec.grid, x.shape[3:], strict=True))
            top, left = origin or middle
            positions = self.position_embedding[top : top + x.shape[3], left : left + x.shape[4]]
            x = x + positions.permute(2, 0, 1)[:, None]
        return x.flatten(2).transpose(1, 2)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, T, ph*pw*C] with channels fastest to [B, F, C, H, W]."""
        ph, pw = self.spec.patch
        x = x.unflatten(-1, (ph, pw, -1)).unflatten(1, (-1, height // ph, width // pw))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def modulation_dtype(precision: Precision, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of modulation: the policy's, but never narrower than the model's."""
    return dtype if precision.modulation is None else torch.promote_types(dtype, precision.modulation)


def widened(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the dtype of `x`, which may be wider than that of its weights."""
    if isinstance(linear, nn.Linear) and linear.bias.dtype != x.dtype:  # ranks gather a weight wherever it is read
        return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
    out: Tensor = linear(x)
    return out


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift per frame; x [B, F*P, d], shift and scale [B, F, d] in their dtype."""
    frames = F.layer_norm(x.to(shift.dtype), x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).to(x.dtype)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate * update per frame, in the gate's dtype."""
    scaled = update.to(gate.dtype).unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    return (x.to(gate.dtype) + scaled.flatten(1, 2)).to(x.dtype)
