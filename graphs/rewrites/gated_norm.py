"""gated-norm: what follows a matmul in one kernel: gate, layer norm of the update, residual sum, and the next norm.

Precondition: an update times a gate per frame, a layer norm of it with weight and bias, both in float32 or better, and
its sum with the residual, rounded to the residual's dtype. A layer norm of that sum, with weight and bias in its dtype,
is taken in.
Claim: equal to rounding; the kernel normalises the sum before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..edit import Editor, aten, fake, shape
from ..match import Match, Pattern, users
from ..types import PassGraph
from .base import ops

ROWS, FRAMES, PER_FRAME, DIM = 2, 3, 5, 7
TOKENS = (ROWS, FRAMES * PER_FRAME, DIM)
GATED_NORM = ops.gated_norm.default
NEXT_WEIGHT, NEXT_BIAS, OUT, NORMED, NEXT_EPS = 5, 6, 7, 8, 10  # arguments of the op


def added(x: Tensor, update: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Residual sum of x and the norm of an update that is scaled per frame; gate and weights are wide already."""
    wide = update.to(gate.dtype).unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    norm = F.layer_norm(wide.flatten(1, 2), x.shape[-1:], weight, bias, eps)
    return (x.to(gate.dtype) + norm).to(x.dtype)


@cache
def pattern(dtype: torch.dtype, update: torch.dtype) -> Pattern:
    """The sum for a residual and an update of these dtypes."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {"x": TOKENS, "update": TOKENS, "gate": (ROWS, FRAMES, DIM), "weight": (DIM,), "bias": (DIM,)}
    dtypes = dict.fromkeys(("gate", "weight", "bias"), wide) | {"update": update}
    return Pattern.of(added, tensors, dtype, dtypes, scalars=("eps",))


def gated_norm(graph: PassGraph) -> int:
    """Put `inferix::gated_norm` in the place of sums, and let each take in the norm after it."""
    edit, places = Editor(graph.graph), 0
    norms = graph.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    for dtype in narrowest_first(fake(norm).dtype for norm in norms):
        for update in dict.fromkeys((dtype, torch.promote_types(dtype, torch.float32))):
            for match in pattern(dtype, update).matches(graph.graph):
                fuse(edit, match)
                places += 1
    for node in graph.graph.find_nodes(op="call_function", target=GATED_NORM):
        take_in(edit, node)
    return places


def narrowest_first(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """Each dtype once: the wide form of the sum also matches inside the narrow one, and would leave its casts."""
    return sorted(set(dtypes), key=lambda dtype: (dtype.itemsize, str(dtype)))


def fuse(edit: Editor, match: Match) -> None:
    with edit.before(match.anchor):
        x = match.input(edit, "x")
        update = edit.view(edit.dense(match.given["update"]), shape(x))
        given = (match.input(edit, name) for name in ("gate", "weight", "bias"))
        out, eps = edit.like(x), match.scalar("eps")
        edit.call(GATED_NORM, x, update, *given, None, None, out, None, eps, eps)
        match.replace(edit, out)


def take_in(edit: Editor, node: fx.Node) -> None:
    """Let a `gated_norm` compute the norm of its sum."""
    out = node.args[OUT]
    assert isinstance(out, fx.Node)
    for norm in users(out):
        if norm.target is not aten.layer_norm.default or shape(norm) != shape(out):
            continue
        given = (*norm.args[1:], *(None, None, 1e-5)[len(norm.args) - 2 :])  # its defaults
        width, *weights, eps = given[:4]
        known = all(isinstance(one, fx.Node) and one.op == "placeholder" for one in weights)
        if known and width == [shape(out)[-1]]:
            with edit.before(node):
                normed = edit.like(out)
            args = list(node.args)
            args[NEXT_WEIGHT : NEXT_BIAS + 1] = weights
            args[NORMED], args[NEXT_EPS] = normed, eps
            node.args = tuple(args)
            norm.replace_all_uses_with(normed)
            edit.graph.erase_node(norm)
            return
