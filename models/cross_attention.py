"""Cross-attention to a prompt's keys and values: what a model calls, and a pass whose frames follow several prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TextKeyValues(Protocol):
    """Cross-attention keys and values of a prompt, in all layers."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend to the prompt: q and the result [B, T, n, c]."""

    def pooled(self, frames: int) -> Tensor:
        """The pooled text of `frames` frames [B, frames, d], for models that have one."""


@dataclass(frozen=True)
class TextByFrames:
    """Several prompts in one pass. parts: (latent frames, prompt that they attend to), in token order."""

    parts: Sequence[tuple[int, TextKeyValues]]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attend to the prompt of each frame: q and the result [B, T, n, c]."""
        tokens = q.shape[1] // sum(frames for frames, _ in self.parts)
        queries = q.split([frames * tokens for frames, _ in self.parts], dim=1)
        return torch.cat([text.attend(layer, part) for part, (_, text) in zip(queries, self.parts, strict=True)], dim=1)

    def pooled(self, frames: int) -> Tensor:
        """The pooled text of each frame [B, frames, d]."""
        return torch.cat([text.pooled(count) for count, text in self.parts], dim=1)
