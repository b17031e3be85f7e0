"""How a block is denoised, as data: step list or number of steps, shift, solver and guidance. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UsageError, quoted
from .guidance import Guidance, classifier_free, experts

TRAIN_TIMESTEPS = 1000
TABLES = ("exact", "truncated")


@dataclass(frozen=True)
class SolverRules:
    """Settings that a solver takes. step_list: its steps are `denoising_step_list`, from any noise level on; otherwise
    it makes `num_steps` steps, from pure noise or, with `partial`, from any noise level on.

    to_clean: the network's velocity leads from noise to clean latents, and its timesteps ascend with it, as MAGI-1's
    do; otherwise both are those of noise.
    condition: (num_steps, step) to what the network is given of that step besides its timestep, as distilled ones are;
    None where it is given the timestep only.
    """

    step_list: bool
    condition: Callable[[int, int], float] | None = None
    to_clean: bool = False
    partial: bool = False


SOLVERS: dict[str, SolverRules] = {
    "renoise": SolverRules(step_list=True), "unipc": SolverRules(step_list=False, partial=True)
}  # fmt: skip
STANDARD_SOLVERS = tuple(SOLVERS)  # others are known once the package of a model family is imported


@dataclass(frozen=True)
class SamplerSpec:
    """How a block is denoised.

    solver: a name in `SOLVERS`. denoising_step_list (solvers with a step list): entries of 0..1000, descending; with
    `warp_denoising_step` they are places in the schedule, else timesteps. denoising_step_list_first_chunk: the list of
    the first generated block where it has one of its own, as models of one or two steps do (Causal-Forcing++, arXiv
    2605.15141).
    num_steps (other solvers): steps evenly spaced before the shift. timestep_shift: S of sigma' = S*s / (1 + (S-1)*s).
    context_noise: the network's timestep in the pass that commits the clean block (no noise is added).
    sigma_max: noise level at which the table of 1000 training timesteps begins, before the shift. table: `exact`, or
    `truncated` to whole timesteps, of which several rows share one: x0 then takes the level of the first such row, and
    noise is added at that of the second, as FlowMatch schedulers look rows up.
    guidance_scale: 1 runs the prompt alone; otherwise v = u + scale * (c - u), with a cache for each of the two.
    guidance: any other guidance; None for that of `guidance_scale`.
    boundary_ratio: noise level from which on a model's expert for high noise runs, and below it the one for low noise;
    0 for a model of one transformer.
    wide_latents: latents are in float32 or better from step to step, also where the model's dtype is narrower.
    noise_scale: standard deviation of the noise that a block starts from; 1 is what models are trained with. A little
    more brings more things into new places, where few steps average them away. Frames at rest (the model's first
    action) show nothing new and keep 1.
    """

    denoising_step_list: tuple[float, ...]
    warp_denoising_step: bool
    timestep_shift: float
    context_noise: float
    solver: str = "renoise"
    num_steps: int = 0
    guidance_scale: float = 1.0
    denoising_step_list_first_chunk: tuple[float, ...] = ()
    guidance: Guidance | None = None
    boundary_ratio: float = 0.0
    sigma_max: float = 1.0
    table: str = "exact"
    wide_latents: bool = False
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        steps = self.denoising_step_list
        rules = self.rules
        if not self.has_step_list and self.num_steps < 1:
            raise UsageError(f"num_steps is {self.num_steps}; expected 1 or more")
        if self.has_step_list:
            self.check_steps("denoising_step_list", steps)
        if self.denoising_step_list_first_chunk:
            self.check_steps("denoising_step_list_first_chunk", self.denoising_step_list_first_chunk)
            if not self.has_step_list:
                raise UsageError(
                    f"denoising_step_list_first_chunk is given, but solver {self.solver} has no step list; leave it out"
                )
        if not self.timestep_shift > 0:
            raise UsageError(f"timestep_shift is {self.timestep_shift}; expected a number above 0")
        if not 0 < self.sigma_max <= 1:
            raise UsageError(f"sigma_max is {self.sigma_max}; expected a number above 0, up to 1")
        if not 0 < self.noise_scale <= 2:
            raise UsageError(f"noise_scale is {self.noise_scale}; expected a number above 0, up to 2")
        if self.table not in TABLES:
            raise UsageError(f"table is {quoted(self.table)}; expected one of {', '.join(TABLES)}")
        if self.table != "exact" and not self.warp_denoising_step:
            raise UsageError(f"table is {quoted(self.table)}, but warp_denoising_step is false; the steps are no rows")
        if not 0 <= self.context_noise <= TRAIN_TIMESTEPS:
            raise UsageError(f"context_noise is {self.context_noise}; expected a timestep in 0..1000")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UsageError(f"guidance_scale is {self.guidance_scale}; expected 0 or more, 1 for none")
        if self.guidance is not None and self.guidance_scale != 1:
            raise UsageError(f"guidance_scale is {self.guidance_scale}, but guidance has its own scales; leave it at 1")
        if not 0 <= self.boundary_ratio < 1:
            raise UsageError(f"boundary_ratio is {self.boundary_ratio}; expected 0 or more and less than 1")
        if self.boundary_ratio and (self.guidance_scale != 1 or self.guidance is not None):
            raise UsageError(
                f"boundary_ratio is {self.boundary_ratio} with guidance (guidance_scale {self.guidance_scale}); the "
                "experts are branches of guidance: leave guidance_scale at 1"
            )
        if self.boundary_ratio and rules.to_clean:
            raise UsageError(
                f"boundary_ratio is {self.boundary_ratio}, but timesteps of solver {self.solver} ascend; set it to 0"
            )

    def check_steps(self, name: str, steps: tuple[float, ...]) -> None:
        """UsageError, which names the setting, unless `steps` is a list that the schedule has."""
        if not steps or list(steps) != sorted(set(steps), reverse=True) or steps[0] > 1000 or steps[-1] < 0:
            raise UsageError(f"{name} {list(steps)} must be numbers that descend within 1000..0")
        if self.warp_denoising_step and any(step != int(step) for step in steps):
            raise UsageError(f"{name} {list(steps)} must hold whole numbers to be warped")

    @property
    def rules(self) -> SolverRules:
        """Settings that its solver takes; UsageError for one that is not known."""
        if self.solver not in SOLVERS:
            raise UsageError(f"solver is {quoted(self.solver)}; expected one of {', '.join(SOLVERS)}")
        return SOLVERS[self.solver]

    @property
    def guide(self) -> Guidance:
        """The guidance in force."""
        if self.boundary_ratio:
            return experts(TRAIN_TIMESTEPS * self.boundary_ratio)
        return classifier_free(self.guidance_scale) if self.guidance is None else self.guidance

    def condition(self, step: int) -> float | None:
        """Condition of a step that the network takes besides its timestep; None for none."""
        rule = self.rules.condition
        return None if rule is None else rule(self.steps, step)

    @property
    def takes_strength(self) -> bool:
        """True if a block can start from a video with less noise than all."""
        return self.rules.step_list or self.rules.partial

    @property
    def has_step_list(self) -> bool:
        """True if the steps are those of `denoising_step_list`."""
        return self.rules.step_list

    @property
    def steps(self) -> int:
        """Denoising passes of a block; the first block may have others, `denoising_step_list_first_chunk`."""
        return len(self.denoising_step_list) if self.has_step_list else self.num_steps
