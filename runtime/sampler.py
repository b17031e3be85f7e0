"""Samplers: the timesteps of a schedule, and solvers that take a block from one noise level to the next.

`renoise` predicts x0 and adds fresh noise to it; `unipc` is a deterministic multistep solver.
Source: Self-Forcing (arXiv 2506.08009); UniPC (arXiv 2302.04867); the flow-matching shift of Wan 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UsageError
from ..schemes.block_schedule import ScheduledBlock, stream_blocks
from ..schemes.presets import Preset
from ..schemes.sampler_spec import TRAIN_TIMESTEPS, SamplerSpec


class Sampler:
    """Schedule of a `SamplerSpec`; `begin` makes the solver of one block.

    strength: fraction of the noise, in (0, 1], that is added to a given video; it scales the timesteps. UsageError for
    another value, and for one below 1 with a solver other than `renoise`.
    """

    def __init__(self, spec: SamplerSpec, strength: float = 1.0) -> None:
        if not 0 < strength <= 1:
            raise UsageError(f"strength is {strength}; expected a number above 0, up to 1")
        if strength < 1 and spec.solver != "renoise":
            raise UsageError(f"strength is {strength}, but solver {spec.solver} starts from noise; leave it at 1")
        self.spec, self.strength = spec, strength

    def of_block(self, index: int) -> Sampler:
        """The sampler of generated block `index`: this one, unless block 0 has a step list of its own."""
        return self.first if index == 0 else self

    @cached_property
    def first(self) -> Sampler:
        steps = self.spec.denoising_step_list_first_chunk
        if not steps:
            return self
        spec = replace(self.spec, denoising_step_list=steps, denoising_step_list_first_chunk=())
        return Sampler(spec, self.strength)

    def begin(self) -> Solver:
        """Make a solver for one block; it has the block's history of steps."""
        return UniPCSolver(self.sigmas) if self.spec.solver == "unipc" else RenoiseSolver(self.sigmas)

    @cached_property
    def table_sigmas(self) -> Tensor:
        """Noise levels of all training timesteps: float32 [1000], descending from 1."""
        return self.shifted(torch.linspace(1, 0, TRAIN_TIMESTEPS + 1)[:-1])

    def shifted(self, sigmas: Tensor) -> Tensor:
        shift = self.spec.timestep_shift
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep input of the network at each step: float32 values; for `unipc` whole numbers."""
        if self.spec.solver == "unipc":
            return tuple(float(int(sigma * TRAIN_TIMESTEPS)) for sigma in self.sigmas)
        steps = [step * self.strength for step in self.spec.denoising_step_list]
        if not self.spec.warp_denoising_step:
            return tuple(steps)
        table = torch.cat((self.table_sigmas * TRAIN_TIMESTEPS, torch.zeros(1)))
        return tuple(float(table[TRAIN_TIMESTEPS - int(step)]) for step in steps)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each step; for `renoise`, that of the table entry with the nearest timestep."""
        if self.spec.solver == "unipc":
            even = torch.linspace(1 - 1 / TRAIN_TIMESTEPS, 0, self.spec.num_steps + 1, dtype=torch.float64)[:-1]
            return tuple(self.shifted(even).tolist())
        return tuple(self.sigma_at(timestep) for timestep in self.timesteps)

    def sigma_at(self, timestep: float) -> float:
        nearest = (self.table_sigmas * TRAIN_TIMESTEPS - timestep).abs().argmin()
        return float(self.table_sigmas[nearest])


def scheduled_blocks(preset: Preset) -> Iterator[ScheduledBlock]:
    """Yield blocks 0, 1, ... of an endless stream of a preset under one prompt, as the engine makes them."""
    sampler = Sampler(preset.sampler)
    return stream_blocks(preset, sampler.timesteps, first=sampler.first.timesteps)


def noised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return (1 - sigma) * x0 + sigma * noise in x0's dtype, computed in float32 or better."""
    level = torch.tensor(sigma, dtype=torch.promote_types(x0.dtype, torch.float32))
    return ((1 - level) * x0.to(level.dtype) + level * noise.to(level.dtype)).to(x0.dtype)


@dataclass
class RenoiseSolver:
    """Predicts x0 from the velocity and adds fresh noise of the next level; keeps no history."""

    sigmas: tuple[float, ...]

    def advance(self, x: Tensor, velocity: Tensor, step: int, draw: Callable[[], Tensor]) -> Tensor:
        """Return the latents at step + 1, clean after the last step; `draw` returns noise of their shape."""
        x0 = (x.double() - self.sigmas[step] * velocity.double()).to(x.dtype)
        return x0 if step + 1 == len(self.sigmas) else noised(x0, draw(), self.sigmas[step + 1])


@dataclass
class UniPCSolver:
    """UniPC of order 2 (B(h) = e^h - 1, predicting x0), the last step of order 1, down to sigma 0.

    Each step corrects the latents with the new velocity (UniC), then predicts the next ones (UniP).
    """

    sigmas: tuple[float, ...]
    predictions: list[Tensor] = field(default_factory=list)  # x0 of the last two steps
    before: Tensor | None = None  # corrected latents of the last step
    order: int = 1  # of the last prediction

    def advance(self, x: Tensor, velocity: Tensor, step: int, draw: Callable[[], Tensor]) -> Tensor:
        """Return the latents at step + 1, clean after the last step; `draw` is not called."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        here = x.to(dtype)
        x0 = here - self.sigmas[step] * velocity.to(dtype)
        if self.before is not None:
            here = self._move(self.before, step - 1, self.order, x0)
        self.predictions = [*self.predictions[-1:], x0]
        self.order = min(2, len(self.sigmas) - step, len(self.predictions))
        self.before = here
        return self._move(here, step, self.order, None).to(x.dtype)

    def _move(self, x: Tensor, step: int, order: int, corrected_by: Tensor | None) -> Tensor:
        """Move x from the level of `step` to the next: a prediction, or a correction with x0 at that level."""
        target = self.sigmas[step + 1] if step + 1 < len(self.sigmas) else 0.0
        source = self.sigmas[step]
        if target == 0.0:
            return self.predictions[-1]
        h = log_snr(target) - log_snr(source)
        scale = math.expm1(-h)
        x0 = self.predictions[-1]
        moved = target / source * x - (1 - target) * scale * x0
        slopes, ratios = [], []
        if order == 2:
            ratios.append((log_snr(self.sigmas[step - 1]) - log_snr(source)) / h)
            slopes.append((self.predictions[-2] - x0) / ratios[0])
        if corrected_by is not None:
            slopes.append(corrected_by - x0)
        weights = correction_weights(h, ratios) if corrected_by is not None else [0.5] * len(slopes)
        rest = sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), torch.zeros_like(x0))
        return moved - (1 - target) * scale * rest


def log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def correction_weights(h: float, ratios: list[float]) -> list[float]:
    """Weights of UniC: 1/2 at order 1, else the solution of its 2x2 system."""
    if not ratios:
        return [0.5]
    first = math.expm1(-h) / -h - 1
    second = first / -h - 0.5
    total, weighted = first / math.expm1(-h), 2 * second / math.expm1(-h)
    earlier = (total - weighted) / (1 - ratios[0])
    return [earlier, total - earlier]


Solver = RenoiseSolver | UniPCSolver
