"""Plans never let two live buffers meet, and a program on its planned arena gives what the function gives."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import bound, result, traced
from torch import Tensor

from inferix.graphs import plan
from inferix.graphs.plan import ALIGNMENT, BufferPlan, Slot, lifetimes, place, plan_buffers
from inferix.graphs.program import Program

SIDE = 3
OPS = {
    "add": lambda x, y: x + y,
    "turn": lambda x, y: x.T * y,
    "matmul": lambda x, y: x @ y,
    "twice": lambda x, y: torch.nn.functional.gelu(x) + x.T,
    "double": lambda x, y: torch.cat((x, y))[1 : SIDE + 1],
    "view": lambda x, y: x.T,
    "row": lambda x, y: x[:1] - y,
}
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12
)


def function(steps: list[tuple[str, int, int]]):
    """A function of two tensors: each step takes two of what is there; the last two are its results."""

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        made = [x, y]
        for name, first, second in steps:
            made.append(OPS[name](made[first % len(made)], made[second % len(made)]))
        return (made[-1] * 1, made[-2] * 1)

    return run


def meetings(program: Program, made: BufferPlan) -> list[tuple[str, str]]:
    """Pairs of buffers that share bytes while both are alive, other than one written over the other at its end."""
    lives, actual = lifetimes(program), []
    places = {name: (made.offsets[name], made.offsets[name] + program.buffers[name].nbytes) for name in lives}
    for one, (first, last) in lives.items():
        for other, (begin, _) in lives.items():
            share = places[one][0] < places[other][1] and places[other][0] < places[one][1]
            if one != other and share and first <= begin < last:
                actual.append((one, other))
            if one < other and share and first == begin:
                actual.append((one, other))
    return actual


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_any_program_on_its_arena_gives_what_its_function_gives(steps: list[tuple[str, int, int]]) -> None:
    x, y = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    program = traced(function(steps), x, y)
    made = plan_buffers(program)
    assert meetings(program, made) == []
    assert all(slot.offset % ALIGNMENT == 0 for slot in made.slots)
    assert made.live <= made.size
    launches = bound(program, x, y)
    launches.run()
    for actual, expected in zip(launches.outputs.values(), function(steps)(x, y), strict=True):
        assert torch.equal(actual, expected)


def test_writing_over_an_input_that_is_still_needed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: with the rule broken, the same program gives something else."""
    steps = [("add", 0, 1), ("add", 2, 2), ("add", 2, 3)]
    x, y = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    rule = plan.overwritten

    def careless(program, call, name, lives, index):
        dying = {other: (first, index) for other, (first, _) in lives.items()} | {name: lives[name]}
        return rule(program, call, name, dying, index)

    monkeypatch.setattr(plan, "overwritten", careless)
    program = traced(function(steps), x, y)
    launches = bound(program, x, y)
    launches.run()
    assert meetings(program, launches.plan) != []
    assert not torch.equal(result(launches), function(steps)(x, y)[0])


def test_an_elementwise_chain_needs_one_place() -> None:
    x = torch.randn(4, 4)
    made = plan_buffers(traced(lambda x: ((x + 1).sin() * 2).exp(), x))
    assert (made.size, len(made.slots)) == (ALIGNMENT, 1)
    assert len(made.slots[0].buffers) == 4
    other = plan_buffers(traced(lambda x: (x + 1) + (x + 1).T, x))  # read at two shapes: not in place
    assert other.size > ALIGNMENT


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 5)), max_size=12))
def test_slots_alive_together_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    slots = place([Slot((str(n),), 0, size, first, first + length) for n, (size, first, length) in enumerate(drawn)])
    for one in slots:
        for other in slots:
            together = one is not other and one.first <= other.last and other.first <= one.last
            assert not (together and one.offset < other.offset + other.size and other.offset < one.offset + one.size)


def test_the_peak_and_what_holds_it_are_told() -> None:
    program = traced(lambda x: (x @ x + 1) @ x, torch.randn(16, 16))
    made = plan_buffers(program)
    text = made.text(program)
    assert text.startswith(f"arena {made.size} bytes in 2 slots for 3 buffers; {made.live} alive together")
    assert ", aten::mm.out (pass/matmul_1)\n" in text
    assert re.search(r"1024  16x16 float32 +aten::add.out \(pass/add\)\n", text)
    alike = traced(lambda x: (x @ x) + (x @ x.T), torch.randn(16, 16))
    text = plan_buffers(alike).text(alike)
    assert re.search(r"2 x 1024  16x16 float32 +aten::mm.out \(pass/matmul\) and others", text)
