"""Calls on tensors, in the form that programs have them, so that both are counted by the same rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from .lowering import storage
from .program import Call, Form, Ref


def reference(tensor: Tensor) -> Ref:
    """A tensor as programs refer to one."""
    return Ref(memory_of(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())


def memory_of(tensor: Tensor) -> str:
    """A name of the memory that a tensor begins at; buffers of one arena have different ones."""
    return f"{storage(tensor)} {int(tensor.storage_offset()) * tensor.itemsize}"


def referred(value: Any) -> Any:
    """An argument with references in place of tensors."""
    if isinstance(value, Tensor):
        return reference(value)
    return tuple(map(referred, value)) if isinstance(value, list | tuple) else value


def observed_call(
    op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor], node: str
) -> Call:
    """A call that was made, with its results unless it wrote into its arguments."""
    outs = () if op._schema.is_mutable else tuple(map(reference, results))
    named = tuple((name, referred(value)) for name, value in kwargs.items())
    return Call(op, referred(tuple(args)), named, outs, Form.OUT, node)
