"""adaln: what stands between two matmuls, in one kernel: gated or plain residual, layer norm, modulation or weights.

Precondition: a layer norm over the last dimension with a scale and shift per frame, or with weight and bias, all in
one dtype; and, for the residual before it, that nothing uses the sum before the norm does.
Claim: equal to rounding; the kernel normalises the sum before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..edit import Editor, fake, shape
from ..match import Match, Pattern, users
from ..types import PassGraph
from .base import ops

ROWS, FRAMES, PER_FRAME, DIM = 2, 3, 5, 7
TOKENS = (ROWS, FRAMES * PER_FRAME, DIM)
EACH_FRAME = (ROWS, FRAMES, DIM)
ADALN = ops.adaln.default
X, UPDATE, GATE, RESIDUAL, EPS = 0, 1, 2, 7, 10  # arguments of the op


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, scaled and shifted per frame."""
    frames = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm with weight and bias."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Residual sum, the update scaled per frame."""
    return x + (update.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


def plain(x: Tensor, update: Tensor) -> Tensor:
    """Residual sum."""
    return x + update


@cache
def patterns(dtype: torch.dtype) -> tuple[tuple[Pattern, ...], tuple[Pattern, ...]]:
    """Norms, then the sums before them, the more specific first."""
    norms = (
        Pattern.of(modulated, {"x": TOKENS, "shift": EACH_FRAME, "scale": EACH_FRAME}, dtype, scalars=("eps",)),
        Pattern.of(affine, {"x": TOKENS, "weight": (DIM,), "bias": (DIM,)}, dtype, scalars=("eps",)),
    )
    sums = (
        Pattern.of(gated, {"x": TOKENS, "update": TOKENS, "gate": EACH_FRAME}, dtype),
        Pattern.of(plain, {"x": TOKENS, "update": TOKENS}, dtype),
    )
    return norms, sums


def adaln(graph: PassGraph) -> int:
    """Put `inferix::adaln` in the place of norms, then let each take in the sum before it."""
    edit, places = Editor(graph.graph), 0
    for dtype in dtypes(graph):
        norms, sums = patterns(dtype)
        for norm in norms:
            for match in norm.matches(graph.graph):
                if len(shape(match.seen["x"])) == 3:
                    fuse_norm(edit, match)
                    places += 1
        for node in graph.graph.find_nodes(op="call_function", target=ADALN):
            if node.args[UPDATE] is None:
                take_in(edit, node, sums)
    return places


def dtypes(graph: PassGraph) -> Iterator[torch.dtype]:
    """Of the layer norms in a graph."""
    norms = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    yield from {fake(norm).dtype for norm in norms}


def fuse_norm(edit: Editor, match: Match) -> None:
    with edit.before(match.anchor):
        x = match.input(edit, "x")
        given = {name: match.input(edit, name) for name in match.given if name != "x"}
        residual, normed = edit.like(x), edit.like(x)
        edit.call(
            ADALN, x, None, None, given.get("shift"), given.get("scale"), given.get("weight"), given.get("bias"),
            residual, normed, None, match.scalar("eps"),
        )  # fmt: skip
        match.replace(edit, normed)


def take_in(edit: Editor, node: fx.Node, sums: tuple[Pattern, ...]) -> None:
    """Let an `adaln` make the sum that it normalises, and hand it on as `residual`."""
    total, residual = node.args[X], node.args[RESIDUAL]
    assert isinstance(total, fx.Node) and isinstance(residual, fx.Node)
    if any(user < node for user in users(total)):
        return
    for pattern in sums:
        match = pattern.at(total)
        if match is not None and shape(match.seen["x"]) == shape(total):
            with edit.before(node):
                args = list(node.args)
                args[X] = match.input(edit, "x")
                args[UPDATE] = edit.view(edit.dense(match.given["update"]), shape(total))
                args[GATE] = match.input(edit, "gate") if "gate" in match.given else None
            node.args = tuple(args)
            for user in list(total.users):
                user.replace_input_with(total, residual)
            match.erase()
            return
