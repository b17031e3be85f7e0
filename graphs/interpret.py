"""A graph run node by node on real tensors: the meaning of a graph, the reference of every faster execution."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .types import BlockGraph, PassGraph, Runs


def run_pass(graph: PassGraph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of one graph by name; `values` holds everything it reads by name, literals excepted.

    State is written in place. KeyError names a value that is missing.
    """
    results_of: dict[fx.Node, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = graph.inputs[node.name]
            results_of[node] = values[value.name] if value.data is None else value.literal(node.meta["val"].device)
        elif node.op == "output":
            results = node.args[0]
        else:
            args, kwargs = map_arg((node.args, node.kwargs), results_of.__getitem__)
            results_of[node] = node.target(*args, **kwargs)
    return {value.name: results_of[result] for value, result in zip(graph.outputs, results, strict=True)}


@torch.no_grad()
def run_block(
    block: BlockGraph, values: Mapping[str, Tensor], runs: Collection[Runs] = tuple(Runs)
) -> dict[str, Tensor]:
    """All values after the graphs that `runs` names (by default every one) have run in order.

    `values` holds weights, states and inputs by name; what a graph hands on is added to a copy of it.
    """
    computed = dict(values)
    for graph in block.graphs:
        if graph.runs in runs:
            computed |= run_pass(graph, computed)
    return computed
