"""A lowered graph as data: buffers, views of them, and calls in order.

Nothing here holds a tensor. Which arguments a call writes is read from its op's schema, never guessed from who
uses the result: an op that only writes pages returns nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch._ops import OpOverload

from .types import Role


class Form(StrEnum):
    """The way a result reaches its place: by an `out=` form, by an op that writes its arguments, or by a copy."""

    OUT = "out"
    WRITES = "writes"
    COPIED = "copied"


@dataclass(frozen=True)
class Buffer:
    """A tensor with memory of its own; strides are in elements."""

    name: str
    role: Role
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last."""
        if 0 in self.size:
            return 0
        return (1 + sum((n - 1) * by for n, by in zip(self.size, self.stride, strict=True))) * self.dtype.itemsize


@dataclass(frozen=True)
class Ref:
    """A view of a buffer; strides and offset are in elements of `dtype`."""

    buffer: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The size, by the name that tensors have for it."""
        return self.size

    def covers(self, buffer: Buffer) -> bool:
        """Return True for all of a buffer, laid out as it is."""
        return (self.dtype, self.size, self.stride, self.offset) == (buffer.dtype, buffer.size, buffer.stride, 0)


@dataclass(frozen=True)
class Call:
    """One launch. Arguments are references, literals, or tuples of them.

    outs: where results go, None for one that is dropped; arguments that the op's schema marks as written are not
    among them. node: the graph's node that it came from.
    """

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[Ref | None, ...]
    form: Form
    node: str

    @property
    def named(self) -> dict[str, Any]:
        """Arguments by the names of the op's schema."""
        names = (argument.name for argument in self.op._schema.arguments)
        return dict(zip(names, self.args, strict=False)) | dict(self.kwargs)

    @property
    def allocates(self) -> bool:
        """Return True if torch allocates in the call: without an `out=` form, or with one that copies a new tensor."""
        return self.form is Form.COPIED or torch.Tag.generated in self.op.tags

    @property
    def reads(self) -> tuple[Ref, ...]:
        """References among the arguments, those that are written too."""
        return (*references(self.args), *references([value for _, value in self.kwargs]))

    @property
    def writes(self) -> tuple[Ref, ...]:
        """References that the call writes."""
        arguments = self.op._schema.arguments
        by_name = {argument.name: argument for argument in arguments}
        given = [*zip(arguments, self.args, strict=False), *((by_name[name], value) for name, value in self.kwargs)]
        marked = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        return (*references(marked), *(ref for ref in self.outs if ref is not None))

    @property
    def touches(self) -> frozenset[str]:
        """Names of all buffers that the call reads or writes."""
        return frozenset(ref.buffer for ref in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Section:
    """Calls [first, stop) of a program, which came from one graph."""

    name: str
    first: int
    stop: int


@dataclass(frozen=True)
class Program:
    """Buffers by name, calls in order, and what they leave, by name."""

    buffers: Mapping[str, Buffer]
    calls: tuple[Call, ...]
    outputs: Mapping[str, Ref]
    sections: tuple[Section, ...]

    def of(self, role: Role) -> tuple[Buffer, ...]:
        return tuple(buffer for buffer in self.buffers.values() if buffer.role is role)

    def text(self) -> str:
        """One call a line under the name of its section; those that make torch allocate are marked with a star."""
        lines = []
        for section in self.sections:
            lines += [f"{section.name}:", *map(shown, self.calls[section.first : section.stop])]
        return "\n".join(lines)


def references(argument: Any) -> Iterator[Ref]:
    """The references in an argument."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from references(part)


def shown(call: Call) -> str:
    """`* aten::addmm.out(bias, x[12, 64], w[64, 64]) -> y[12, 64]`."""

    def word(argument: Any) -> str:
        if isinstance(argument, Ref):
            return f"{argument.buffer}[{', '.join(map(str, argument.size))}]"
        return f"({', '.join(map(word, argument))})" if isinstance(argument, tuple) else str(argument)

    words = [*map(word, call.args), *(f"{name}={word(value)}" for name, value in call.kwargs)]
    written = ", ".join(dict.fromkeys(map(word, call.writes)))
    return f"{'*' if call.allocates else ' '} {call.op.name()}({', '.join(words)}) -> {written}"
