"""split-keys: attention over parts of the keys and a merge, where whole attention leaves multiprocessors idle.

Precondition: `inferix::block_attention` in half precision with heads that its kernels are made for, over one list of
pages a row; lists by head group stay whole. `parts_for` chooses the number of parts from queries, keys and
multiprocessors. Claim: equal to rounding; the results of the parts are kept in float32, in scratch of the program,
and added in their order.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from ...kernels.attention_parts.rule import parts_for
from ...kernels.block_attention import HEAD_DIMS
from ...kernels.spec import HALF
from ..edit import Editor, fake, shape
from ..types import PassGraph
from .base import Apply, on_each_graph, ops

NAMES = (
    "q", "kv", "page_table", "page_count", "out", "q_sink", "sink_count", "kv_scale", "lse", "scale",
)  # fmt: skip


def split_keys(multiprocessors: int) -> Apply:
    """Return the rewrite for a GPU with this number of multiprocessors."""
    return on_each_graph(partial(split_graph, multiprocessors=multiprocessors))


def split_graph(graph: PassGraph, multiprocessors: int) -> int:
    """Split the keys of every attention of a graph that gains by it."""
    edit, places = Editor(graph.graph), 0
    for node in graph.graph.find_nodes(op="call_function", target=ops.block_attention.default):
        if (parts := parts_of(node, multiprocessors)) > 1:
            split(edit, node, parts)
            places += 1
    return places


def parts_of(node: fx.Node, multiprocessors: int) -> int:
    """Number of parts for the keys of one attention; 1 for one that cannot be split."""
    q, kv, table = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(kv, fx.Node) and isinstance(table, fx.Node)
    rows, tokens, heads, dim = shape(q)
    if fake(q).dtype not in HALF or dim not in HEAD_DIMS or len(shape(table)) != 2:
        return 1
    return parts_for(rows, tokens, heads, shape(table)[-1] * shape(kv)[2], multiprocessors)


def split(edit: Editor, node: fx.Node, parts: int) -> None:
    """Two calls in the place of one: attention over parts of the keys, and their merge."""
    given = dict(zip(NAMES, node.args, strict=True))
    q = given["q"]
    assert isinstance(q, fx.Node)
    rows, tokens, heads, dim = shape(q)
    wide = torch.promote_types(fake(q).dtype, torch.float32)
    with edit.before(node):
        results = edit.like(q, (parts, rows, tokens, heads, dim), wide)
        sums = edit.like(q, (parts, rows, heads, tokens), wide)
        edit.call(
            ops.attention_parts.default,
            q, given["kv"], given["page_table"], given["page_count"], results, sums,
            given["q_sink"], given["sink_count"], given["kv_scale"], given["scale"],
        )  # fmt: skip
        edit.call(ops.merge_parts.default, results, sums, given["out"], given["lse"])
    edit.graph.erase_node(node)
