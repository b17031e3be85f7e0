"""Writing into a pass's graph: every new node gets its fake result at once, so that shapes are always known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from .effects import EMPTY, is_scratch, is_view, storage, written

aten = torch.ops.aten
DESCRIPTION = ("module", "line")  # of a node's meta: where in the model it comes from


@cache
def fake_mode() -> FakeTensorMode:
    """The one mode that all fake results belong to; made when first used, since it loads much of torch."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake(node: fx.Node) -> Tensor:
    """The fake result of a node: its shape, dtype, strides and device."""
    value: Tensor = node.meta["val"]
    return value


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in fake(node).shape)


class Editor:
    """Appends calls to a graph; within `before(at)`, inserts them there, as part of what `at` is of the model."""

    def __init__(self, graph: fx.Graph, origin: fx.Node | None = None) -> None:
        self.graph, self.origin = graph, origin
        self._copies: dict[tuple[fx.Node, int], fx.Node] = {}

    @contextmanager
    def before(self, at: fx.Node) -> Iterator[None]:
        old, self.origin = self.origin, at
        with self.graph.inserting_before(at):
            yield
        self.origin = old

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an ATen or `inferix::` op."""
        node = self.graph.create_node("call_function", op, args, kwargs, name=short_name(op))
        if self.origin is not None:
            node.meta = {key: self.origin.meta[key] for key in DESCRIPTION if key in self.origin.meta}
        node.meta["val"] = evaluated(node)
        return node

    def scratch(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> fx.Node:
        """Memory that one later node fills."""
        return self.call(EMPTY, list(size), dtype=dtype, device=device, pin_memory=False)

    def like(self, node: fx.Node, size: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> fx.Node:
        """Scratch, by default of a node's shape and dtype."""
        value = fake(node)
        return self.scratch(shape(node) if size is None else size, dtype or value.dtype, value.device)

    def view(self, node: fx.Node, size: Sequence[int]) -> fx.Node:
        """The same memory under another shape; the node itself where it has that shape."""
        while node.target is aten.view.default and fake(node).is_contiguous() and shape(node) != tuple(size):
            (node,) = node.all_input_nodes
        return node if tuple(size) == shape(node) else self.call(aten.view.default, node, list(size))

    def refresh_views(self, node: fx.Node) -> None:
        """Recompute the fake results of the views of a node whose strides have changed."""
        for user in list(node.users):
            if is_view(user):
                user.meta["val"] = evaluated(user)
                self.refresh_views(user)

    def dense(self, node: fx.Node) -> fx.Node:
        """The node if its memory is in order, else a copy that is; slices of one tensor share the copy."""
        if fake(node).is_contiguous():
            return node
        if node.target is aten.select.int:
            whole, dim, index = node.args
            assert isinstance(whole, fx.Node) and isinstance(dim, int)
            return self.call(aten.select.int, self._copy(whole, dim), 0, index)
        return self._copy(node, 0)

    def _copy(self, node: fx.Node, dim: int) -> fx.Node:
        """A copy in order with dimension `dim` in front, made once, right after the node."""
        if (node, dim) not in self._copies:
            order = [dim, *(other for other in range(len(shape(node))) if other != dim)]
            with self.before(after(node)):
                self.origin = node
                permuted = self.call(aten.permute.default, node, order) if dim else node
                self._copies[node, dim] = self.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        return self._copies[node, dim]


def evaluated(node: fx.Node) -> Any:
    """The fake result of a call, from those of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), fake)
    assert callable(node.target)
    with fake_mode():
        return node.target(*args, **kwargs)


def after(node: fx.Node) -> fx.Node:
    """The node to insert before, so as to come right after a value is there."""
    base = storage(node)
    writers = [user for user in base.users if base in map(storage, written(user))] if is_scratch(base) else []
    return max([node, *writers]).next


def short_name(op: Callable[..., Any]) -> str:
    """`linear` for `aten::linear`."""
    return op._schema.name.split("::")[1] if isinstance(op, torch._ops.OpOverload) else op.__name__
