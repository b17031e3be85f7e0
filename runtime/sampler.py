"""The few-step sampler of the causal Wan models: which timesteps, and how x0 and re-noising are computed.

Every step predicts x0 and starts again from it with fresh noise; it is no ODE solver. The schedule is the
shifted flow-matching table of 1000 entries, float32 and unrounded.
Source: Self-Forcing (arXiv 2506.08009); flow matching with a timestep shift as in Wan 2.1 (arXiv 2503.20314).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UsageError

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class SamplerSpec:
    """How a block is denoised.

    denoising_step_list: entries of 0..1000, descending; with `warp_denoising_step` they are places in the
    schedule, else timesteps. timestep_shift: S of sigma' = S*s / (1 + (S-1)*s). context_noise: the timestep
    told to the network in the pass that commits the clean block (no noise is added).
    """

    denoising_step_list: tuple[float, ...]
    warp_denoising_step: bool
    timestep_shift: float
    context_noise: float

    def __post_init__(self) -> None:
        steps = self.denoising_step_list
        if not steps or list(steps) != sorted(set(steps), reverse=True) or steps[0] > 1000 or steps[-1] <= 0:
            raise UsageError(f"denoising_step_list {list(steps)} must descend within 1000..0, 0 left out")
        if self.warp_denoising_step and any(step != int(step) for step in steps):
            raise UsageError(f"denoising_step_list {list(steps)} must hold whole numbers to be warped")
        if not self.timestep_shift > 0:
            raise UsageError(f"timestep_shift is {self.timestep_shift}; expected a number above 0")
        if not 0 <= self.context_noise <= TRAIN_TIMESTEPS:
            raise UsageError(f"context_noise is {self.context_noise}; expected a timestep in 0..1000")


class Sampler:
    """The schedule of a `SamplerSpec`, and its two formulas."""

    def __init__(self, spec: SamplerSpec) -> None:
        self.spec = spec

    @cached_property
    def table_sigmas(self) -> Tensor:
        """float32 [1000], descending from 1."""
        base = torch.linspace(1, 0, TRAIN_TIMESTEPS + 1)[:-1]
        shift = self.spec.timestep_shift
        return shift * base / (1 + (shift - 1) * base)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told at each step, float32 values."""
        if not self.spec.warp_denoising_step:
            return tuple(float(step) for step in self.spec.denoising_step_list)
        table = torch.cat((self.table_sigmas * TRAIN_TIMESTEPS, torch.zeros(1)))
        return tuple(float(table[TRAIN_TIMESTEPS - int(step)]) for step in self.spec.denoising_step_list)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The noise level of each step: that of the table entry whose timestep is nearest."""
        return tuple(self.sigma_at(timestep) for timestep in self.timesteps)

    def sigma_at(self, timestep: float) -> float:
        nearest = (self.table_sigmas * TRAIN_TIMESTEPS - timestep).abs().argmin()
        return float(self.table_sigmas[nearest])

    def clean(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """x0 = x - sigma * v, in float64, returned in x's dtype."""
        return (x.double() - self.sigmas[step] * velocity.double()).to(x.dtype)

    def renoise(self, x0: Tensor, noise: Tensor, step: int) -> Tensor:
        """(1 - sigma) * x0 + sigma * noise at the level of `step`, in float32 or better."""
        sigma = torch.tensor(self.sigmas[step], dtype=torch.promote_types(x0.dtype, torch.float32))
        return ((1 - sigma) * x0.to(sigma.dtype) + sigma * noise.to(sigma.dtype)).to(x0.dtype)
