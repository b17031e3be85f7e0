"""Samplers: the schedule of a `SamplerSpec`, and a solver for each block. Solvers are in `models.solvers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UsageError
from ..models.solvers import CLASSES, Schedule, Solver
from ..schemes.block_schedule import ScheduledBlock, stream_blocks
from ..schemes.guidance import Guidance
from ..schemes.presets import Preset
from ..schemes.sampler_spec import SamplerSpec
from .streams import to_device


class Sampler:
    """Schedule of a `SamplerSpec`; `begin` makes the solver of one block.

    strength: fraction of the noise, in (0, 1], that is added to a given video; it scales the timesteps. UsageError for
    another value, and for one below 1 with a solver that starts from noise alone.
    """

    def __init__(self, spec: SamplerSpec, strength: float = 1.0) -> None:
        if not 0 < strength <= 1:
            raise UsageError(f"strength is {strength}; expected a number above 0, up to 1")
        if strength < 1 and not spec.takes_strength:
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
        return CLASSES[self.spec.solver](self.schedule)

    @cached_property
    def schedule(self) -> Schedule:
        return CLASSES[self.spec.solver].schedule(self.spec, self.strength)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timestep input of the network at each step."""
        return self.schedule.timesteps

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each step."""
        return self.schedule.sigmas


def latent_dtype(spec: SamplerSpec, dtype: torch.dtype) -> torch.dtype:
    """Dtype of latents between steps, of a model in `dtype`."""
    return torch.promote_types(dtype, torch.float32) if spec.wide_latents else dtype


def guided(guidance: Guidance, velocities: Mapping[int, Tensor], timesteps: Sequence[float]) -> Tensor:
    """Join the velocities [..., F, C, H, W] of some branches, by number, of F frames at `timesteps`.

    Branches that are left out have no weight.
    """
    numbers = sorted(velocities)
    joined = velocities[numbers[-1]]
    for number, weaker in reversed(list(pairwise(numbers))):
        scales = [guidance.scales_at(timestep)[number] for timestep in timesteps]
        by_frame = _by_frame(scales, joined) if len(set(scales)) > 1 else scales[0]
        joined = joined + by_frame * (velocities[number] - velocities[weaker])
    return joined


def _by_frame(values: Sequence[float], like: Tensor) -> Tensor:
    """Values [F, 1, 1, 1] of frames in the dtype and on the device of a tensor; the host waits for no copy."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)[:, None, None, None]


def scheduled_blocks(preset: Preset) -> Iterator[ScheduledBlock]:
    """Yield blocks 0, 1, ... of an endless stream of a preset under one prompt, as the engine makes them."""
    sampler = Sampler(preset.sampler)
    return stream_blocks(preset, sampler.timesteps, first=sampler.first.timesteps)
