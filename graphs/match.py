"""Finding places in a graph that compute what a plain function computes.

A pattern is the function itself, traced into the same normal form as the model; so what is matched is arithmetic, not
a way of writing. Views are looked through on both sides: a pattern says `[R, F, P, d]`, a model may hold `[R, F*P, d]`.
Sizes of a pattern stand for any sizes, each for one; numbers that it names as scalars stand for any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .edit import Editor, aten, shape
from .effects import is_scratch, written
from .trace import trace
from .types import PassGraph, Role, Value, When

COMMUTES = (aten.add.Tensor, aten.mul.Tensor)
POINTWISE = (aten._to_copy.default,)  # besides those that torch tags so
LAST_DIM = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim, aten.softmax.int)
SIZES = {aten.layer_norm.default: (1,), aten.rms_norm.default: (1,), aten.empty.memory_format: (0,)}


def peeled(node: fx.Node) -> fx.Node:
    """The node of which this one is a reshape."""
    while node.target is aten.view.default:
        (node,) = node.all_input_nodes
    return node


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any], scalars: Mapping[str, float]) -> None:
        super().__init__()
        self.function, self.scalars = function, scalars

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        returned = self.function(**values, **self.scalars)
        results = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        return {str(index): result for index, result in enumerate(results)}


@dataclass(frozen=True)
class Pattern:
    """A traced function. scalars: the odd numbers that stand for its scalar parameters, by name."""

    graph: PassGraph
    scalars: dict[str, float]

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        tensors: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype] | None = None,
        states: tuple[str, ...] = (),
        scalars: tuple[str, ...] = (),
    ) -> Pattern:
        """`function(**tensors, **scalars)`, its tensors in `dtype` unless `dtypes` says otherwise.

        Sizes that must be distinguished must differ and be neither 1 nor a product of others.
        """
        odd = {name: 0.0123 + index / 1024 for index, name in enumerate(scalars)}
        values = [
            Value(
                name, Role.STATE if name in states else Role.INPUT, size, (dtypes or {}).get(name, dtype), When.PASS,
                owned=True,
            )
            for name, size in tensors.items()
        ]  # fmt: skip
        return cls(trace(f"the pattern {function.__name__}", _Function(function, odd), values), odd)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that the function returns, without reshapes at the end."""
        return tuple(peeled(result) for result in self.graph.graph.output_node().args[0])  # type: ignore[union-attr, arg-type]

    @property
    def anchor(self) -> fx.Node:
        """The last call that counts: its last result, or the write that it is for."""
        calls = [node for node in self.graph if node in self.results or (not self.results and written(node))]
        return calls[-1]

    def at(self, node: fx.Node) -> Match | None:
        """The match that ends in `node`."""
        match = Match(self)
        return match if match.value(self.anchor, node) and match.is_closed() else None

    def matches(self, graph: fx.Graph) -> Iterator[Match]:
        """All matches, first to last; each may be replaced before the next is asked for."""
        for node in graph.find_nodes(op="call_function", target=self.anchor.target):
            match = self.at(node)
            if match is not None:
                yield match


@dataclass
class Match:
    """A place that a pattern matches.

    nodes: the call of each of the pattern's. given: the node of each of its inputs, without reshapes.
    seen: for inputs that the pattern uses as they are, the same with reshapes; for others `reshaped`: how pattern and
    model have it where it is used. sizes: for each of the pattern's, the one here. numbers: the same for scalars.
    """

    pattern: Pattern
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    given: dict[str, fx.Node] = field(default_factory=dict)
    seen: dict[str, fx.Node] = field(default_factory=dict)
    reshaped: dict[str, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    numbers: dict[float, float] = field(default_factory=dict)

    @property
    def _parts(self) -> tuple[dict[Any, Any], ...]:
        return self.nodes, self.given, self.seen, self.reshaped, self.sizes, self.numbers

    @property
    def anchor(self) -> fx.Node:
        return self.nodes[self.pattern.anchor]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The calls whose results are the function's, without reshapes."""
        return tuple(self.nodes[result] for result in self.pattern.results)

    def scalar(self, name: str) -> float:
        return self.numbers[self.pattern.scalars[name]]

    def input(self, edit: Editor, name: str) -> fx.Node:
        """The node matched for an input, in the shape that the function takes it in, its memory in order."""
        if name in self.seen:
            return edit.dense(self.seen[name])
        ours, theirs = map(shape, self.reshaped[name])  # the pattern added dimensions of 1
        size = [here for one, here in zip(ours, theirs, strict=True) if one != 1]
        return edit.view(edit.dense(self.given[name]), size)

    def replace(self, edit: Editor, *new: fx.Node) -> None:
        """Put new nodes in place of the results, each in the shape that the old one has, and remove what is left."""
        for old, node in zip(self.results, new, strict=True):
            old.replace_all_uses_with(edit.view(node, shape(old)))
        self.erase()

    def erase(self) -> None:
        """Remove the matched calls that nothing uses any more, with the reshapes between them."""
        for node in sorted(self.nodes.values(), reverse=True):
            for view in [user for user in node.users if user.target is aten.view.default and not user.users]:
                node.graph.erase_node(view)
            if not node.users and not is_scratch(node):
                node.graph.erase_node(node)

    def is_closed(self) -> bool:
        """Return True if nothing outside uses nodes inside, and no result is used before the last call."""
        inside = set(self.nodes.values())
        for pattern_node, node in self.nodes.items():
            outside = {user for user in users(node) if user not in inside}
            if pattern_node in self.pattern.results or is_scratch(node):
                if any(user < self.anchor for user in outside):
                    return False
            elif outside:
                return False
        return True

    def value(self, pattern_node: fx.Node, node: fx.Node) -> bool:
        """Return True if `node` computes the same as `pattern_node`, given all nodes matched so far."""
        base, here = peeled(pattern_node), peeled(node)
        if base.op == "placeholder":
            name = self.pattern.graph.inputs[base.name].name
            if base is pattern_node:
                self.seen.setdefault(name, node)
            elif len(shape(pattern_node)) == len(shape(node)):
                self.reshaped.setdefault(name, (pattern_node, node))
            else:
                return False
            return self.given.setdefault(name, here) is here
        if base in self.nodes:
            return self.nodes[base] is here
        if here.op != "call_function" or here.target is not base.target:
            return False
        before = [dict(part) for part in self._parts]
        self.nodes[base] = here
        orders = [base.args, (base.args[1], base.args[0], *base.args[2:])] if base.target in COMMUTES else [base.args]
        for args in orders:
            if self._call(base, args, here):
                return True
            for part, old in zip(self._parts, before, strict=True):
                part.clear()
                part.update(old)
            self.nodes[base] = here
        del self.nodes[base]
        return False

    def _call(self, base: fx.Node, args: Any, here: fx.Node) -> bool:
        if len(args) != len(here.args) or set(base.kwargs) != set(here.kwargs):
            return False
        free = SIZES.get(base.target, ())  # type: ignore[call-overload]
        pairs = zip(args, here.args, strict=True)
        same = all(self._argument(one, other, place in free) for place, (one, other) in enumerate(pairs))
        options = {name: value for name, value in base.kwargs.items() if name not in ("device", "pin_memory")}
        same = same and all(self._argument(value, here.kwargs[name], False) for name, value in options.items())
        return same and self._shapes(base, args, here)

    def _argument(self, expected: Any, actual: Any, free: bool) -> bool:
        if isinstance(expected, fx.Node):
            return isinstance(actual, fx.Node) and self.value(expected, actual)
        if isinstance(expected, list | tuple):
            return (
                isinstance(actual, list | tuple)
                and len(expected) == len(actual)
                and all(self._argument(one, other, free) for one, other in zip(expected, actual, strict=True))
            )
        if free:
            return self._size(expected, actual)
        if isinstance(expected, float) and expected in self.pattern.scalars.values():
            return isinstance(actual, int | float) and self.numbers.setdefault(expected, float(actual)) == float(actual)
        return type(expected) is type(actual) and expected == actual

    def _shapes(self, base: fx.Node, args: Any, here: fx.Node) -> bool:
        """Return True if shapes agree where they matter.

        They do not over the last dimension; elementwise calls only need to spread the same operands over the same
        dimensions.
        """
        if base.target in LAST_DIM or is_scratch(base):
            return True
        ours, theirs = ([shape(arg) for arg in part if isinstance(arg, fx.Node)] for part in (args, here.args))
        if base.target in POINTWISE or torch.Tag.pointwise in base.target.tags:  # type: ignore[union-attr]
            return self._spread(columns(ours), columns(theirs))
        return all(
            len(one) == len(other) and all(map(self._size, one, other)) for one, other in zip(ours, theirs, strict=True)
        )

    def _spread(self, ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> bool:
        """Compare sizes of operands by dimension, the last first. Leading dimensions that are spread alike, of which a
        model may have fewer or more, are not distinguished."""
        leading = len(ours)
        while leading and spread(ours[leading - 1]) == spread(ours[-1]):
            leading -= 1
        if len(theirs) < leading:
            return False
        for one, other in zip(ours[:leading], theirs, strict=False):
            if not self._size(max(one), max(other)):
                return False
        pairs = [*zip(ours[:leading], theirs, strict=False), *((ours[-1], other) for other in theirs[leading:])]
        return all(spread(one) == spread(other) or max(other) == 1 for one, other in pairs)

    def _size(self, expected: int, actual: int) -> bool:
        if expected == 1:
            return actual == 1
        return self.sizes.setdefault(expected, actual) == actual


def columns(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Sizes of operands by dimension, the last first, 1 where an operand lacks one."""
    rank = max(map(len, shapes), default=0)
    return [tuple(size[-dim] if dim <= len(size) else 1 for size in shapes) for dim in range(1, rank + 1)]


def spread(sizes: tuple[int, ...]) -> tuple[bool, ...]:
    """Which operands are spread over a dimension."""
    return tuple(size == 1 < max(sizes) for size in sizes)


def users(node: fx.Node) -> Iterator[fx.Node]:
    """Calls that use a node or a reshape of it."""
    for user in node.users:
        if user.target is aten.view.default:
            yield from users(user)
        else:
            yield user
