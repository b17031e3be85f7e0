"""The nodes that a node writes, taken from the alias annotations of its op's schema.

Data flow does not show it: straight after `torch.export` a write into pages is a node without users, which plain
dead-code removal would drop.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import fx

from ..kernels.catalog import op_spec

EMPTY = torch.ops.aten.empty.memory_format


@cache
def written_arguments(op: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that an op writes into; asked of the schema once, since it is slow to answer."""
    declared = enumerate(op._schema.arguments)
    written = ((place, one) for place, one in declared if one.alias_info is not None and one.alias_info.is_write)
    return tuple((place, one.name) for place, one in written)


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes that this one writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    places = written_arguments(node.target)
    given = (node.args[place] if place < len(node.args) else node.kwargs.get(name) for place, name in places)
    return tuple(one for one in given if isinstance(one, fx.Node))


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
    return isinstance(node.target, torch._ops.OpOverload) and returns_view(node.target)


@cache
def returns_view(op: torch._ops.OpOverload) -> bool:
    returns = op._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def is_awaited(node: fx.Node) -> bool:
    """Return True for a call that another rank waits for."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "inferix":
        return False
    spec = op_spec(target._schema.name.removeprefix("inferix::"))
    return spec is not None and spec.awaited


def drop_dead(graph: fx.Graph) -> int:
    """Remove calls that neither the output nor any state nor another rank depends on; returns how many."""
    needed: set[fx.Node] = set()
    dropped = 0
    for node in reversed(graph.nodes):
        targets = [storage(target) for target in written(node)]
        is_needed = node in needed or any(target in needed or target.op == "placeholder" for target in targets)
        is_needed = is_needed or is_awaited(node)
        if node.op in ("placeholder", "output") or is_needed:
            needed.update(storage(given) for given in node.all_input_nodes)
            needed.update(node.all_input_nodes)
        else:
            graph.erase_node(node)
            dropped += 1
    return dropped
