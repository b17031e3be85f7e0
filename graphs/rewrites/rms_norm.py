"""rms-norm: an RMS norm that no rotation follows, in one kernel.

Precondition: an RMS norm over the last dimension with a weight, in one of the ways that models write it.
Claim: equal to rounding; the kernel does not round before the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edit import Editor, aten, fake, shape
from ..match import Match, Pattern
from ..types import PassGraph
from .base import ops


def wan_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As Wan writes it: in float32 or better, rounded before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As torch has it."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


NORMS: tuple[Callable[[Tensor, Tensor, float], Tensor], ...] = (wan_rms_norm, torch_rms_norm)


@cache
def patterns(dtype: torch.dtype) -> tuple[Pattern, ...]:
    return tuple(Pattern.of(norm, {"x": (2, 3, 5), "weight": (5,)}, dtype, scalars=("eps",)) for norm in NORMS)


def rms_norm(graph: PassGraph) -> int:
    """Put `inferix::rms_norm` in the place of norms."""
    edit, places = Editor(graph.graph), 0
    roots = (aten.rsqrt.default, aten.rms_norm.default)
    for dtype in dict.fromkeys(fake(node).dtype for node in graph if node.target in (aten.mul.Tensor, *roots)):
        for pattern in patterns(dtype) if dtype.is_floating_point else ():
            for match in pattern.matches(graph.graph):
                fuse(edit, match)
                places += 1
    return places


def fuse(edit: Editor, match: Match) -> None:
    with edit.before(match.anchor):
        x, weight = match.input(edit, "x"), match.input(edit, "weight")
        rows = edit.view(x, (prod(shape(x)[:-1]), shape(x)[-1]))
        out = edit.like(rows)
        edit.call(ops.rms_norm.default, rows, weight, out, match.scalar("eps"))
        match.replace(edit, out)
