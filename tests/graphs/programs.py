"""Helpers for tests of lowering, planning and launching: trace a function, run its program, watch it run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inferix.graphs.launch import LaunchPlan
from inferix.graphs.lowered import Planned
from inferix.graphs.lowering import lower
from inferix.graphs.plan import plan_buffers
from inferix.graphs.program import Program
from inferix.graphs.types import PassGraph, Role, Value, When


class Wrapped(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


ROLES = {"i": Role.INPUT, "s": Role.STATE, "w": Role.WEIGHT, "c": Role.CONSTANT}


def traced(
    function: Callable[..., Any], *args: Tensor, roles: str = "", names: Mapping[int, str] | None = None
) -> Program:
    """The program of a function of tensors; `roles` has a letter for each, `names` other names for some."""
    exported = torch.export.export(Wrapped(function), args, strict=False)
    inputs = {}
    for index, node in enumerate(exported.graph.find_nodes(op="placeholder")):
        role = ROLES[roles[index]] if roles else Role.INPUT
        fake, name = node.meta["val"], (names or {}).get(index, node.name)
        inputs[node.name] = Value(name, role, tuple(fake.shape), fake.dtype, When.PASS)
    results = [spec.arg.name for spec in exported.graph_signature.output_specs]
    outputs = tuple(Value(name, Role.OUTPUT, (), torch.float32, When.PASS) for name in results)
    return lower([PassGraph("pass", exported.graph, inputs, outputs)], results)


def planned(function: Callable[..., Any], *args: Tensor, **kwargs: Any) -> Planned:
    program = traced(function, *args, **kwargs)
    return Planned(program, plan_buffers(program))


def bound(program: Program, *args: Tensor) -> LaunchPlan:
    """A program on its arguments and an arena full of NaN."""
    plan = plan_buffers(program)
    arena = torch.full((plan.size,), 255, dtype=torch.uint8)
    given = [buffer.name for buffer in program.buffers.values() if buffer.role is not Role.SCRATCH]
    return LaunchPlan(program, plan, arena, dict(zip(given, args, strict=True)))


def result(launches: LaunchPlan) -> Tensor:
    """The first output."""
    return next(iter(launches.outputs.values()))


class Watch(TorchDispatchMode):
    """Notes ops whose results have memory that is not in any of `known`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        tensors = [part for part in results if isinstance(part, Tensor)]
        if any(part.untyped_storage().data_ptr() not in self.known for part in tensors):
            self.made.append(func.name())
        return result
