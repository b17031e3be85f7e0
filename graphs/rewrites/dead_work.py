"""dead-work: what no later pass reads, no result needs and no state remembers is not computed.

Precondition: none; effects are read from op schemas. Of a pass that is run for the keys and values it leaves (commit,
recompute, re-cache) the head goes, and in the last layer all that follows the write into pages.
Claim: results and states are the same, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

from ..types import BlockGraph, PassGraph
from .base import cleaned, launches, replaced


def dead_work(block: BlockGraph) -> tuple[BlockGraph, int]:
    """Drop outputs that are read by nobody, and the calls made for them alone; counts those calls."""
    before = sum(len(launches(graph)) for graph in block.graphs)
    needed, graphs = set(block.results), list[PassGraph]()
    for graph in reversed(block.graphs):
        graphs.insert(0, cleaned(with_outputs(graph, needed)))
        needed |= set(graphs[0].reads)
    return replaced(block, graphs), before - sum(len(launches(graph)) for graph in graphs)


def with_outputs(graph: PassGraph, needed: set[str]) -> PassGraph:
    """The graph with only the outputs in `needed`."""
    node = graph.graph.output_node()
    pairs = [pair for pair in zip(graph.outputs, node.args[0], strict=True) if pair[0].name in needed]  # type: ignore[arg-type]
    node.args = (tuple(result for _, result in pairs),)
    return replace(graph, outputs=tuple(value for value, _ in pairs))
