"""The nodes that a node writes, taken from the alias annotations of its op's schema.

Data flow does not show it: straight after `torch.export` a write into pages is a node without users, which plain
dead-code removal would drop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

EMPTY = torch.ops.aten.empty.memory_format


def arguments(node: fx.Node) -> Iterator[tuple[torch.Argument, object]]:
    """Each declared argument of a node's op with what it is given; arguments left at their default are skipped."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if place < len(node.args):
            yield argument, node.args[place]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes that this one writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    return tuple(
        given
        for argument, given in arguments(node)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node)
    )


def read(node: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes whose contents this one reads; what it only writes into is left out."""
    return tuple(given for given in node.all_input_nodes if given not in written(node) or in_place(node, given))


def in_place(node: fx.Node, given: fx.Node) -> bool:
    """Return True if a written argument is read too: pages are, since only some of them are written."""
    return given.op == "placeholder"


def is_scratch(node: fx.Node) -> bool:
    """Return True for memory that another node fills."""
    return node.op == "call_function" and node.target is EMPTY


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory this one is a view of; itself if it has memory of its own."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: fx.Node) -> bool:
    """Return True for a view of the first argument's memory, by the op's schema."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def drop_dead(graph: fx.Graph) -> int:
    """Remove calls that neither the output nor any state depends on; returns how many."""
    needed: set[fx.Node] = set()
    dropped = 0
    for node in reversed(graph.nodes):
        targets = [storage(target) for target in written(node)]
        is_needed = node in needed or any(target in needed or target.op == "placeholder" for target in targets)
        if node.op in ("placeholder", "output") or is_needed:
            needed.update(storage(given) for given in node.all_input_nodes)
            needed.update(node.all_input_nodes)
        else:
            graph.erase_node(node)
            dropped += 1
    return dropped
