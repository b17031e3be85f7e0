"""Lowered programs as plain JSON values and back: what an artefact keeps of a graph.

Ops are stored by name and looked up when read, so a file names what it needs and a missing op is one clear error. A
program that is read calls only ops that lowering emits, refers to nothing outside its buffers, and has the places that
the planner gives.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InferixError, quoted
from .lowered import Lowered, Planned
from .lowering import emits
from .plan import BufferPlan, Slot, plan_buffers
from .program import Buffer, Call, Form, Program, Ref, Section
from .types import Role, Value, When

LARGEST = 1 << 48  # of sizes, strides and offsets
MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
NAMED = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def encode_lowered(lowered: Lowered) -> dict[str, Any]:
    return {
        "body": encode_planned(lowered.body),
        "fold": None if lowered.fold is None else encode_planned(lowered.fold),
        "prompt": None if lowered.prompt is None else encode_planned(lowered.prompt),
        "frames": None if lowered.frames is None else encode_planned(lowered.frames),
        "literals": {name: encode_literal(value) for name, value in lowered.literals.items()},
    }


def decode_lowered(data: dict[str, Any]) -> Lowered:
    """The inverse; InferixError for what `encode_lowered` cannot have written, or an op that is not installed."""
    try:
        return Lowered(
            body=decode_planned(data["body"]),
            fold=None if data["fold"] is None else decode_planned(data["fold"]),
            prompt=None if data["prompt"] is None else decode_planned(data["prompt"]),
            literals={name: decode_literal(value) for name, value in data["literals"].items()},
            frames=None if data["frames"] is None else decode_planned(data["frames"]),
        )
    except MALFORMED as error:
        message = quoted(f"{type(error).__name__}: {error}")
        raise InferixError(f"the stored graph is malformed ({message}); make it again") from error


def encode_planned(planned: Planned) -> dict[str, Any]:
    program, plan = planned.program, planned.plan
    return {
        "buffers": [
            [buffer.name, buffer.role.value, word(buffer.dtype), list(buffer.size), list(buffer.stride)]
            for buffer in program.buffers.values()
        ],
        "calls": [
            [call.op.name(), encode(call.args), encode(call.kwargs), encode(call.outs), call.form.value, call.node]
            for call in program.calls
        ],
        "outputs": {name: encode(ref) for name, ref in program.outputs.items()},
        "sections": [[section.name, section.first, section.stop] for section in program.sections],
        "plan": {
            "slots": [[list(slot.buffers), slot.offset, slot.size, slot.first, slot.last] for slot in plan.slots],
            "size": plan.size,
            "live": plan.live,
            "peak": plan.peak,
        },
    }


def decode_planned(data: dict[str, Any]) -> Planned:
    """A program and its plan; ValueError, or another of `MALFORMED`, for what no lowering gives."""
    buffers = {
        name: Buffer(name, Role(role), named(torch.dtype, dtype), numbers(size), numbers(stride))
        for name, role, dtype, size, stride in data["buffers"]
    }
    calls = tuple(
        Call(op_named(op), decode(args), decode(kwargs), decode(outs), Form(form), node)
        for op, args, kwargs, outs, form, node in data["calls"]
    )
    outputs = {name: decode(ref) for name, ref in data["outputs"].items()}
    sections = tuple(Section(*section) for section in data["sections"])
    slots = tuple(Slot(tuple(names), *rest) for names, *rest in data["plan"]["slots"])
    plan = BufferPlan(slots, data["plan"]["size"], data["plan"]["live"], data["plan"]["peak"])
    program = Program(buffers, calls, outputs, sections)
    check_program(program)
    if plan != plan_buffers(program):
        raise ValueError("its buffers do not lie where the planner puts them")
    return Planned(program, plan)


def check_program(program: Program) -> None:
    """ValueError for calls that lowering does not emit, and for references beyond their buffers."""
    for call in program.calls:
        if not emits(call.op, call.form):
            raise ValueError(f"lowering does not emit {call.op.name()} as {call.form}")
        if call.form is not Form.WRITES and len(call.outs) != len(call.op._schema.returns):
            raise ValueError(f"{call.op.name()} has {len(call.outs)} results")
        for ref in (*call.reads, *call.writes):
            check_ref(program, ref)
    for ref in program.outputs.values():
        check_ref(program, ref)
    for section in program.sections:
        if not 0 <= section.first <= section.stop <= len(program.calls):
            raise ValueError(f"section {section.name} is of calls {section.first} to {section.stop}")


def check_ref(program: Program, ref: Ref) -> None:
    buffer = program.buffers[ref.buffer]
    begin, end = ref.offset * ref.dtype.itemsize, Buffer("", buffer.role, ref.dtype, ref.size, ref.stride).nbytes
    if len(ref.size) != len(ref.stride) or begin + end > buffer.nbytes:
        raise ValueError(f"a reference of {begin + end} bytes is beyond {ref.buffer}, which has {buffer.nbytes}")


def numbers(data: Any) -> tuple[int, ...]:
    """Sizes, strides or offsets."""
    if not isinstance(data, list) or not all(type(number) is int and 0 <= number < LARGEST for number in data):
        raise ValueError(f"{quoted(data)} are no sizes or strides")
    return tuple(data)


def named(kind: type[Any], word: str) -> Any:
    """torch.float32 of `float32`."""
    value = getattr(torch, word)
    if not isinstance(value, kind):
        raise ValueError(f"torch.{word} is no {kind.__name__}")
    return value


def encode_literal(value: Value) -> list[Any]:
    return [value.name, list(value.shape), word(value.dtype), list(value.data or ())]


def decode_literal(data: list[Any]) -> Value:
    name, shape, dtype, values = data
    return Value(name, Role.CONSTANT, numbers(shape), named(torch.dtype, dtype), When.LOAD, tuple(map(float, values)))


def encode(argument: Any) -> Any:
    """An argument of a call: numbers and words as they are, all else tagged."""
    if isinstance(argument, Ref):
        where = [argument.buffer, word(argument.dtype), list(argument.size), list(argument.stride), argument.offset]
        return {"ref": where}
    if isinstance(argument, tuple):
        return [encode(part) for part in argument]
    if isinstance(argument, torch.dtype | torch.layout | torch.memory_format):
        return {NAMED[type(argument)]: word(argument)}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    return argument


def decode(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(decode(part) for part in data)
    if not isinstance(data, dict):
        return data
    ((tag, value),) = data.items()
    if tag == "ref":
        buffer, dtype, size, stride, offset = value
        (at,) = numbers([offset])
        return Ref(buffer, named(torch.dtype, dtype), numbers(size), numbers(stride), at)
    return torch.device(value) if tag == "device" else named(next(kind for kind in NAMED if NAMED[kind] == tag), value)


def word(value: torch.dtype | torch.layout | torch.memory_format) -> str:
    """`float32` of torch.float32."""
    return str(value).removeprefix("torch.")


def op_named(name: str) -> torch._ops.OpOverload:
    """The op of `aten::addmm.out`; InferixError for one that is not there."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except AttributeError as error:
        raise InferixError(f"op {name} of the stored graph is not in this installation; make it again") from error
    if not isinstance(op, torch._ops.OpOverload):
        raise InferixError(f"the stored graph calls {quoted(name)}, which is no op; make it again")
    return op
