"""A transformer as the runtime sees it: `Transformer`, and what its passes take besides latents.

Shapes: B batch, F latent frames, P tokens per frame, T = F*P, n heads, k heads of keys and values, c head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

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
    residual: True where the residual stream, the time projection and the head stay in modulation's dtype.
    """

    modulation: torch.dtype | None
    rope: torch.dtype
    sinusoid: torch.dtype
    residual: bool = False


PRECISIONS: dict[str, Precision] = {
    # As the causal checkpoints were distilled and are evaluated: the model's own dtype, bfloat16, in modulation.
    "reference": Precision(modulation=None, rope=torch.float64, sinusoid=torch.float64),
    # Nearer to exact modulation in bfloat16, but not the numbers the checkpoints were made with.
    "diffusers": Precision(modulation=torch.float32, rope=torch.float32, sinusoid=torch.float32),
    # All that is no matmul of a layer in float32, the residual stream included.
    "wide": Precision(modulation=torch.float32, rope=torch.float64, sinusoid=torch.float64, residual=True),
}


class KeyValues(Protocol):
    """Self-attention over a cache of keys and values."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q and k, write k and v to the cache where the pass does, and attend.

        q and the result: [B, T, n, c]; k and v: [B, T, k, c]; q and k after their norms.
        """


@dataclass(frozen=True)
class TextContext:
    """Cross-attention keys and values of each layer, [B, rows, n, c]; image rows only for I2V models.

    mask: bool [B, 1, 1, rows], rows that are seen; None for all, the zero rows after the prompt too. vector: pooled
    text [B, d], which conditions frames beside their timestep; None for models without one.
    """

    text: tuple[tuple[Tensor, Tensor], ...]
    image: tuple[tuple[Tensor, Tensor], ...] | None
    mask: Tensor | None = None
    vector: Tensor | None = None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend to the prompt and to the image: q and the result [B, T, n, c]; q after its norm."""
        out = attention(q, *self.text[layer], self.mask)
        return out if self.image is None else out + attention(q, *self.image[layer])

    def pooled(self, frames: int) -> Tensor:
        """The pooled text of `frames` frames [B, frames, d], for models that have one."""
        assert self.vector is not None
        return self.vector[:, None].expand(-1, frames, -1)

    def for_rows(self, rows: int) -> TextContext:
        """The one prompt of this context for each of `rows` rows of a batch, as views."""

        def spread(tensor: Tensor) -> Tensor:
            return tensor.expand(rows, *tensor.shape[1:])

        def pairs(layers: tuple[tuple[Tensor, Tensor], ...]) -> tuple[tuple[Tensor, Tensor], ...]:
            return tuple((spread(keys), spread(values)) for keys, values in layers)

        return TextContext(
            pairs(self.text),
            None if self.image is None else pairs(self.image),
            None if self.mask is None else spread(self.mask),
            None if self.vector is None else spread(self.vector),
        )


@dataclass(frozen=True)
class FrameContext:
    """Frame inputs of passes beside noisy latents, the same in all passes of a block.

    condition: channels [B, F, condition_channels, H, W] that stand after the latents. camera: its embedding [B, T, d];
    None without one. modulation: (scale, shift) [B, T, d] of each layer, where they are made once for a block; None
    where each pass makes them of `camera`.
    """

    condition: Tensor
    camera: Tensor | None = None
    modulation: tuple[tuple[Tensor, Tensor], ...] | None = None

    @classmethod
    def joined(cls, contexts: Sequence[FrameContext]) -> FrameContext:
        """Frames of several sessions as one batch; all alike in what they have."""
        if len(contexts) == 1:
            return contexts[0]
        cameras = [context.camera for context in contexts if context.camera is not None]
        layers = zip(*(context.modulation for context in contexts if context.modulation is not None), strict=True)
        modulation = tuple(
            (torch.cat([scale for scale, _ in layer]), torch.cat([shift for _, shift in layer])) for layer in layers
        )
        condition = torch.cat([context.condition for context in contexts])
        return cls(condition, torch.cat(cameras) if cameras else None, modulation or None)


class Transformer(nn.Module, ABC):
    """Predicts the flow velocity of F latent frames, each at its own timestep.

    host_parameters: names of those that are read outside of passes, for positions and for texts.
    """

    spec: ModelSpec
    host_parameters: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def rope(self) -> Rope:
        """Rotary embedding of the queries and keys that the model passes to `KeyValues.attend`."""

    def null_text(self) -> Tensor | None:
        """Rows [text_len, text_dim] of the null caption that the model has learned; None without one."""
        return None

    def text_inputs(self, rows: Tensor, dropped: bool) -> Tensor:
        """Rows [text_rows, text_dim] that passes take of a text's rows [text_len, text_dim].

        dropped: the branch of guidance runs without the prompt.
        """
        return rows

    @abstractmethod
    def embed_text(self, text: Tensor) -> TextContext:
        """Compute what passes need of a prompt, once for all of them, from rows [B, text_rows, text_dim]."""

    def embed_frames(self, channels: Tensor, each_layer: bool = True) -> FrameContext:
        """Compute what passes need of their frames, once for a block, from channels [B, F, frame_channels, H, W].

        Only for models whose `frame_channels` are not 0. each_layer: make the modulation of every layer, too.
        """
        raise NotImplementedError(f"{self.spec.name} takes nothing of a frame beside its latents")

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
        """Predict the velocity [B, F, C, H, W] of latents [B, F, C, H, W]: noise - x0, or as the solver takes it.

        timesteps: [B, F] in 0..1000, as the solver's schedule has them; [B, F, 2] where the solver has step conditions,
        which stand second. actions: [B, F, action_dim], for models that have them: the action that leads to each frame.
        origin: row and column of the first token in the grid of a learned position embedding, for a tile of a picture;
        None for a whole one. Models with `frame_channels` take `frames` besides, a `FrameContext`.
        """
