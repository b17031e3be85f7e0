"""dense-attention: attention over one run of pages through a library's kernel, where the host knows the run.

Precondition: each list of the graph's pages is the same run, whose numbers are part of the graph's key;
`inferix::block_attention` over these pages without queries for a sink, scales or sums.
Claim: equal to rounding. The program holds the addresses of the run: another run needs another program.
"""

from __future__ import annotations

from functools import partial

from torch import fx

from ...kernels.dense_attention.run import Run
from ..edit import Editor
from ..types import PassGraph, Role
from .base import Apply, on_each_graph, ops
from .split_keys import NAMES

OTHERS = ("q_sink", "sink_count", "kv_scale", "lse")  # features that the libraries' kernels do not have


def dense_attention(run: Run) -> Apply:
    """Return the rewrite for lists that are one run."""
    return on_each_graph(partial(make_dense, run=run))


def make_dense(graph: PassGraph, run: Run) -> int:
    """Put `inferix::dense_attention` in the place of every attention of a graph that can be such."""
    edit, places = Editor(graph.graph), 0
    for node in graph.graph.find_nodes(op="call_function", target=ops.block_attention.default):
        given = dict(zip(NAMES, node.args, strict=True))
        if not reads_pages(graph, given["kv"]) or any(given[name] is not None for name in OTHERS):
            continue
        with edit.before(node):
            edit.call(ops.dense_attention.default, given["q"], given["kv"], *run, given["out"], given["scale"])
        graph.graph.erase_node(node)
        places += 1
    return places


def reads_pages(graph: PassGraph, kv: object) -> bool:
    """True for the pages of a pool; those of a prompt are no state."""
    value = graph.inputs.get(kv.name) if isinstance(kv, fx.Node) else None
    return value is not None and value.role == Role.STATE
