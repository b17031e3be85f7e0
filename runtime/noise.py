"""Noise of a session: counter-based Philox by default, or given tensors for parity checks.

Draw 0 is the initial noise of a frame; draw s is the noise added before denoising step s.
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
        """Return noise [F, C, H, W] of the absolute latent frames `frames` of block `block`."""


@dataclass(frozen=True)
class PhiloxNoise:
    """Noise as a function of a 64-bit seed and the absolute frame, drawn on `device`; UsageError for a bad seed."""

    seed: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed is {self.seed!r}; expected a whole number of 0 to 2^64 - 1")

    def draw(self, block: int, frames: range, draw: int, shape: tuple[int, int, int]) -> Tensor:
        return philox_normals(self.seed, frames, draw, shape, device=self.device)


@dataclass(frozen=True)
class InjectedNoise:
    """Given noise: initial [F, C, H, W], renoise [blocks, steps-1, F_b, C, H, W].

    first: the first generated frame, at which `initial` starts. `renoise` counts generated blocks from 0. A stream with
    `independent_first_frame` uses the first frame of F_b in block 0, and `steps` is that of the block with most steps.
    UsageError, at a draw, for tensors that are too short or of another shape.
    """

    initial: Tensor
    renoise: Tensor | None = None
    first: int = 0

    def draw(self, block: int, frames: range, draw: int, shape: tuple[int, int, int]) -> Tensor:
        count = len(frames)
        if draw == 0:
            noise = self.initial[frames.start - self.first : frames.stop - self.first]
        elif self.renoise is None:
            raise UsageError("renoise is None; expected noise [blocks, steps-1, F_b, C, H, W] for this sampler")
        else:
            noise = self.renoise[block : block + 1, draw - 1 : draw].flatten(0, 1).flatten(0, 1)
            if frames == range(1):  # a stream's single first frame: the other blocks set F_b
                noise = noise[:1]
        if noise.shape != torch.Size((count, *shape)):
            raise UsageError(
                f"injected noise for block {block}, draw {draw} is {list(noise.shape)}; "
                f"expected {[count, *shape]}: give enough frames and blocks"
            )
        return noise
