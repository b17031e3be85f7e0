"""How a block is denoised, as data: step list or number of steps, shift, solver and guidance. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError

TRAIN_TIMESTEPS = 1000
SOLVERS = ("renoise", "unipc")


@dataclass(frozen=True)
class SamplerSpec:
    """How a block is denoised.

    denoising_step_list (renoise): entries of 0..1000, descending; with `warp_denoising_step` they are places in
    the schedule, else timesteps. num_steps (unipc): steps evenly spaced before the shift.
    timestep_shift: S of sigma' = S*s / (1 + (S-1)*s). context_noise: the timestep told to the network in the
    pass that commits the clean block (no noise is added). guidance_scale: 1 runs the prompt alone; otherwise
    v = u + scale * (c - u), with a cache for each of the two.
    """

    denoising_step_list: tuple[float, ...]
    warp_denoising_step: bool
    timestep_shift: float
    context_noise: float
    solver: str = "renoise"
    num_steps: int = 0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        steps = self.denoising_step_list
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {self.solver!r}; expected one of {', '.join(SOLVERS)}")
        if self.solver == "unipc" and self.num_steps < 1:
            raise UsageError(f"num_steps is {self.num_steps}; expected 1 or more")
        if self.solver == "renoise" and (
            not steps or list(steps) != sorted(set(steps), reverse=True) or steps[0] > 1000 or steps[-1] < 0
        ):
            raise UsageError(f"denoising_step_list {list(steps)} must be numbers that descend within 1000..0")
        if self.warp_denoising_step and any(step != int(step) for step in steps):
            raise UsageError(f"denoising_step_list {list(steps)} must hold whole numbers to be warped")
        if not self.timestep_shift > 0:
            raise UsageError(f"timestep_shift is {self.timestep_shift}; expected a number above 0")
        if not 0 <= self.context_noise <= TRAIN_TIMESTEPS:
            raise UsageError(f"context_noise is {self.context_noise}; expected a timestep in 0..1000")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UsageError(f"guidance_scale is {self.guidance_scale}; expected 0 or more, 1 for none")

    @property
    def steps(self) -> int:
        """Denoising passes of a block."""
        return self.num_steps if self.solver == "unipc" else len(self.denoising_step_list)
