"""gelu: the GELU after a linear layer becomes the last step of its matmul.

Precondition: GELU in its tanh form, of a linear layer with bias that nothing else uses.
Claim: equal to rounding. `inferix::linear_gelu` is one kernel on a GPU (torch's matmul with the epilogue of cuBLASLt)
and two calls elsewhere, so on a CPU this changes the graph and not the time.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edit import Editor, fake, shape
from ..match import Match, Pattern
from ..types import PassGraph
from .base import ops


def linear_then_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@cache
def pattern(dtype: torch.dtype) -> Pattern:
    return Pattern.of(linear_then_gelu, {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,)}, dtype)


def gelu(graph: PassGraph) -> int:
    """Put `inferix::linear_gelu` in the place of a linear layer and its GELU."""
    edit, places = Editor(graph.graph), 0
    for dtype in dict.fromkeys(
        fake(node).dtype for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
    ):
        for match in pattern(dtype).matches(graph.graph):
            fuse(edit, match)
            places += 1
    return places


def fuse(edit: Editor, match: Match) -> None:
    x, weight, bias = (match.seen[name] for name in ("x", "weight", "bias"))
    with edit.before(match.anchor):
        rows = edit.view(edit.dense(x), (fake(x).numel() // shape(x)[-1], shape(x)[-1]))
        out = edit.like(x, (shape(rows)[0], shape(weight)[0]))
        edit.call(ops.linear_gelu.default, rows, edit.dense(weight), edit.dense(bias), out)
        match.replace(edit, out)
