"""The solver of MAGI-1: Euler steps from noise, time 0, to clean, time 1, along the network's velocity.

Times of N even steps u are t = s*u^2 / (1 + (s - 1)*u^2) with s = 1 / timestep_shift. With a shift of 3 the quarters
of the steps end at times 0.0217, 0.1, 0.3 and 1. Twelve steps take the first two of four steps of each quarter as one.
Source: MAGI-1 (arXiv 2505.13211); github.com/SandAI-org/MAGI-1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...schemes.sampler_spec import TRAIN_TIMESTEPS, SamplerSpec, SolverRules
from ..solvers import Schedule, Solver, register_solver

MIXED, MIXED_QUARTER = 12, (2, 1, 1)  # steps, and the intervals of a quarter of them, in sixteenths


def intervals(steps: int) -> list[int]:
    """Length of each step; they sum to the number of even steps that they are made of."""
    return list(MIXED_QUARTER) * 4 if steps == MIXED else [1] * steps


def times(steps: int, shift: float) -> list[float]:
    """Times before each step, and 1 after the last."""
    lengths, values = intervals(steps), []
    for index in range(steps + 1):
        square = (sum(lengths[:index]) / sum(lengths)) ** 2
        values.append(square / shift / (1 + (1 / shift - 1) * square))
    return values


def step_condition(steps: int, step: int) -> float:
    """Step condition of a distilled network: half the number of steps of its length from noise to clean."""
    lengths = intervals(steps)
    return sum(lengths) / lengths[step] / 2


@register_solver
class MagiSolver(Solver):
    """Euler steps; the timestep is 1000 times the time, and the noise level 1 less it."""

    name = "magi-euler"
    rules = SolverRules(step_list=False, to_clean=True)

    @classmethod
    def schedule(cls, spec: SamplerSpec, strength: float) -> Schedule:
        grid = times(spec.num_steps, spec.timestep_shift)[:-1]
        return Schedule(tuple(TRAIN_TIMESTEPS * time for time in grid), tuple(1 - time for time in grid))

    def advance(self, x: Tensor, velocity: Tensor, step: int, draw: Callable[[], Tensor]) -> Tensor:
        """Return the latents at step + 1, in float32 or better between; `draw` is not called."""
        after = self.sigmas[step + 1] if step + 1 < len(self.sigmas) else 0.0
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) + (self.sigmas[step] - after) * velocity.to(dtype)).to(x.dtype)


@register_solver
class DistilledMagiSolver(MagiSolver):
    """The same steps, of which the network is given the length, too."""

    name = "magi-distilled"
    rules = SolverRules(step_list=False, condition=step_condition, to_clean=True)
