"""The warp-specialised kernel in a simulator: right under any order of its warps, and wrong tables and sources found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install triton")

from checker import changed, check
from gluon_simulator import Deadlock, Race, Simulated

from inferix.errors import UsageError
from inferix.kernels import block_attention
from inferix.kernels.block_attention import SPEC, hopper
from inferix.kernels.block_attention.reference import sizes
from inferix.kernels.block_attention.schedule import Schedule, Step, make_schedule
from inferix.kernels.spec import Case, using
from inferix.kernels.tuning import choose

FORM = SPEC.form("hopper")
TWO_ITEMS = Case("two heads", sizes(1, 20, 2, 200, 2, 1, 128), {"lse": True, "sinks": 1})
CASES = [
    *(case for case in SPEC.test_cases if not case.options.get("fp8") and case["dim"] == 128 and case["page_tokens"] >= 128),
    Case("pages of one tile", sizes(1, 129, 3, 128, 1, 1, 128), {"order": "one"}),
    Case("unequal rows", sizes(3, 9, 4, 150, 2, 1, 128), {"sinks": 2, "order": "one", "lse": True}),
]


@pytest.fixture
def simulated(monkeypatch):
    """Simulate the kernel, in a number of programs, from a seed that orders its warps, over another schedule if given."""

    def simulate(module=hopper, programs=1, seed=0, schedule=None):
        monkeypatch.setattr(module, "programs_at_once", lambda device: programs)
        kernel = Simulated(module, "_attend", seed)
        monkeypatch.setattr(module, "_attend", kernel)
        if schedule is not None:
            monkeypatch.setattr(module, "schedule_of", lambda stages, groups: schedule)
        return kernel

    return simulate


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_equals_the_reference(case, programs, simulated):
    kernel = simulated(programs=programs, seed=programs)
    check(SPEC, hopper.block_attention, case, torch.bfloat16)
    assert kernel.launches == 1


@pytest.mark.parametrize("stages", [1, 3])
def test_other_depths_of_the_rings_are_right(stages, simulated):
    simulated(schedule=make_schedule(stages, hopper.GROUPS))
    check(SPEC, hopper.block_attention, TWO_ITEMS, torch.bfloat16)


def with_steps(schedule: Schedule, part: str, steps: list[Step]) -> Schedule:
    parts = tuple((name, tuple(steps) if name == part else kept) for name, kept in schedule.parts)
    return replace(schedule, parts=parts)


def wrong_schedules() -> dict[str, Schedule]:
    """A schedule for every step dropped, every phase flipped, every number of arrivals off, and for pairs in disorder."""
    right, wrong = make_schedule(2, hopper.GROUPS), {}
    for part, steps in right.parts:
        for at, step in enumerate(steps):
            name, rest = f"{part}: {step.does} {step.on}".rstrip(), [*steps[:at], *steps[at + 1 :]]
            wrong[f"{name} dropped"] = with_steps(right, part, rest)
            if step.does == "wait":
                flipped = replace(step, phase=1 - step.phase)
                wrong[f"{name}, phase flipped"] = with_steps(right, part, [*steps[:at], flipped, *steps[at + 1 :]])
            if step.does == "arrive":
                wrong[f"{name} twice"] = with_steps(right, part, [*steps[:at], step, *steps[at:]])
            if step.does == "arrive" and at and steps[at - 1].does == "ready":
                early = [*steps[: at - 1], step, steps[at - 1], *steps[at + 1 :]]
                wrong[f"{name} before the product is complete"] = with_steps(right, part, early)
            if step.back:
                late = replace(step, back=0)
                wrong[f"{name} of the current tile"] = with_steps(right, part, [*steps[:at], late, *steps[at + 1 :]])
            if step.left:
                sooner = replace(step, left=step.left + 1)
                wrong[f"{name} with one more in flight"] = with_steps(right, part, [*steps[:at], sooner, *steps[at + 1 :]])
    for at, barrier in enumerate(right.barriers):
        for change in (-1, 1):
            other = replace(barrier, arrivals=barrier.arrivals + change)
            barriers = (*right.barriers[:at], other, *right.barriers[at + 1 :])
            wrong[f"{barrier.name} with {other.arrivals} arrivals"] = replace(right, barriers=barriers)
    return wrong


WRONG_SCHEDULES = wrong_schedules()


@pytest.mark.parametrize("name", WRONG_SCHEDULES)
def test_a_wrong_schedule_is_found(name, simulated):
    simulated(schedule=WRONG_SCHEDULES[name])
    with pytest.raises((AssertionError, UnboundLocalError)) as caught:
        check(SPEC, hopper.block_attention, TWO_ITEMS, torch.bfloat16)
    print(type(caught.value).__name__, caught.value)
