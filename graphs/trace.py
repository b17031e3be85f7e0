"""From a model's pass to a graph: `torch.export` with our ops opaque, then the normal form, with a role for each input.

The pass is a module whose `forward` takes and returns named tensors. Nothing of it is run: inputs are fake tensors of
the shapes that `inputs` declares, and so may its weights be (`fake_model`), which makes a graph of a model of any size
in seconds. Only the normal form of what `torch.export` returns is stored.
"""

from __future__ import annotations

import io
import logging
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException
from torch.export.graph_signature import InputKind

from ..errors import UsageError, quoted
from .edit import fake, fake_mode, shape
from .effects import storage, written
from .normal import normal_form
from .passes import Group
from .types import PassGraph, Role, Runs, Value, When

Module = TypeVar("Module", bound=nn.Module)
LITERAL = 1024  # numbers that a tensor written in a model's code may have; larger ones count as weights


def fake_model(make: Callable[[], Module], dtype: torch.dtype, device: torch.device | str = "cpu") -> Module:
    """A model with the shapes of its weights and no memory behind them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with fake_mode(), torch.device(device):
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def trace(
    name: str,
    module: nn.Module,
    inputs: Sequence[Value],
    *,
    model: str = "",
    device: torch.device | str = "cpu",
    groups: tuple[Group, ...] = (),
    runs: Runs = Runs.BLOCK,
    made: When = When.PASS,
) -> PassGraph:
    """The graph of `module.forward({name: tensor}) -> {name: tensor}`.

    model: the attribute of `module` that holds the model, whose own names its weights keep. made: how often the
    outputs change. Raises UsageError, naming the op or the line, for a pass that cannot be traced.
    """
    with fake_mode():
        given = {value.name: torch.empty(value.shape, dtype=value.dtype, device=device) for value in inputs}
    with explained(name), quiet(), torch.no_grad():
        exported = torch.export.export(module, (given,), strict=False)
    for node in exported.graph.nodes:
        node.meta |= {"line": line_of(node), "module": module_of(node).removeprefix(model).lstrip(".")}
    graph = normal_form(exported.graph)
    values_given, values = iter(inputs), dict[str, Value]()
    for spec, node in zip(exported.graph_signature.input_specs, graph.find_nodes(op="placeholder"), strict=True):
        if spec.kind == InputKind.USER_INPUT:
            values[node.name] = next(values_given)
        else:
            assert spec.target is not None
            literal = exported.constants.get(spec.target) if spec.kind == InputKind.CONSTANT_TENSOR else None
            values[node.name] = own_value(spec.target.removeprefix(model).lstrip("."), node, literal)
    keys = exported.call_spec.out_spec.context
    outputs = tuple(
        Value(key, Role.OUTPUT, shape(result), fake(result).dtype, made)
        for key, result in zip(keys, graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
    )
    return without_unused(PassGraph(name, graph, values, outputs, groups, state_writes(graph, values), runs))


def own_value(name: str, node: fx.Node, literal: Tensor | None) -> Value:
    """A tensor that the module brought along: a weight, or a small literal written in its code."""
    dtype, size = fake(node).dtype, shape(node)
    if literal is None or isinstance(literal, FakeTensor) or literal.numel() > LITERAL:
        return Value(name, Role.WEIGHT, size, dtype, When.LOAD)
    return Value.of_literal(literal.flatten().tolist(), size, dtype)


def state_writes(graph: fx.Graph, inputs: dict[str, Value]) -> tuple[str, ...]:
    """Names of the states that the graph writes; UsageError for a write into anything else that it was given."""
    states = dict[str, None]()
    for node in graph.nodes:
        for target in map(storage, written(node)):
            if target.op == "placeholder":
                value = inputs[target.name]
                if value.role != Role.STATE:
                    raise UsageError(
                        f"{node.target} at {node.meta['line']} writes into {value.role} {quoted(value.name)}, which "
                        "passes only read; declare it as state, or write into a tensor of its own"
                    )
                states[value.name] = None
    return tuple(states)


def without_unused(graph: PassGraph) -> PassGraph:
    """Without the placeholders that nothing reads."""
    inputs = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        if node.users:
            inputs[node.name] = graph.inputs[node.name]
        else:
            graph.graph.erase_node(node)
    return replace(graph, inputs=inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what `torch.export` prints when it fails: the error says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what `torch.export` raises into one line that names the op or the place in the model."""
    try:
        yield
    except UsageError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not in_torch(frame.filename)]
        where = next((frame for frame in reversed(frames) if Path(frame.filename) != Path(__file__)), None)
        place = f" at {Path(where.filename).name}:{where.lineno} ({where.line})" if where else ""
        message = " ".join(str(error).split())
        if isinstance(error, UnsupportedOperatorException) or "fake impl" in message:
            op = re.search(r"[a-z_0-9]+(?:::|\.)[a-z_0-9.]+", message)
            raise UsageError(
                f"{name}: op {op[0] if op else message} has no fake kernel{place}; register one with register_fake"
            ) from error
        raise UsageError(f"{name} cannot be traced{place}: {message[:200]}") from error


def in_torch(filename: str) -> bool:
    return Path(filename).is_relative_to(Path(torch.__file__).parent) or filename.startswith("<")


def line_of(node: fx.Node) -> str:
    """`file:line` of the innermost frame of a call that is not torch's own."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(filename, line) for filename, line in frames if not in_torch(filename)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else "?"


def module_of(node: fx.Node) -> str:
    """The module whose forward made a call, as a dotted path."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""
