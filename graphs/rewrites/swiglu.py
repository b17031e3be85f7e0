"""swiglu: SiLU of the first half of a projection times its second half, in one kernel.

Precondition: both are halves of one tensor over its last dimension, and nothing else uses the SiLU.
Claim: equal to rounding; the kernel does not round before the product.
"""

from __future__ import annotations

from math import prod

from torch import fx

from ..edit import Editor, aten, shape
from ..types import PassGraph
from .base import ops


def swiglu(graph: PassGraph) -> int:
    """Put `inferix::swiglu` in the place of the two calls."""
    edit, places = Editor(graph.graph), 0
    for silu in graph.graph.find_nodes(op="call_function", target=aten.silu.default):
        whole = halves(silu)
        if whole is not None:
            (product,) = silu.users
            with edit.before(product):
                *rows, width = shape(whole)
                out = edit.like(whole, (prod(rows), width // 2))
                edit.call(ops.swiglu.default, edit.view(edit.dense(whole), (prod(rows), width)), out)
                result = edit.view(out, shape(product))
            product.replace_all_uses_with(result)
            graph.graph.erase_node(product)
            graph.graph.erase_node(silu)
            places += 1
    return places


def halves(silu: fx.Node) -> fx.Node | None:
    """The tensor of whose halves SiLU and its product are; None if there is none."""
    users, gate = list(silu.users), silu.args[0]
    if len(users) != 1 or users[0].target is not aten.mul.Tensor:
        return None
    left, right = users[0].args[:2]
    value = right if left is silu else left
    if not (isinstance(gate, fx.Node) and isinstance(value, fx.Node)):
        return None
    if any(part.target is not aten.slice.Tensor for part in (gate, value)) or gate.args[0] is not value.args[0]:
        return None
    whole = gate.args[0]
    assert isinstance(whole, fx.Node)
    last, half = len(shape(whole)) - 1, shape(whole)[-1] // 2
    bounds = [part.args[1:4] for part in (gate, value)]
    return whole if shape(whole)[-1] == 2 * half and bounds == [(last, 0, half), (last, half, 2 * half)] else None
