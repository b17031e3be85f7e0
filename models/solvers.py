"""Solvers take a block from one noise level to the next. `register_solver` adds one.

`renoise` predicts x0 and adds fresh noise to it; `unipc` is a deterministic multistep solver. A solver owns the
schedule of its steps, its history between them, and the forms of that history in a saved session and in a block graph.
Source: Self-Forcing (arXiv 2506.08009); UniPC (arXiv 2302.04867); the flow-matching shift of Wan 2.1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import UsageError, quoted
from ..schemes.sampler_spec import SOLVERS, TRAIN_TIMESTEPS, SamplerSpec, SolverRules


@dataclass(frozen=True)
class Schedule:
    """Steps of a block: the network's timestep and the noise level (sigma) at each.

    noise_sigmas: level of the noise that leads to each step, where it is another than the one x0 is predicted with.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    noise_sigmas: tuple[float, ...] = ()

    @property
    def added(self) -> tuple[float, ...]:
        """Level of the noise that leads to each step."""
        return self.noise_sigmas or self.sigmas


class Solver(ABC):
    """Solver of one block, with the block's history of steps.

    name: what `SamplerSpec.solver` says. rules: the settings that it takes. saved_numbers: integers of a saved block.
    """

    name: ClassVar[str]
    rules: ClassVar[SolverRules]
    saved_numbers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, schedule: Schedule) -> None:
        self.schedule_of_block, self.sigmas = schedule, schedule.sigmas

    @classmethod
    @abstractmethod
    def schedule(cls, spec: SamplerSpec, strength: float) -> Schedule:
        """Compute the steps of a block. strength: fraction of the noise that is added to a given video, 1 for none."""

    @abstractmethod
    def advance(self, x: Tensor, velocity: Tensor, step: int, draw: Callable[[], Tensor]) -> Tensor:
        """Return the latents at step + 1, clean after the last step; `draw` returns noise of their shape."""

    def fork(self) -> Self:
        """Return a copy that goes on by itself; tensors are shared and never written."""
        return copy(self)

    # History in a saved session

    def save(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Return the history as integers, by the names in `saved_numbers`, and tensors."""
        return {}, {}

    @classmethod
    def number_range(cls, name: str, checked: Mapping[str, int]) -> tuple[int, int]:
        """Least and largest value of an integer; `checked`: those before it in `saved_numbers`."""
        raise AssertionError(f"{cls.name} saves no {name}")

    @classmethod
    def saved_tensors(cls, numbers: Mapping[str, int]) -> tuple[str, ...]:
        """Names of the tensors of a history with these integers, each of the latents' shape."""
        return ()

    def restore(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Put back what `save` returned."""

    # History in a block graph

    def reads(self, step: int) -> tuple[str, ...]:
        """Names of the values of earlier steps that a step reads, each in float32 or better."""
        return ()

    def resume(self, step: int, values: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restore the state before a step from the values in `reads`."""

    def written(self, step: int) -> dict[str, Tensor]:
        """Return the values that later steps read of a step, by name."""
        return {}

    @property
    def keeps_history(self) -> bool:
        """True if a step reads values of earlier ones."""
        return any(self.reads(step) for step in range(len(self.sigmas)))


CLASSES: dict[str, type[Solver]] = {}


def register_solver(solver: type[Solver]) -> type[Solver]:
    """Add a solver, which presets then name. UsageError for a name that is taken."""
    if solver.name in CLASSES:
        raise UsageError(f"solver {quoted(solver.name)} is registered already; give another name")
    CLASSES[solver.name] = solver
    assert SOLVERS.setdefault(solver.name, solver.rules) == solver.rules
    return solver


def shifted(spec: SamplerSpec, sigmas: Tensor) -> Tensor:
    """Shift noise levels: S*s / (1 + (S-1)*s) with S the spec's `timestep_shift`."""
    return spec.timestep_shift * sigmas / (1 + (spec.timestep_shift - 1) * sigmas)


def table_sigmas(spec: SamplerSpec) -> Tensor:
    """Noise levels of all training timesteps: float32 [1000], descending from `sigma_max`."""
    return shifted(spec, torch.linspace(spec.sigma_max, 0, TRAIN_TIMESTEPS + 1)[:-1])


def truncated_schedule(spec: SamplerSpec, steps: Sequence[float]) -> Schedule:
    """Steps of a table whose timesteps are whole numbers, of which several rows may share one.

    The table is computed in float64 from a first level in float32, and stored in float32.
    """
    first = float(torch.tensor(spec.sigma_max, dtype=torch.float32))
    sigmas = shifted(spec, torch.linspace(first, 0, TRAIN_TIMESTEPS + 1, dtype=torch.float64)[:-1])
    timesteps = (sigmas * TRAIN_TIMESTEPS).long()
    chosen = [int(timesteps[TRAIN_TIMESTEPS - int(step)]) for step in steps]
    rows = [(timesteps == timestep).nonzero().flatten().tolist() for timestep in chosen]
    levels = sigmas.to(torch.float32)
    return Schedule(
        tuple(map(float, chosen)),
        tuple(float(levels[alike[0]]) for alike in rows),
        tuple(float(levels[alike[min(1, len(alike) - 1)]]) for alike in rows),
    )


def noised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return (1 - sigma) * x0 + sigma * noise in x0's dtype, computed in float32 or better."""
    level = torch.tensor(sigma, dtype=torch.promote_types(x0.dtype, torch.float32))
    return ((1 - level) * x0.to(level.dtype) + level * noise.to(level.dtype)).to(x0.dtype)


@register_solver
class RenoiseSolver(Solver):
    """Predicts x0 from the velocity and adds fresh noise of the next level; keeps no history."""

    name = "renoise"
    rules = SolverRules(step_list=True)

    @classmethod
    def schedule(cls, spec: SamplerSpec, strength: float) -> Schedule:
        """Timesteps of the step list, and the noise level of the table entry nearest to each."""
        steps, sigmas = [step * strength for step in spec.denoising_step_list], table_sigmas(spec)
        if spec.table == "truncated":
            return truncated_schedule(spec, steps)
        if spec.warp_denoising_step:
            table = torch.cat((sigmas * TRAIN_TIMESTEPS, torch.zeros(1)))
            steps = [float(table[TRAIN_TIMESTEPS - int(step)]) for step in steps]
        nearest = [(sigmas * TRAIN_TIMESTEPS - timestep).abs().argmin() for timestep in steps]
        return Schedule(tuple(steps), tuple(float(sigmas[index]) for index in nearest))

    def advance(self, x: Tensor, velocity: Tensor, step: int, draw: Callable[[], Tensor]) -> Tensor:
        x0 = (x.double() - self.sigmas[step] * velocity.double()).to(x.dtype)
        return x0 if step + 1 == len(self.sigmas) else noised(x0, draw(), self.schedule_of_block.added[step + 1])


@register_solver
class UniPCSolver(Solver):
    """UniPC of order 2 (B(h) = e^h - 1, predicting x0), the last step of order 1, down to sigma 0.

    Each step corrects the latents with the new velocity (UniC), then predicts the next ones (UniP). predictions: x0 of
    the last two steps. before: corrected latents of the last step. order: of the last prediction.
    """

    name = "unipc"
    rules = SolverRules(step_list=False, partial=True)
    saved_numbers = ("predictions", "order")

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.predictions: list[Tensor] = []
        self.before: Tensor | None = None
        self.order = 1

    @classmethod
    def schedule(cls, spec: SamplerSpec, strength: float) -> Schedule:
        """Noise levels evenly spaced before the shift, from a share of the highest on, and whole timesteps."""
        highest = strength * (1 - 1 / TRAIN_TIMESTEPS)
        even = torch.linspace(highest, 0, spec.num_steps + 1, dtype=torch.float64)[:-1]
        sigmas = tuple(shifted(spec, even).tolist())
        return Schedule(tuple(float(int(sigma * TRAIN_TIMESTEPS)) for sigma in sigmas), sigmas)

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

    def save(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        tensors = {f"x0.{number}": x0 for number, x0 in enumerate(self.predictions)}
        if self.before is not None:
            tensors["before"] = self.before
        return {"order": self.order, "predictions": len(self.predictions)}, tensors

    @classmethod
    def number_range(cls, name: str, checked: Mapping[str, int]) -> tuple[int, int]:
        return (0, 2) if name == "predictions" else (1, max(1, checked["predictions"]))

    @classmethod
    def saved_tensors(cls, numbers: Mapping[str, int]) -> tuple[str, ...]:
        count = numbers["predictions"]
        return (*(f"x0.{number}" for number in range(count)), *(["before"] if count else []))

    def restore(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        self.order, self.before = numbers["order"], tensors.get("before")
        self.predictions = [tensors[f"x0.{number}"] for number in range(numbers["predictions"])]

    def reads(self, step: int) -> tuple[str, ...]:
        earlier = range(max(0, step - 2), step)
        return (*(f"x0@{number}" for number in earlier), *([f"corrected@{step - 1}"] if step else []))

    def resume(self, step: int, values: Mapping[str, Tensor]) -> None:
        if step > 0:
            *predictions, self.before = (values[name] for name in self.reads(step))
            self.predictions = predictions
            self.order = min(2, len(self.sigmas) - step + 1, len(predictions))

    def written(self, step: int) -> dict[str, Tensor]:
        assert self.before is not None
        return {f"x0@{step}": self.predictions[-1], f"corrected@{step}": self.before}

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
