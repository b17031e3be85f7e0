"""The launcher: inputs copied once, constants shared and recomputed in place, captures counted on a fake backend."""

from __future__ import annotations

import pytest
import torch
from programs import planned
from recording import FakeGraphs
from torch import Tensor

from inferix.graphs.lowered import Lowered
from inferix.runtime.execution.launcher import Launcher, NotEnoughMemory

CPU = torch.device("cpu")
X = torch.arange(4.0).reshape(2, 2)


def lowered(function, *args: Tensor, **kwargs: object) -> Lowered:
    return Lowered(planned(function, *args, **kwargs), None, None, {})


def folding(function, weight: Tensor) -> Lowered:
    """x + c, where c is made from a weight by `function`."""
    fold = planned(function, weight, roles="w")
    (name,) = fold.program.outputs
    body = planned(lambda x, c: x + c, X, X.clone(), roles="ic", names={1: name})
    return Lowered(body, fold, None, {})


@torch.library.custom_op("inferix_test::unsafe", mutates_args=("x",), tags=(torch.Tag.cudagraph_unsafe,))
def unsafe(x: Tensor) -> None:
    if x.sum() > 0:
        x.neg_()


unsafe.register_fake(lambda x: None)


def test_an_input_is_copied_when_it_changes_and_a_result_is_the_callers() -> None:
    launcher = Launcher({}, CPU)
    loaded = launcher.load(lowered(lambda x, y: x @ y, X, X.clone()), {})
    name, other = loaded.body.inputs
    x, y = X.clone(), X + 1
    (first,) = launcher.run(loaded.body, {name: x, other: y}).values()
    assert torch.equal(first, x @ y)
    loaded.body.inputs[name].zero_()  # what is there is trusted while the tensor is the same
    (second,) = launcher.run(loaded.body, {name: x, other: y}).values()
    assert torch.equal(second, torch.zeros(2, 2))
    assert torch.equal(first, x @ y)
    x.add_(0)
    (third,) = launcher.run(loaded.body, {name: x, other: y}).values()
    assert torch.equal(third, x @ y)
    with pytest.raises(ValueError, match=r"\[3, 2\].*\[2, 2\]"):
        launcher.run(loaded.body, {name: torch.zeros(3, 2), other: y})


def test_constants_of_one_recipe_are_shared_and_follow_the_weights_in_place() -> None:
    weight = X.clone()
    names = {"args_0": weight}
    launcher = Launcher(names, CPU)
    first, same = (launcher.load(folding(lambda w: w * 2, weight), {}) for _ in range(2))
    other = launcher.load(folding(lambda w: w * 3, weight), {})
    assert len(launcher.constants) == 2

    def results() -> list[Tensor]:
        return [
            next(iter(launcher.run(it.body, dict.fromkeys(it.body.inputs, X)).values())) for it in (first, same, other)
        ]

    assert torch.equal(torch.stack(results()), torch.stack((X + 2 * X, X + 2 * X, X + 3 * X)))
    places = [constant.data_ptr() for constant in launcher.constants.values()]
    weight.add_(1)
    launcher.refresh_derived_weights()
    assert torch.equal(torch.stack(results()), X + torch.stack((2 * weight, 2 * weight, 3 * weight)))
    assert [constant.data_ptr() for constant in launcher.constants.values()] == places


def test_scratch_is_needed_only_where_the_arena_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs share the arena: the second needs memory for its input only."""
    launcher = Launcher({}, CPU)
    program = lowered(lambda x: (x + 1) * 2, X)
    needs = launcher.needs(program)
    assert needs["scratch"] == program.body.plan.size > 0
    launcher.load(program, {})
    assert launcher.needs(program) == {"scratch": 0, "constants": 0, "inputs": X.nbytes}
    monkeypatch.setattr("inferix.runtime.execution.launcher.free_bytes", lambda device: X.nbytes)
    launcher.load(program, {})
    with pytest.raises(NotEnoughMemory):
        Launcher({}, CPU).load(program, {})


def test_one_capture_serves_every_run() -> None:
    backend = FakeGraphs()
    launcher = Launcher({}, CPU, backend)
    loaded = launcher.load(lowered(lambda x: x * 2, X), {})
    for shift in range(5):
        (actual,) = launcher.run(loaded.body, dict.fromkeys(loaded.body.inputs, X + shift)).values()
        assert torch.equal(actual, (X + shift) * 2)
    assert (backend.captures, backend.replays, launcher.captures) == (1, 5, 1)


def test_what_cannot_be_captured_is_launched_and_named_once() -> None:
    def run(x: Tensor) -> Tensor:
        copy = x * 1
        unsafe(copy)
        return copy + 1

    for launched, backend, named in (
        (
            run,
            FakeGraphs(),
            ("inferix_test::unsafe", "pass/unsafe"),
        ),
        (
            lambda x: 1 - x,
            FakeGraphs("operation not permitted"),
            ("aten::rsub.Scalar_out", "pass/rsub", "operation not permitted"),
        ),
    ):
        launcher = Launcher({}, CPU, backend)
        loaded = launcher.load(lowered(launched, X), {})
        with pytest.warns(UserWarning) as caught:
            results = [launcher.run(loaded.body, dict.fromkeys(loaded.body.inputs, X)) for _ in range(3)]
        assert torch.equal(next(iter(results[-1].values())), 1 - X)
        (message,) = (str(warning.message) for warning in caught)
        assert all(name in message for name in (*named, "fused"))
        assert backend.captures == 0


def test_merged_weights_are_stored_once() -> None:
    """Weights become views of the constant; a weight that a program reads directly stays where it is."""
    model = {name: torch.nn.Parameter(X + shift, False) for shift, name in enumerate("qkv")}
    launcher = Launcher(model, CPU)
    fold = planned(lambda q, k, v: torch.cat((q, k, v)), *model.values(), roles="www", names=dict(enumerate("qkv")))
    (name,) = fold.program.outputs
    body = planned(lambda x, c: x @ c.mT, X, torch.zeros(6, 2), roles="ic", names={1: name})
    loaded = launcher.load(Lowered(body, fold, None, {}), {})
    (constant,) = launcher.constants.values()
    assert {part.untyped_storage().data_ptr() for part in model.values()} == {constant.untyped_storage().data_ptr()}
    assert torch.equal(torch.cat(tuple(model.values())), constant)
    model["k"].add_(5)
    (actual,) = launcher.run(loaded.body, dict.fromkeys(loaded.body.inputs, X)).values()
    assert torch.equal(actual, X @ torch.cat((X, X + 6, X + 2)).mT)
    launcher.refresh_derived_weights()
    assert torch.equal(torch.cat(tuple(model.values())), torch.cat((X, X + 6, X + 2)))

    other = {name: torch.nn.Parameter(X.clone(), False) for name in "qkv"}
    launcher = Launcher(other, CPU)
    launcher.load(lowered(lambda q, x: x @ q, X, X.clone(), roles="wi", names={0: "q"}), {})
    place = other["q"].data_ptr()
    launcher.load(Lowered(body, fold, None, {}), {})
    assert other["q"].data_ptr() == place
