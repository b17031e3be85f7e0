"""Graphs put together: a model's pass, traced once, with the timesteps and the solver step of each pass of a block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from .trace import without_unused
from .types import PassGraph, Value


def chained(
    name: str, first: PassGraph, then: PassGraph | None = None, given: Mapping[str, Value] | None = None
) -> PassGraph:
    """A copy of `first`, followed by `then` on its outputs; inputs of one name are one input.

    given: values that take the place of inputs, by name; literal timesteps, for instance. What the result hands on
    is what `then` does, or `first` where there is none.
    """
    parts = [first] if then is None else [first, then]
    given, graph = given or {}, fx.Graph()
    made: dict[str, fx.Node] = {}
    inputs: dict[str, Value] = {}
    for part in parts:
        for node in part.graph.find_nodes(op="placeholder"):
            value = part.inputs[node.name]
            if value.name not in made:
                made[value.name] = graph.placeholder(re.sub(r"\W", "_", value.name))
                made[value.name].meta = dict(node.meta)
                inputs[made[value.name].name] = given.get(value.name, value)
    for part in parts:
        results = copy_into(graph, part, made)
        made = made | {value.name: result for value, result in zip(part.outputs, results, strict=True)}
    graph.output(results)
    return without_unused(replace(first, name=name, graph=graph, inputs=inputs, outputs=parts[-1].outputs))


def copy_into(graph: fx.Graph, part: PassGraph, made: Mapping[str, fx.Node]) -> tuple[fx.Node, ...]:
    """Append the calls of `part` to a graph that has its inputs, by name, in `made`; returns its results."""
    copies: dict[fx.Node, fx.Node] = {}
    for node in part.graph.nodes:
        if node.op == "placeholder":
            copies[node] = made[part.inputs[node.name].name]
        elif node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = part.graph.output_node().args[0]
    return tuple(copies[result] for result in results)  # type: ignore[union-attr, index]
