"""fold, hoist-prompt and hoist-frames: move calls out of passes whose results change less often than a pass.

`fold` takes what depends on weights, written numbers and positions of the grid alone, `hoist_prompt` what depends on
the prompt besides, `hoist_frames` what the channels do that a block's frames are given. A value is moved if it is
computed, not merely looked at, and something that stays reads it. Equal calls of several passes become one, so that a
constant is made and stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from ..cost import spec_of
from ..edit import Editor, fake, shape
from ..effects import is_scratch, is_view, storage, written
from ..trace import without_unused
from ..types import BlockGraph, PassGraph, Role, Runs, Value, When
from .base import add_input, cleaned, replaced


def fold(block: BlockGraph) -> tuple[BlockGraph, int]:
    """Move what is known once the weights are there into the fold graph; its outputs are the constants."""
    return moved(block, When.LOAD, "fold", Role.CONSTANT, Runs.LOAD)


def hoist_prompt(block: BlockGraph) -> tuple[BlockGraph, int]:
    """Move what is known once the prompt is there into the prompt graph."""
    return moved(block, When.PROMPT, "prompt", Role.INPUT, Runs.PROMPT)


def hoist_frames(block: BlockGraph) -> tuple[BlockGraph, int]:
    """Move what is known once a block's frames are given their channels into the frames graph."""
    return moved(block, When.FRAMES, "frames", Role.INPUT, Runs.FRAMES)


def moved(block: BlockGraph, when: When, name: str, role: Role, runs: Runs) -> tuple[BlockGraph, int]:
    """The block with all calls of a rate in one graph of their own; counts its outputs."""
    target = Collected(name, role, when)
    sources = [graph for graph in block.graphs if graph.name != name]
    for graph in sources:
        ranks = ranks_of(graph)
        edit = Editor(graph.graph)
        for node in list(graph):
            computed = not is_view(node) and storage(node).op != "placeholder"
            if computed and ranks[node] == when.rank and any(ranks[user] > when.rank for user in all_users(node)):
                given = target.hand_over(graph, node)
                for user in [user for user in node.users if not written_by(user, node)]:
                    user.replace_input_with(node, given)
                edit.refresh_views(given)
    if not target.outputs:
        return block, 0
    return replaced(block, [target.finished(runs), *map(cleaned, sources)]), len(target.outputs)


def ranks_of(graph: PassGraph) -> dict[fx.Node, int]:
    """Rate at which the result of each node changes; scratch changes with the values written into it."""
    ranks: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = graph.inputs[node.name]
            ranks[node] = When.PASS.rank if value.role == Role.STATE else value.when.rank
        elif node.op == "output":
            ranks[node] = When.PASS.rank + 1
        else:
            ranks[node] = max((ranks[given] for given in node.all_input_nodes), default=0)
            if exchanges(node):  # every rank runs it in every pass, and what it gathers is not kept
                ranks[node] = When.PASS.rank
            for target in written(node):
                ranks[storage(target)] = ranks[target] = ranks[node]
    return ranks


def exchanges(node: fx.Node) -> bool:
    """True for a collective."""
    spec = spec_of(node.target) if isinstance(node.target, OpOverload) else None
    return spec is not None and spec.family == "exchange"


def all_users(node: fx.Node) -> Iterator[fx.Node]:
    """Calls that use a node or any view of it."""
    for user in node.users:
        if is_view(user):
            yield from all_users(user)
        yield user


def written_by(user: fx.Node, node: fx.Node) -> bool:
    return node in written(user)


class Collected:
    """A graph that takes in calls from others, equal ones once."""

    def __init__(self, name: str, role: Role, when: When) -> None:
        self.role, self.when = role, when
        self.graph = PassGraph(name, fx.Graph(), {}, ())
        self.edit = Editor(self.graph.graph)
        self.made: dict[object, Any] = {}
        self.outputs: dict[fx.Node, Value] = {}

    def hand_over(self, graph: PassGraph, node: fx.Node) -> fx.Node:
        """Compute a node here; the placeholder in `graph` of its result."""
        result = self.edit.dense(self.copy(graph, node))
        if result not in self.outputs:
            name = f"{self.graph.name}.{len(self.outputs)}"
            self.outputs[result] = Value(name, self.role, shape(result), fake(result).dtype, self.when)
        return add_input(graph, self.outputs[result], fake(node).device)

    def copy(self, graph: PassGraph, node: fx.Node) -> fx.Node:
        """A node, with all that it depends on, in this graph."""
        if node.op == "placeholder":
            value = graph.inputs[node.name]
            own = next((made for made, known in self.outputs.items() if known.name == value.name), None)
            return add_input(self.graph, value, fake(node).device) if own is None else own
        if is_scratch(node):
            writer = next(user for user in node.users if written_by(user, node))
            return self.copy_writer(graph, writer)[node.name]
        self.edit.origin = node
        args, kwargs = map_arg((node.args, node.kwargs), lambda given: self.copy(graph, given))
        key = (node.target, hashable(args), hashable(kwargs))
        if key not in self.made:
            self.edit.origin = node
            self.made[key] = self.edit.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
        return self.made[key]

    def copy_writer(self, graph: PassGraph, writer: fx.Node) -> dict[str, fx.Node]:
        """A call that fills scratch; what it fills here, by the name it has there."""
        outs = written(writer)
        args = [
            f"out {outs.index(arg)}" if isinstance(arg, fx.Node) and arg in outs
            else map_arg(arg, lambda given: self.copy(graph, given))
            for arg in writer.args
        ]  # fmt: skip
        key = (writer.target, hashable(args))
        if key not in self.made:
            self.edit.origin = writer
            room = {f"out {place}": self.edit.like(out) for place, out in enumerate(outs)}
            self.edit.call(writer.target, *(room.get(arg, arg) if isinstance(arg, str) else arg for arg in args))  # type: ignore[arg-type]
            self.made[key] = list(room.values())
        return {out.name: here for out, here in zip(outs, self.made[key], strict=True)}

    def finished(self, runs: Runs) -> PassGraph:
        self.graph.graph.output(tuple(self.outputs))
        outputs = tuple(replace(value, role=Role.OUTPUT) for value in self.outputs.values())
        return without_unused(replace(self.graph, outputs=outputs, runs=runs))


def hashable(value: Any) -> Any:
    """A call's arguments as a key."""
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    return tuple((key, hashable(part)) for key, part in sorted(value.items())) if isinstance(value, dict) else value
