"""lowp: linear layers of the passes on FP8 or INT8 operands.

Precondition: the weight is one of the model's, or several one below the other, whose layers a precision map names and
does not except. Weights are packed once, by output channel; what comes in is packed by token: by `adaln` itself where
it feeds such FP8 layers alone, else by `quantise_rows`, which then does the GELU of a packed layer before it.
Claim: `inferix::linear_lowp` on packed operands; not equal to what it replaces, but to its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import prod

import torch
from torch import Tensor, fx, nn

from ...errors import UsageError, quoted
from ...kernels.linear_lowp import pack
from ..compose import copy_into
from ..edit import Editor, aten, fake, shape
from ..match import peeled, users
from ..trace import trace
from ..types import OF_SET, BlockGraph, PassGraph, Role, Value, When
from .base import cleaned, ops, replaced

FP8 = torch.float8_e4m3fn
KINDS = {"fp8": FP8, "int8": torch.int8}
NORMED, ROW_SCALE = 8, 9  # arguments of adaln
OUT, GELU = 5, 6  # arguments of linear_lowp


@dataclass(frozen=True)
class PrecisionMap:
    """Which layers run in low precision.

    kind: `fp8` or `int8`. layers: patterns of names, such as `blocks.*.ffn.*`; keep: of those left as they are.
    Embeddings always are: they have a row for a frame or a prompt, not for each token.
    """

    kind: str
    layers: tuple[str, ...]
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"low precision is {quoted(self.kind)}; expected one of {', '.join(KINDS)}")

    def has(self, layer: str) -> bool:
        """Return True for a layer, by the name of its module, that runs in low precision."""
        named = of_tokens(layer) and any(fnmatchcase(layer, pattern) for pattern in self.layers)
        return named and not any(fnmatchcase(layer, pattern) for pattern in self.keep)

    def check(self, layers: Iterable[str]) -> None:
        """UsageError for a pattern that none of these linear layers matches."""
        known = sorted(filter(of_tokens, layers))
        for pattern in (*self.layers, *self.keep):
            if not any(fnmatchcase(layer, pattern) for layer in known):
                raise UsageError(f"no linear layer of tokens is called {quoted(pattern)}; there is {quoted(known[0])}")


def of_tokens(layer: str) -> bool:
    return "embedding" not in layer.partition(".")[0]


def lowp(precision: PrecisionMap) -> Callable[[BlockGraph], tuple[BlockGraph, int]]:
    """The rewrite for a precision map; UsageError for a pattern of it that names no layer."""

    def apply(block: BlockGraph) -> tuple[BlockGraph, int]:
        precision.check(layer for graph in block.graphs for node in linears(graph) for layer in layers_of(graph, node))
        places = sum(pack_layers(graph, precision) for graph in block.passes)
        return replaced(block, [cleaned(graph) for graph in block.graphs]), places

    return apply


def linears(graph: PassGraph) -> list[fx.Node]:
    return [node for node in graph if node.target in (aten.linear.default, ops.linear_gelu.default)]


def layers_of(graph: PassGraph, node: fx.Node) -> list[str]:
    """Names of the layers whose weights a matmul has; none if they are not the model's own."""
    weight = node.all_input_nodes[1]
    parts = weight.all_input_nodes if weight.target is aten.cat.default else [weight]
    values = [graph.inputs.get(part.name) for part in parts]
    own = all(value is not None and value.role == Role.WEIGHT for value in values)
    names = [value.name.partition(OF_SET)[0] for value in values if value is not None]
    return [name.removesuffix(".weight") for name in names] if own else []


def pack_layers(graph: PassGraph, precision: PrecisionMap) -> int:
    """Put `inferix::linear_lowp` in the place of the layers that the map has."""
    kind = KINDS[precision.kind]
    layers = [node for node in linears(graph) if (names := layers_of(graph, node)) and all(map(precision.has, names))]
    edit = Editor(graph.graph)
    packed: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in layers:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        with edit.before(node):
            if peeled(x) not in packed:
                packed[peeled(x)] = quantised(edit, x, kind, layers)
            rows = prod(shape(x)[:-1])
            operand, scale = (edit.view(part, size) for part, size in zip(
                packed[peeled(x)], ((rows, shape(x)[-1]), (rows,)), strict=True
            ))  # fmt: skip
            weight, weight_scale = inlined(edit, edit.dense(node.args[1]), kind)  # type: ignore[arg-type]
            is_gelu = node.target is ops.linear_gelu.default
            bias = node.args[2] if len(node.args) > 2 else None
            out = node.args[3] if is_gelu else edit.like(x, (rows, shape(weight)[0]))
            edit.call(ops.linear_lowp.default, operand, weight, scale, weight_scale, bias, out, is_gelu)
            if not is_gelu:
                node.replace_all_uses_with(edit.view(out, shape(node)))  # type: ignore[arg-type]
        graph.graph.erase_node(node)
    return len(layers)


def quantised(edit: Editor, x: fx.Node, kind: torch.dtype, layers: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """A layer's input in low precision, [.., K], and the scale of each token."""
    base = peeled(x)
    norm = next((user for user in base.users if user.target is ops.adaln.default and user.args[NORMED] is base), None)
    if norm is not None and kind == FP8 and all(user in layers or user is norm for user in users(base)):
        with edit.before(norm):
            args = list(norm.args)
            args[NORMED] = edit.like(base, dtype=FP8)
            args[ROW_SCALE] = edit.like(base, shape(base)[:-1], torch.float32)
        norm.args = tuple(args)
        return args[NORMED], args[ROW_SCALE]  # type: ignore[return-value]
    matrix = edit.view(edit.dense(x), (prod(shape(x)[:-1]), shape(x)[-1]))
    gelu = take_gelu(base, layers)
    packed, scale = edit.like(matrix, dtype=kind), edit.like(matrix, shape(matrix)[:1], torch.float32)
    edit.call(ops.quantise_rows.default, matrix, packed, scale, gelu)
    return packed, scale


def take_gelu(base: fx.Node, layers: list[fx.Node]) -> bool:
    """Take the GELU off the packed layer that makes an input of packed layers alone; False where there is none."""
    user = next((user for user in base.users if user.target is ops.linear_lowp.default), None)
    if user is None or user.args[OUT] is not base or not user.args[GELU]:
        return False
    if not all(other in layers or other is user for other in users(base)):
        return False
    user.args = (*user.args[:GELU], False)
    return True


class _Pack(nn.Module):
    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(("packed", "scale"), pack(values["x"], self.kind), strict=True))


@cache
def packing(size: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype, device: torch.device) -> PassGraph:
    """The graph of `pack` on rows of a matrix."""
    value = Value("x", Role.INPUT, size, dtype, When.PASS)
    return trace("packing", _Pack(kind), [value], device=device)


def inlined(edit: Editor, x: fx.Node, kind: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """The calls of `pack` on a matrix, here."""
    matrix = fake(x)
    packed, scale = copy_into(edit.graph, packing(shape(x), matrix.dtype, kind, matrix.device), {"x": x})
    return packed, scale
