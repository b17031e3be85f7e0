"""Where a session's noise comes from: the counter-based default, or tensors injected for parity checks.

Draw 0 is a frame's initial noise; draw s is the noise that is added before denoising step s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UsageError
from ..kernels.philox import philox_normals


class Noise(Protocol):
    def draw(self, block: int, frames: range, draw: int, shape: tuple[int, int, int]) -> Tensor:
        """Noise [F, C, H, W] of absolute latent frames `frames`, which are those of block `block`."""


@dataclass(frozen=True)
class PhiloxNoise:
    """Noise as a function of the seed (64 bits) and the absolute frame, drawn on `device`."""

    seed: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed is {self.seed!r}; expected a whole number of 0 to 2^64 - 1")

    def draw(self, block: int, frames: range, draw: int, shape: tuple[int, int, int]) -> Tensor:
        return philox_normals(self.seed, frames, draw, shape, device=self.device)


@dataclass(frozen=True)
class InjectedNoise:
    """Given noise: initial [F, C, H, W] from frame `first`, renoise [blocks, steps-1, F_b, C, H, W].

    `first` is the first frame that is generated; `renoise` counts generated blocks from 0.
    """

    initial: Tensor
    renoise: Tensor | None = None
    first: int = 0

    def draw(self, block: int, frames: range, draw: int, shape: tuple[int, int, int]) -> Tensor:
        if draw == 0:
            found = self.initial[frames.start - self.first : frames.stop - self.first]
        elif self.renoise is None:
            raise UsageError("injected noise has no renoise tensor; expected [blocks, steps-1, F_b, C, H, W]")
        else:
            found = self.renoise[block : block + 1, draw - 1 : draw].flatten(0, 1).flatten(0, 1)
        if found.shape != torch.Size((len(frames), *shape)):
            raise UsageError(
                f"injected noise for block {block}, draw {draw} is {list(found.shape)}; "
                f"expected {[len(frames), *shape]}: give enough frames and blocks"
            )
        return found
