"""wide-linear: a linear layer that converts both operands to float32 takes them as they are, its result in float32.

Precondition: input and weight are casts of tensors in half precision to float32; there is no bias.
Claim: equal to rounding: products of half-precision numbers are exact in float32, and sums are in float32.
"""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from ..edit import Editor, aten, fake, shape
from ..match import peeled
from ..types import PassGraph
from .base import ops

HALF = (torch.bfloat16, torch.float16)


def wide_linear(graph: PassGraph) -> int:
    """Put `inferix::linear_wide` in the place of such layers."""
    edit, places = Editor(graph.graph), 0
    for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight = (cast_of_half(part) for part in node.args[:2])
        if x is None or weight is None or len(node.args) > 2 or fake(x).dtype != fake(weight).dtype:
            continue
        if shape(weight) != shape(node.args[1]):  # of a matrix that is a view of something else
            continue
        with edit.before(node):
            *rows, inner = shape(x)
            out = edit.scratch((prod(rows), shape(weight)[0]), torch.float32, fake(node).device)
            edit.call(ops.linear_wide.default, edit.view(edit.dense(x), (prod(rows), inner)), edit.dense(weight), out)
            result = edit.view(out, shape(node))
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        places += 1
    return places


def cast_of_half(part: object) -> fx.Node | None:
    """The half-precision tensor of which this is a cast to float32; None if there is none."""
    assert isinstance(part, fx.Node)
    cast = peeled(part)
    if cast.target is not aten._to_copy.default or fake(cast).dtype != torch.float32:
        return None
    (source,) = cast.all_input_nodes
    same = shape(cast)[-1] == shape(part)[-1] == shape(source)[-1]
    return source if same and fake(source).dtype in HALF else None
