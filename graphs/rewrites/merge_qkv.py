"""merge-qkv: the three projections of an attention become one matmul.

Precondition: what one `rope_append` is given as queries, keys and values comes, through elementwise calls and
reductions over the last dimension, from three linear layers of one input, all with a bias or none. Their weights are
known before the first of them runs, as gathered ones are not.
Claim: each third of the merged projection is what its own layer gave; matmuls of another width may round differently.
"""

from __future__ import annotations

from torch import fx

from ..edit import Editor, aten, shape
from ..match import peeled
from ..types import PassGraph
from .base import ops

ALONG = (aten.mul.Tensor, aten._to_copy.default, aten.rms_norm.default, aten.view.default, aten.slice.Tensor)


def merge_qkv(graph: PassGraph) -> int:
    """One linear layer on the three weights, one below the other, and a slice of its result for each."""
    edit, places = Editor(graph.graph), 0
    for append in graph.graph.find_nodes(op="call_function", target=ops.rope_append.default):
        layers = [projection(part) for part in append.args[:3] if isinstance(part, fx.Node)]
        q, k, v = layers
        if q is None or k is None or v is None or len(set(layers)) < 3:
            continue
        same_input = len({peeled(layer.all_input_nodes[0]) for layer in (q, k, v)}) == 1
        if not same_input or len({len(layer.args) for layer in (q, k, v)}) > 1:
            continue
        first = min(q, k, v)
        if any(first < weight for layer in (q, k, v) for weight in layer.all_input_nodes[1:]):
            continue
        merge(edit, [q, k, v])
        places += 1
    return places


def projection(node: fx.Node) -> fx.Node | None:
    """The linear layer that a value comes from; None if there is another call on the way."""
    if node.target is aten.linear.default:
        return node
    layers = map(projection, node.all_input_nodes if node.target in ALONG else ())
    return next((layer for layer in layers if layer is not None), None)


def merge(edit: Editor, layers: list[fx.Node]) -> None:
    first = min(layers)
    with edit.before(first):
        parts = [
            edit.call(aten.cat.default, [layer.args[place] for layer in layers], 0)
            for place in range(1, len(first.args))
        ]
        merged = edit.call(aten.linear.default, first.args[0], *parts)
        modules = [str(layer.meta["module"]).rpartition(".") for layer in layers]
        merged.meta["module"] = "".join(modules[0][:2]) + "+".join(module[2] for module in modules)
        start, last = 0, len(shape(merged)) - 1
        for layer in layers:
            stop = start + shape(layer)[-1]
            part = edit.call(aten.slice.Tensor, merged, last, start, stop)
            layer.replace_all_uses_with(part)
            edit.refresh_views(part)
            start = stop
    for layer in layers:
        edit.graph.erase_node(layer)
