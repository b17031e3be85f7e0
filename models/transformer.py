"""A transformer as the runtime sees it: `Transformer`, and what its passes take besides latents.

Shapes: B batch, F latent frames, P tokens per frame, T = F*P, n heads, k heads of keys and values, c head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.attention import attention
from .cross_attention import TextKeyValues
from .rope import Rope
from .spec import ModelSpec


@dataclass(frozen=True)
class Precision:
    """Dtypes of the parts of a pass that may compute in more than the model's dtype.

    modulation: time MLP, layer norms, modulation and residual sums; None is the model's dtype.
    rope: rotation of queries and keys.
    sinusoid: sines and cosines of the timestep.
    """

    modulation: torch.dtype | None
    rope: torch.dtype
    sinusoid: torch.dtype


PRECISIONS: dict[str, Precision] = {
    # As the causal checkpoints were distilled and are evaluated: the model's own dtype, bfloat16, in modulation.
    "reference": Precision(modulation=None, rope=torch.float64, sinusoid=torch.float64),
    # Nearer to exact modulation in bfloat16, but not the numbers the checkpoints were made with.
    "diffusers": Precision(modulation=torch.float32, rope=torch.float32, sinusoid=torch.float32),
}


class KeyValues(Protocol):
    """Self-attention over a cache of keys and values."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q and k, write k and v to the cache where the pass does, and attend.

        q and the result: [B, T, n, c]; k and v: [B, T, k, c]; q and k after their norms.
        """


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of each layer, [B, rows, n, c]; image rows only for I2V models."""

    text: tuple[tuple[Tensor, Tensor], ...]
    image: tuple[tuple[Tensor, Tensor], ...] | None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend to the prompt, all rows, the zero rows after it too, and to the image: q and the result [B, T, n, c].

        q after its norm.
        """
        out = attention(q, *self.text[layer])
        return out if self.image is None else out + attention(q, *self.image[layer])


class Transformer(nn.Module, ABC):
    """Predicts the flow velocity of F latent frames, each at its own timestep."""

    spec: ModelSpec

    @property
    @abstractmethod
    def rope(self) -> Rope:
        """Rotary embedding of the queries and keys that the model passes to `KeyValues.attend`."""

    @abstractmethod
    def embed_text(self, text: Tensor) -> TextContext:
        """Compute what passes need of a prompt, once for all of them, from rows [B, text_len, text_dim]."""

    @abstractmethod
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: TextKeyValues,
        kv: KeyValues,
        actions: Tensor | None = None,
        origin: tuple[int, int] | None = None,
    ) -> Tensor:
        """Predict the velocity, noise - x0, [B, F, C, H, W] of latents [B, F, C, H, W].

        timesteps: [B, F] in 0..1000. actions: [B, F, action_dim], for models that have them: the action that leads to
        each frame. origin: row and column of the first token in the grid of a learned position embedding, for a tile
        of a picture; None for a whole one.
        """
