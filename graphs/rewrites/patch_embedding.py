"""patch-embedding: a convolution over patches that do not overlap is a matmul over their entries.

Precondition: a 3-D convolution whose stride is its kernel, without padding, dilation or groups.
Claim: equal to rounding. The matmul writes tokens in order, so that the copy that put them in order is gone; the
convolution of torch has no `out=` form that does not allocate.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from ..edit import Editor, aten, fake, shape
from ..effects import is_view
from ..types import PassGraph

CONVOLUTION = aten.conv3d.default
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def patch_embedding(graph: PassGraph) -> int:
    """Put a linear layer in the place of convolutions over patches."""
    edit, places = Editor(graph.graph), 0
    for node in graph.graph.find_nodes(op="call_function", target=CONVOLUTION):
        if over_patches(node):
            fuse(edit, node)
            places += 1
    return places


def over_patches(node: fx.Node) -> bool:
    given = arguments(node)
    kernel = shape(given["weight"])[2:]
    steps = {name: spread(given.get(name, default)) for name, default in DEFAULTS.items() if name != "groups"}
    plain = steps["padding"] == (0, 0, 0) and steps["dilation"] == (1, 1, 1) and given.get("groups", 1) == 1
    fits = all(size % patch == 0 for size, patch in zip(shape(given["input"])[2:], kernel, strict=True))
    return plain and fits and steps["stride"] == kernel


def arguments(node: fx.Node) -> dict[str, Any]:
    names = (argument.name for argument in CONVOLUTION._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def spread(value: Any) -> tuple[int, ...]:
    """A number for each of three dimensions."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    return sizes * 3 if len(sizes) == 1 else sizes


def fuse(edit: Editor, node: fx.Node) -> None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    batch, channels, *size = shape(x)
    kernel = shape(weight)[2:]
    grid = [whole // patch for whole, patch in zip(size, kernel, strict=True)]
    with edit.before(node):
        split = [part for pair in zip(grid, kernel, strict=True) for part in pair]
        patches = edit.call(aten.permute.default, edit.view(edit.dense(x), (batch, channels, *split)), ORDER)
        rows = edit.view(edit.dense(patches), (batch * prod(grid), channels * prod(kernel)))
        matrix = edit.view(edit.dense(weight), (shape(weight)[0], channels * prod(kernel)))
        tokens = edit.call(aten.linear.default, rows, matrix, *([] if bias is None else [bias]))
        result = edit.call(aten.permute.default, edit.view(tokens, (batch, *grid, shape(weight)[0])), (0, 4, 1, 2, 3))
    node.replace_all_uses_with(result)
    edit.graph.erase_node(node)
    edit.refresh_views(result)
    drop_copies(result)


ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of [B, C, f, t, h, p, w, q]: patches first, then the entries of one


def drop_copies(node: fx.Node) -> None:
    """Remove copies of views of a node that are in order now."""
    for user in list(node.users):
        if is_view(user):
            drop_copies(user)
        elif user.target is aten.clone.default and fake(node).is_contiguous():
            user.replace_all_uses_with(node)
            user.graph.erase_node(user)
