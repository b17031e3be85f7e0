"""The type of a rewrite, and helpers that several share. A rewrite works on a copy that it may change in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...kernels import catalog  # noqa: F401  (registers the ops)
from ..edit import fake, fake_mode, shape
from ..effects import drop_dead, is_scratch, is_view
from ..match import peeled
from ..trace import without_unused
from ..types import BlockGraph, PassGraph, Value

ops = torch.ops.inferix
Apply = Callable[[BlockGraph], tuple[BlockGraph, int]]


@dataclass(frozen=True)
class Rewrite:
    """name: as the command line knows it. apply: gives the block after it, and in how many places it was done; None
    for one that is done when the passes of a block are planned, before they are traced, or that is for a GPU alone.

    needs: rewrites without which this one finds nothing. default: done without being asked for.
    """

    name: str
    claim: str
    apply: Apply | None
    needs: tuple[str, ...] = ()
    default: bool = True


def on_each_graph(change: Callable[[PassGraph], int]) -> Apply:
    """A rewrite of the block from one of a single graph that says how many places it has changed."""

    def apply(block: BlockGraph) -> tuple[BlockGraph, int]:
        places = sum(change(graph) for graph in block.graphs)
        return replaced(block, [cleaned(graph) for graph in block.graphs]), places

    return apply


def replaced(block: BlockGraph, graphs: Sequence[PassGraph]) -> BlockGraph:
    """The block with its graphs replaced by these, matched by name."""
    special = {graph.name: graph for graph in graphs if graph.name in ("fold", "prompt", "frames")}
    passes = tuple(graph for graph in graphs if graph.name not in special)
    fold, prompt, frames = map(special.get, ("fold", "prompt", "frames"))
    return replace(block, fold=fold, prompt=prompt, frames=frames, passes=passes)


def cleaned(graph: PassGraph) -> PassGraph:
    """Without calls that nothing depends on, inputs that nothing reads, and reshapes of reshapes."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        base = peeled(node)
        if shape(base) == shape(node):
            node.replace_all_uses_with(base)
        elif fake(base).is_contiguous():
            node.args = (base, node.args[1])
    drop_dead(graph.graph)
    return without_unused(graph)


def launches(graph: PassGraph) -> list[fx.Node]:
    """The calls that do something on the device: neither views nor mere memory."""
    return [node for node in graph if not is_view(node) and not is_scratch(node)]


def add_input(graph: PassGraph, value: Value, device: torch.device) -> fx.Node:
    """The placeholder of a value, new or already there."""
    for key, known in graph.inputs.items():
        if known.name == value.name:
            return next(node for node in graph.graph.find_nodes(op="placeholder") if node.name == key)
    first = next(iter(graph.graph.nodes), None)
    with graph.graph.inserting_before(first) if first is not None else nullcontext():
        node = graph.graph.placeholder("".join(letter if letter.isalnum() else "_" for letter in value.name))
    with fake_mode():
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=device)
    graph.inputs[node.name] = value
    return node


def literal(
    graph: PassGraph, data: Sequence[float], size: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> fx.Node:
    """A constant written down in the graph."""
    return add_input(graph, Value.of_literal(data, size, dtype), device)
