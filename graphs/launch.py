"""A program bound to tensors: every argument is resolved once, and running it is a loop over ready calls.

Between the first call and the last there is no allocation of ours, no view and no decision; calls that make torch
allocate are those that `Program.text` marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .plan import BufferPlan
from .program import Buffer, Call, Form, Program, Ref
from .types import Role

Launch = Callable[[], object]


class LaunchPlan:
    """A program on the tensors it was bound to. calls: ready to run, one for each of the program's.

    arena: uint8, at least the plan's size, on the device of the calls. given: tensors of all other buffers, with
    their shapes, strides and dtypes; ValueError for one that is missing or differs.
    """

    def __init__(self, program: Program, plan: BufferPlan, arena: Tensor, given: Mapping[str, Tensor]) -> None:
        self.program, self.plan, self.given = program, plan, given
        self.flat = {
            name: _scratch(plan, name, buffer, arena) if buffer.role is Role.SCRATCH else _given(buffer, given)
            for name, buffer in program.buffers.items()
            if buffer.role is not Role.SCRATCH or name in plan.offsets
        }
        self.calls: tuple[Launch, ...] = tuple(self._bound(call) for call in program.calls)
        self.outputs = {name: self.view(ref) for name, ref in program.outputs.items()}

    def run(self) -> None:
        """Launch every call, in order."""
        for call in self.calls:
            call()

    def run_with(self, before: Callable[[int], object]) -> None:
        """The same, with `before(index)` ahead of each call, and once more after the last."""
        for index, call in enumerate(self.calls):
            before(index)
            call()
        before(len(self.calls))

    def view(self, ref: Ref) -> Tensor:
        flat = self.flat[ref.buffer]
        return flat.view(ref.dtype).as_strided(ref.size, ref.stride, _offset(flat, ref))

    def _bound(self, call: Call) -> Launch:
        args = self._argument(call.args)
        kwargs = {name: self._argument(value) for name, value in call.kwargs}
        outs = self._argument(call.outs)
        if call.form is Form.COPIED:
            return partial(_run_and_copy, partial(call.op, *args, **kwargs), outs)
        places = [argument.name for argument in call.op._schema.arguments if argument.is_out]
        return partial(call.op, *args, **kwargs, **dict(zip(places, outs, strict=True)))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.view(value)
        return tuple(map(self._argument, value)) if isinstance(value, tuple) else value


def _scratch(plan: BufferPlan, name: str, buffer: Buffer, arena: Tensor) -> Tensor:
    """The bytes of a scratch buffer."""
    offset = plan.offsets[name]
    return arena[offset : offset + buffer.nbytes]


def _given(buffer: Buffer, given: Mapping[str, Tensor]) -> Tensor:
    """The elements of a buffer that came from outside, as they lie."""
    if buffer.name not in given:
        raise ValueError(f"{buffer.name} is not given; the program reads it as {buffer.role.value}")
    tensor = given[buffer.name].detach()
    layout = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    if layout != (buffer.dtype, buffer.size, buffer.stride):
        raise ValueError(f"{buffer.name} is {layout}; expected {(buffer.dtype, buffer.size, buffer.stride)}")
    return tensor.as_strided((buffer.nbytes // tensor.itemsize,), (1,))


def _offset(flat: Tensor, ref: Ref) -> int:
    """Where a view begins in its storage, in elements of its dtype."""
    return flat.storage_offset() * flat.itemsize // ref.dtype.itemsize + ref.offset


def _run_and_copy(call: Callable[[], Any], places: tuple[Tensor | None, ...]) -> None:
    returned = call()
    for place, result in zip(places, returned if isinstance(returned, tuple) else (returned,), strict=True):
        if place is not None:
            place.copy_(result)
