"""Checks of any block graph, traced or rewritten: from op schemas, not from data flow alone."""

from __future__ import annotations

from torch import fx

from ..errors import InferixError
from .edit import fake, shape
from .effects import is_scratch, is_view, read, storage, written
from .types import BlockGraph, PassGraph, Role


class GraphError(InferixError):
    """A graph that would not compute what was traced; a fault of a rewrite, or of a graph made by hand."""


def validate(block: BlockGraph) -> None:
    """GraphError, naming graph and node, unless every graph of the block is sound.

    Scratch is written once, before it is read. State is written only by ops that get pages which the pass owns, and
    everything that the traced pass wrote is still written. Inputs, weights and constants are only read. Each value
    has one shape and dtype, and what a pass reads has been made: by the block's caller, the fold graph, the prompt
    graph, the frames graph or a pass before.
    """
    known: dict[str, tuple[object, ...]] = {}
    for graph in block.graphs:
        validate_pass(graph)
        for value in (*graph.inputs.values(), *graph.outputs):
            form = (value.shape, value.dtype, value.data)
            if known.setdefault(value.name, form) != form:
                raise GraphError(f"{graph.name}: {value.name} is {form}, but {known[value.name]} elsewhere")
    once = (block.fold, block.prompt, block.frames)
    made = {value.name for graph in once if graph is not None for value in graph.outputs}
    for graph in block.passes:
        for value in graph.inputs.values():
            if value.role == Role.CONSTANT and value.data is None and value.name not in made:
                raise GraphError(f"{graph.name}: constant {value.name} is made by no fold graph")
    if missing := set(block.results) - {value.name for graph in block.passes for value in graph.outputs}:
        raise GraphError(f"no pass makes the results {sorted(missing)}")


def validate_pass(graph: PassGraph) -> None:
    """GraphError unless one graph is sound by itself."""
    filled: set[fx.Node] = set()
    states: set[str] = set()
    placed: set[fx.Node] = set()
    for node in graph.graph.nodes:
        for given in node.all_input_nodes:
            if given not in placed:
                raise GraphError(f"{graph.name}: {node.name} reads {given.name}, which comes after it")
        placed.add(node)
        targets = [storage(target) for target in written(node)]
        for given in read(node) if not is_view(node) else ():
            if is_scratch(storage(given)) and storage(given) not in filled:
                raise GraphError(f"{graph.name}: {node.name} reads scratch {given.name} before it is written")
        for target in targets:
            if is_scratch(target):
                if target in filled:
                    raise GraphError(f"{graph.name}: {node.name} writes scratch {target.name} a second time")
                filled.add(target)
            elif target.op == "placeholder":
                states.add(written_state(graph, node, target))
            else:
                raise GraphError(f"{graph.name}: {node.name} writes into {target.name}, the result of a call")
    if lost := set(graph.writes) - states:
        raise GraphError(f"{graph.name}: the traced pass wrote {', '.join(sorted(lost))}; the graph no longer does")
    for value, result in zip(graph.outputs, graph.results, strict=True):
        if (shape(result), fake(result).dtype) != (value.shape, value.dtype):
            raise GraphError(f"{graph.name}: output {value.name} is {shape(result)}, declared {value.shape}")


def written_state(graph: PassGraph, node: fx.Node, target: fx.Node) -> str:
    """The name of the state that a node writes; GraphError for other values, or without a page that the pass owns."""
    value = graph.inputs[target.name]
    if value.role != Role.STATE:
        raise GraphError(f"{graph.name}: {node.name} writes into {value.role} {value.name}")
    inputs = [graph.inputs[storage(given).name] for given in node.all_input_nodes if storage(given).op == "placeholder"]
    if not any(given.owned for given in inputs):
        raise GraphError(f"{graph.name}: {node.name} writes pages of {value.name} that the pass does not own")
    return value.name
