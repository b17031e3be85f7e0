"""The transformer of MAGI-1 in textbook form. Its modules have the names of the published tensors.

Times run from 0, pure noise, to 1, clean: timesteps are 1000 times that, and the velocity is that towards clean.
Self- and cross-attention of a layer read the same normalised input and share their output projection.
Shapes: B batch, F latent frames, P tokens per frame, T = F*P, k heads of keys and values, c head width, d width.
Source: MAGI-1 (arXiv 2505.13211); github.com/SandAI-org/MAGI-1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear_lowp import linear_lowp
from ...kernels.spec import FP8, LIMITS
from ..cross_attention import TextKeyValues
from ..rope import Rope
from ..time_embedding import sinusoid
from ..transformer import KeyValues, TextContext, Transformer
from .spec import NULL_TOKENS, MagiSpec

LARGEST_FP8 = LIMITS[FP8]
CONDITIONAL, DROPPED = -2, -1  # rows of the null caption whose AdaLN vectors mark branches with and without a prompt


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the parts that compute in float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def linear(x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Apply a layer in `dtype`."""
    return F.linear(x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


class ShiftedNorm(nn.Module):
    """LayerNorm whose stored weight is the factor minus 1; in float32 or better, or in the dtype of its input."""

    def __init__(self, dim: int, eps: float, is_wide: bool = True) -> None:
        super().__init__()
        self.eps, self.is_wide = eps, is_wide
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype) if self.is_wide else x.dtype
        weight, bias = self.weight.to(dtype) + 1, self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), weight.shape, weight, bias, self.eps)


class QuantisedLinear(nn.Module):
    """A layer in FP8 as published: weights and inputs in e4m3, their products summed in float32 or better.

    Inputs are divided by `input_scale`, which has an entry for each channel but one value; where they are smooth, by
    the factors `smooth_scale` of the channels, which the weights have taken up.
    """

    stored_dtypes: ClassVar[Mapping[str, torch.dtype]] = {
        "weight": FP8, **dict.fromkeys(("weight_scale", "input_scale", "smooth_scale"), torch.float32)
    }  # fmt: skip

    def __init__(self, inputs: int, outputs: int, smooth: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.input_scale = nn.Parameter(torch.ones(1 if smooth else inputs, dtype=torch.float32))
        self.smooth_scale = nn.Parameter(torch.ones(inputs, dtype=torch.float32)) if smooth else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        divisor = self.input_scale if self.smooth_scale is None else self.smooth_scale
        scaled = (x.to(dtype) / divisor.to(dtype)).clamp(-LARGEST_FP8, LARGEST_FP8)
        rows = scaled.to(torch.bfloat16).to(FP8).reshape(-1, x.shape[-1])
        scales = self.input_scale[:1].to(dtype), self.weight_scale.to(dtype)
        return linear_lowp(rows, self.weight, *scales, dtype=x.dtype).unflatten(0, x.shape[:-1])


def layer_linear(spec: MagiSpec, layer: int, inputs: int, outputs: int, smooth: bool = False) -> nn.Module:
    """A projection of a layer: quantised in those of an FP8 model but the first and the last."""
    if spec.fp8 and 0 < layer < spec.num_layers - 1:
        return QuantisedLinear(inputs, outputs, smooth)
    return nn.Linear(inputs, outputs, bias=False)


class TimeEmbedding(nn.Module):
    def __init__(self, spec: MagiSpec) -> None:
        super().__init__()
        self.freq_dim = spec.freq_dim
        self.mlp = nn.Sequential(
            nn.Linear(spec.freq_dim, spec.cond_dim), nn.SiLU(), nn.Linear(spec.cond_dim, spec.cond_dim)
        )

    def forward(self, values: Tensor) -> Tensor:
        """Embed values [B, F], times or step conditions, times 1000: [B, F, cond_dim]."""
        first, second = (layer for layer in self.mlp if isinstance(layer, nn.Linear))
        dtype = wide(first.weight.dtype)
        x = sinusoid(values, self.freq_dim, dtype).to(first.weight.dtype)  # rounded as the model's own dtype rounds
        return linear(F.silu(linear(x, first, dtype)), second, dtype)


class CaptionEmbedding(nn.Module):
    def __init__(self, spec: MagiSpec) -> None:
        super().__init__()
        self.null_caption_embedding = nn.Parameter(torch.zeros(spec.text_len, spec.text_dim))
        self.y_proj_xattn = nn.Sequential(nn.Linear(spec.text_dim, spec.dim), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(nn.Linear(spec.text_dim, spec.cond_dim))


class Projections(nn.Module):
    """Norm of a layer's input, and projections to queries, cross-attention queries, keys and values."""

    def __init__(self, spec: MagiSpec, layer: int) -> None:
        super().__init__()
        queries = spec.num_heads * spec.head_dim
        self.layer_norm = nn.LayerNorm(spec.dim, spec.eps)
        self.q, self.qx = (layer_linear(spec, layer, spec.dim, queries) for _ in range(2))
        self.k, self.v = (layer_linear(spec, layer, spec.dim, spec.kv_dim) for _ in range(2))


class Attention(nn.Module):
    """Self-attention and cross-attention side by side."""

    def __init__(self, spec: MagiSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.kv_heads, self.head_dim = layer, spec.kv_heads, spec.head_dim
        self.linear_qkv = Projections(spec, layer)
        self.linear_kv_xattn = nn.Linear(spec.dim, 2 * spec.kv_dim, bias=False)
        self.linear_proj = layer_linear(spec, layer, 2 * spec.num_heads * spec.head_dim, spec.dim, smooth=True)
        self.q_layernorm, self.k_layernorm = (ShiftedNorm(spec.head_dim, spec.eps) for _ in range(2))
        self.q_layernorm_xattn, self.k_layernorm_xattn = (
            ShiftedNorm(spec.head_dim, spec.eps, is_wide=False) for _ in range(2)
        )

    def text_keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, rows, k, c] of text [B, rows, d]; of each head the key stands before the value."""
        pairs = self.linear_kv_xattn(text).unflatten(-1, (self.kv_heads, 2, self.head_dim))
        keys, values = pairs.unbind(-2)
        return self.k_layernorm_xattn(keys), values

    def forward(self, x: Tensor, context: TextKeyValues, kv: KeyValues) -> Tensor:
        """x [B, T, d] to [B, T, d], in float32 or better where the output projection is not quantised."""
        parts = self.linear_qkv
        n = parts.layer_norm(x)
        q, qx, k, v = (
            layer(n).unflatten(-1, (-1, self.head_dim)) for layer in (parts.q, parts.qx, parts.k, parts.v)
        )
        q, k = self.q_layernorm(q).to(x.dtype), self.k_layernorm(k).to(x.dtype)
        seen = kv.attend(self.layer, q, k, v), context.attend(self.layer, self.q_layernorm_xattn(qx))
        # heads of self-attention that share keys stand before those of cross-attention that share keys
        joined = torch.cat([part.unflatten(2, (self.kv_heads, -1)).flatten(3) for part in seen], dim=-1)
        if isinstance(self.linear_proj, nn.Linear):
            return linear(joined.flatten(2), self.linear_proj, wide(x.dtype))
        out: Tensor = self.linear_proj(joined.flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, spec: MagiSpec, layer: int) -> None:
        super().__init__()
        self.gated = spec.gated
        self.layer_norm = nn.LayerNorm(spec.dim, spec.eps)
        self.linear_fc1 = layer_linear(spec, layer, spec.dim, spec.ffn_dim * (2 if spec.gated else 1))
        self.linear_fc2 = layer_linear(spec, layer, spec.ffn_dim, spec.dim, smooth=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_fc1(self.layer_norm(x))
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = F.gelu(x)
        out: Tensor = self.linear_fc2(x)
        return out


class Gates(nn.Module):
    """Factors of the attention and of the feed-forward, between -1 and 1."""

    def __init__(self, spec: MagiSpec) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(spec.cond_dim, 2 * spec.dim))

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Gates [B, F, d] of a condition [B, F, cond_dim]."""
        attention, feed_forward = torch.tanh(self.proj(F.silu(condition))).chunk(2, dim=-1)
        return attention, feed_forward


class Layer(nn.Module):
    def __init__(self, spec: MagiSpec, layer: int) -> None:
        super().__init__()
        self.ada_modulate_layer = Gates(spec)
        self.self_attention = Attention(spec, layer)
        self.self_attn_post_norm, self.mlp_post_norm = (ShiftedNorm(spec.dim, spec.eps) for _ in range(2))
        self.mlp = FeedForward(spec, layer)

    def forward(self, x: Tensor, condition: Tensor, context: TextKeyValues, kv: KeyValues) -> Tensor:
        """x [B, T, d]; condition [B, F, cond_dim]. Each norm follows its gate."""
        attention, feed_forward = self.ada_modulate_layer(condition)
        x = self.added(x, gated(self.self_attention(x, context, kv), attention), self.self_attn_post_norm)
        return self.added(x, gated(self.mlp(x), feed_forward), self.mlp_post_norm)

    def added(self, x: Tensor, update: Tensor, norm: ShiftedNorm) -> Tensor:
        return (x.to(wide(x.dtype)) + norm(update)).to(x.dtype)


class Layers(nn.Module):
    def __init__(self, spec: MagiSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.final_layernorm = ShiftedNorm(spec.dim, spec.eps)


class Final(nn.Module):
    def __init__(self, spec: MagiSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.dim, math.prod(spec.patch) * spec.out_channels * spec.copies, bias=False)


class MagiRope(Rope):
    """Rows and columns are centred, and scaled as if the picture had 16 x 16 tokens in its own proportions."""

    def places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        scale = math.sqrt(height * width / 256)
        rows, columns = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (height, width))
        return rows * stretch(height, scale), columns * stretch(width, scale)


def stretch(count: int, scale: float) -> float:
    """Factor of the positions of an axis; an axis of one token has none to stretch."""
    return (count / scale - 1) / (count - 1) if count > 1 else 1.0


class MagiTransformer(Transformer):
    """Predicts the velocity towards clean latents of F latent frames, each at its own time."""

    spec: MagiSpec
    host_parameters: ClassVar[tuple[str, ...]] = ("bands", "y_embedder.null_caption_embedding")

    def __init__(self, spec: MagiSpec) -> None:
        super().__init__()
        self.spec = spec
        channels, patch = spec.in_channels * spec.copies, (1, *spec.patch)
        self.x_embedder = nn.Conv3d(channels, spec.dim, patch, patch, bias=False)
        self.t_embedder = TimeEmbedding(spec)
        self.y_embedder = CaptionEmbedding(spec)
        self.bands = nn.Parameter(torch.zeros(spec.bands))  # of the rotary embedding; published as rope.bands
        self.videodit_blocks = Layers(spec)
        self.final_linear = Final(spec)

    @property
    def rope(self) -> MagiRope:
        bands = self.bands.detach().double().cpu()
        return MagiRope(bands, bands, bands, half_split=True)

    @property
    def blocks(self) -> list[Layer]:
        return [layer for layer in self.videodit_blocks.layers if isinstance(layer, Layer)]

    # Text

    def null_text(self) -> Tensor:
        """The learned null caption [text_len, text_dim], of which cross-attention sees the first rows."""
        table = self.y_embedder.null_caption_embedding.detach()
        return torch.cat((table[:NULL_TOKENS], torch.zeros_like(table[NULL_TOKENS:])))

    def text_inputs(self, rows: Tensor, dropped: bool) -> Tensor:
        """Rows [text_len + 1, text_dim]: the caption, then the row of the AdaLN vector. Without rows: null's."""
        row = self.y_embedder.null_caption_embedding.detach()[DROPPED if dropped else CONDITIONAL]
        caption = rows if bool(rows.any()) else self.null_text().to(rows)
        return torch.cat((caption, row[None].to(caption)))

    def embed_text(self, text: Tensor) -> TextContext:
        """Compute what passes need of rows [B, text_len + 1, text_dim]; caption rows of zeros are not seen."""
        dtype = self.spec_dtype
        caption, row = text[:, :-1], text[:, -1]
        cross, adaln = self.y_embedder.y_proj_xattn[0], self.y_embedder.y_proj_adaln[0]
        assert isinstance(cross, nn.Linear) and isinstance(adaln, nn.Linear)
        rows = F.silu(linear(caption, cross, wide(dtype))).to(dtype)
        keys = tuple(layer.self_attention.text_keys(rows) for layer in self.blocks)
        mask = (caption != 0).any(dim=-1)[:, None, None]
        return TextContext(keys, None, mask, linear(row, adaln, wide(dtype)))

    @property
    def spec_dtype(self) -> torch.dtype:
        """The dtype of the model, of which some parts compute in more."""
        return self.videodit_blocks.final_layernorm.weight.dtype

    # Passes

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: TextKeyValues,
        kv: KeyValues,
        actions: Tensor | None = None,
        origin: tuple[int, int] | None = None,
    ) -> Tensor:
        """Predict the velocity, x0 - noise, [B, F, C, H, W] of latents [B, F, C, H, W].

        timesteps: [B, F], 0 for noise to 1000 for clean; or [B, F, 2] with the step condition of a distilled model.
        """
        dtype, height, width = self.spec_dtype, *latents.shape[-2:]
        x = self.embed_latents(latents).to(dtype)
        condition = self.condition(timesteps, context).to(dtype)
        for layer in self.blocks:
            x = layer(x, condition, context, kv)
        x = linear(self.videodit_blocks.final_layernorm(x), self.final_linear.linear, wide(dtype))
        return self.unpatchify(x, height, width).to(latents.dtype)

    def condition(self, timesteps: Tensor, context: TextKeyValues) -> Tensor:
        """Sum [B, F, cond_dim] of the embeddings of time and step condition and of the caption's AdaLN vector."""
        times, *steps = timesteps.unbind(-1) if timesteps.ndim == 3 else [timesteps]
        embedded = self.t_embedder(times)
        for step in steps:
            embedded = embedded + self.t_embedder(step * 1000)
        return embedded + context.pooled(times.shape[1])

    def embed_latents(self, latents: Tensor) -> Tensor:
        """Tokens [B, T, d] of latents [B, F, C, H, W]."""
        weight = self.x_embedder.weight
        dtype = wide(weight.dtype)
        x = (latents.to(dtype) * self.spec.rescale).transpose(1, 2)
        x = F.conv3d(torch.cat([x] * self.spec.copies, dim=1), weight.to(dtype), stride=self.x_embedder.stride)
        return x.flatten(2).transpose(1, 2)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, T, ph*pw*C], channels fastest, to [B, F, C, H, W] of the first copy of the channels."""
        ph, pw = self.spec.patch
        x = x.unflatten(-1, (ph, pw, -1))[..., : self.spec.out_channels]
        x = x.unflatten(1, (-1, height // ph, width // pw)).permute(0, 1, 6, 2, 4, 3, 5)
        return x.flatten(5, 6).flatten(3, 4) / self.spec.rescale


def gated(update: Tensor, gate: Tensor) -> Tensor:
    """update [B, F*P, d] times gate [B, F, d] per frame, in float32 or better."""
    dtype = wide(update.dtype)
    return (update.to(dtype).unflatten(1, (gate.shape[1], -1)) * gate.to(dtype)[:, :, None]).flatten(1, 2)
