"""The normal form of a traced pass: one way of writing what models write in several.

Reshapes are `aten.view`, after an explicit copy where memory is not in order; slices are `aten.select` and
`aten.slice`, transposes `aten.permute`, casts `aten._to_copy`, fresh memory `aten.empty`; what does nothing is gone.
Elementwise results have their memory in order, which costs a copy where operands do not. Arguments are positional
where the schema allows, without trailing defaults. Rewrites rely on it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from ..errors import UsageError
from .edit import Editor, aten, fake, fake_mode, shape
from .effects import EMPTY, drop_dead, storage, written

CHECKS = (aten._assert_tensor_metadata.default, aten.promote_types.default)
NOTHING = (
    aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)  # fmt: skip
RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.view_as.default,
    aten.reshape_as.default,
)  # fmt: skip
EMPTIES = (EMPTY, aten.empty_like.default, aten.new_empty.default)
TRANSPOSES = (aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int, aten.mT.default)
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
    aten.type_as.default,
)  # fmt: skip
SPLITS = (
    aten.unbind.int, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
    aten.tensor_split.sections,
)  # fmt: skip
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)  # dimensions are counted from the last one
ROWWISE = (aten.layer_norm.default, aten.rms_norm.default, aten.linear.default)  # they copy into order themselves


def normal_form(graph: fx.Graph) -> fx.Graph:
    """A copy of an exported graph in normal form; UsageError for a call that a pass cannot hold, with its line."""
    return Normaliser().run(graph)


class Normaliser:
    """Copies a graph node by node."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.edit = Editor(self.graph)
        self.copies: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {}  # of calls that return several tensors

    def run(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            self.edit.origin = node
            if node.op == "placeholder":
                self.copies[node] = self.graph.placeholder(node.name)
                self.copies[node].meta = dict(node.meta)
            elif node.op == "output":
                self.graph.output(tuple(self.own(self.copies[result]) for result in node.args[0]))
            elif node.target is operator.getitem:
                whole, index = node.args
                self.copies[node] = self.parts[whole][index]
            elif node.target not in CHECKS:
                self.copy(node)
        drop_dead(self.graph)
        return self.graph

    def own(self, result: fx.Node) -> fx.Node:
        """A result in memory of its own: what a pass hands on must not change when its inputs do."""
        given = storage(result).op == "placeholder"
        return self.edit.call(aten.clone.default, result) if given else self.edit.dense(result)

    def copy(self, node: fx.Node) -> None:
        check_call(node)
        mapped: Any = map_arg((node.args, node.kwargs), self.copies.__getitem__)
        args, kwargs = mapped
        if node.target in SPLITS:
            self.parts[node] = self.split(node, args[0])
        elif args and isinstance(args[0], fx.Node):
            self.copies[node] = self.call(node.target, args[0], args, kwargs, node.meta["val"])
        else:
            self.copies[node] = self.plain(node.target, args, kwargs, node.meta["val"])

    def call(self, op: Any, x: fx.Node, args: Any, kwargs: Any, result: Any) -> fx.Node:
        """The normal form of a call on x."""
        edit, size = self.edit, [int(size) for size in result.shape] if isinstance(result, Tensor) else []
        if op in NOTHING or (op is aten.dropout.default and not args[2]) or (op is aten.clone.default and dense(x)):
            return x
        if op is aten.contiguous.default:
            return edit.dense(x)
        if op in RESHAPES:
            return edit.view(x if self.viewable(x, size) else edit.dense(x), size)
        if op in TRANSPOSES:
            probe = torch.empty(tuple(range(2, 2 + len(size))), device="meta")
            return self.permuted(x, [place - 2 for place in op(probe, *args[1:], **kwargs).shape])
        if op in CASTS:
            return x if result.dtype == fake(x).dtype else edit.call(aten._to_copy.default, x, dtype=result.dtype)
        if op is aten.select.int:
            return edit.call(op, x, args[1] % len(shape(x)), args[2] % shape(x)[args[1]])
        if op is aten.slice.Tensor:
            defaults: list[Any] = [0, None, None, 1]
            dim, first, last, step = list(args[1:]) + defaults[len(args) - 1 :]
            start, stop, step = slice(first, last, step).indices(shape(x)[dim])
            return self.sliced(x, dim % len(shape(x)), start, stop, step)
        if op in (aten.expand.default, aten.expand_as.default):
            return x if tuple(size) == shape(x) else edit.call(aten.expand.default, x, size)
        if (op is aten.pow.Tensor_Scalar and args[1] == 2) or (op is aten.mul.Tensor and args[1] is x):
            return edit.call(aten.square.default, x)
        return self.plain(op, args, kwargs, result)

    def plain(self, op: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        """The same call, its arguments in the schema's order."""
        if op in EMPTIES:
            return self.edit.scratch([int(size) for size in result.shape], result.dtype, result.device)
        declared = op._schema.arguments
        given = {argument.name: value for argument, value in zip(declared, args, strict=False)} | kwargs
        if op in REDUCTIONS:
            rank = len(shape(args[0]))
            given["dim"] = [dim - rank if dim >= 0 else dim for dim in given["dim"]]
        positional = [argument for argument in declared if not argument.kwarg_only]
        args = [given.get(argument.name, argument.default_value) for argument in positional]
        while args and is_default(args[-1], positional[len(args) - 1]):
            args.pop()
        if (torch.Tag.pointwise in op.tags and not result.is_contiguous()) or op in ROWWISE:
            args = [self.edit.dense(arg) if isinstance(arg, fx.Node) else arg for arg in args]
        kwargs = {
            argument.name: given[argument.name]
            for argument in declared
            if argument.kwarg_only and argument.name in given and not is_default(given[argument.name], argument)
        }
        return self.edit.call(op, *args, **kwargs)

    def split(self, node: fx.Node, x: fx.Node) -> list[fx.Node]:
        """Each part of a split as a slice, of an unbind as a selection."""
        assert isinstance(node.target, OpOverload)
        names = [argument.name for argument in node.target._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        dim = int(given.get("dim", 0)) % len(shape(x))
        if node.target is aten.unbind.int:
            return [self.edit.call(aten.select.int, x, dim, index) for index in range(shape(x)[dim])]
        parts, start = [], 0
        for part in node.meta["val"]:
            stop = start + int(part.shape[dim])
            parts.append(self.sliced(x, dim, start, stop, 1))
            start = stop
        return parts

    def sliced(self, x: fx.Node, dim: int, start: int, stop: int, step: int) -> fx.Node:
        if (start, stop, step) == (0, shape(x)[dim], 1):
            return x
        return self.edit.call(aten.slice.Tensor, x, dim, start, stop, *((step,) if step != 1 else ()))

    def permuted(self, x: fx.Node, order: list[int]) -> fx.Node:
        if x.target is aten.permute.default:
            inner: Any = x.args[1]
            x, order = x.all_input_nodes[0], [int(inner[dim]) for dim in order]
        return x if order == sorted(order) else self.edit.call(aten.permute.default, x, order)

    def viewable(self, x: fx.Node, size: list[int]) -> bool:
        """Return True for a reshape that needs no copy."""
        with fake_mode():
            reshaped = fake(x).reshape(size)
        return reshaped.untyped_storage()._cdata == fake(x).untyped_storage()._cdata


def dense(node: fx.Node) -> bool:
    return fake(node).is_contiguous()


def is_default(value: Any, argument: torch.Argument) -> bool:
    """Return True if leaving the argument out means the same."""
    default = argument.default_value
    return argument.has_default_value() and type(value) is type(default) and value == default


def check_call(node: fx.Node) -> None:
    """UsageError for what a graph without host code and hidden writes cannot hold."""
    op = node.target
    if not isinstance(op, OpOverload):
        raise UsageError(f"{op} at {node.meta['line']} is no tensor op; a pass holds ATen and custom ops alone")
    if torch.Tag.data_dependent_output in op.tags or op in (aten.item.default, aten._local_scalar_dense.default):
        raise UsageError(f"{op._schema.name} at {node.meta['line']} reads a value off the device; keep it a tensor")
    if op.namespace == "aten" and written(node) and op not in NOTHING:
        raise UsageError(
            f"{op._schema.name} at {node.meta['line']} changes a tensor in place; write it without the underscore"
        )
