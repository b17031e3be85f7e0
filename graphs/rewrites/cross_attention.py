"""cross-attention: attention to a prompt through `inferix::block_attention`, over one page of its keys and values.

Precondition: attention without a mask of queries [B, T, n, c] over keys and values [B, K, n, c], as models write it.
Claim: equal to rounding. The op writes [B, T, n, c], what the next layer reads: torch's attention has no `out=` form,
so that each call allocates its result, which is then copied. `hoist-prompt` makes the page once per prompt.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, fx

from ...kernels.attention import attention
from ..edit import Editor, aten, fake, shape
from ..match import Match, Pattern
from ..types import PROMPT_TABLE, PassGraph, Role, Value, When
from .base import add_input, literal, ops


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v)


@cache
def pattern(dtype: torch.dtype) -> Pattern:
    return Pattern.of(attend, {"q": (2, 3, 5, 7), "k": (2, 11, 5, 7), "v": (2, 11, 5, 7)}, dtype)


def cross_attention(graph: PassGraph) -> int:
    """Put `inferix::block_attention` in the place of torch's attention."""
    edit, places = Editor(graph.graph), 0
    target = aten.scaled_dot_product_attention.default
    for dtype in dict.fromkeys(fake(node).dtype for node in graph.graph.find_nodes(op="call_function", target=target)):
        for match in pattern(dtype).matches(graph.graph):
            fuse(graph, edit, match)
            places += 1
    return places


def fuse(graph: PassGraph, edit: Editor, match: Match) -> None:
    """One page for each row of the batch, whose list has that page alone.

    Where all rows share one prompt, there is one page, and the table that lists it is an input: over more pages it
    gives each row a prompt of its own.
    """
    shared = [spread_over_rows(match.seen[name]) if name in match.seen else None for name in ("k", "v")]
    with edit.before(match.anchor):
        q = match.input(edit, "q")
        rows, device = shape(q)[0], fake(q).device
        if shared[0] is not None and shared[1] is not None:
            k, v = (edit.dense(part) for part in shared if part is not None)
            table = add_input(graph, Value(PROMPT_TABLE, Role.INPUT, (rows, 1), torch.int32, When.BLOCK), device)
        else:
            k, v = (match.input(edit, name) for name in ("k", "v"))
            table = literal(graph, range(rows), (rows, 1), torch.int32, device)
        count = literal(graph, [1] * rows, (rows,), torch.int32, device)
        pages = edit.call(aten.stack.default, [k, v])
        out = edit.like(q)
        scale = 1 / math.sqrt(shape(q)[-1])
        edit.call(ops.block_attention.default, q, pages, table, count, out, None, None, None, None, scale)
        match.replace(edit, out)
    for user in [user for user in out.users if user.target is aten.clone.default]:  # it is in order
        user.replace_all_uses_with(out)
        user.graph.erase_node(user)


def spread_over_rows(node: fx.Node) -> fx.Node | None:
    """The node [1, ...] of which this one has copies as rows; None for any other."""
    if node.target is not aten.expand.default:
        return None
    (source,) = node.all_input_nodes
    return source if shape(source) == (1, *shape(node)[1:]) else None
