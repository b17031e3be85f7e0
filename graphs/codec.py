"""Lowered programs as plain JSON values and back: what an artefact keeps of a graph.

Ops are stored by name and looked up when read, so a file names what it needs and a missing op is one clear error.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..errors import InferixError, quoted
from .lowered import Lowered, Planned
from .plan import BufferPlan, Slot
from .program import Buffer, Call, Form, Program, Ref, Section
from .types import Role, Value, When

Constant = TypeVar("Constant", torch.dtype, torch.layout, torch.memory_format)
NAMED = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def encode_lowered(lowered: Lowered) -> dict[str, Any]:
    return {
        "body": encode_planned(lowered.body),
        "fold": None if lowered.fold is None else encode_planned(lowered.fold),
        "prompt": None if lowered.prompt is None else encode_planned(lowered.prompt),
        "literals": {name: encode_literal(value) for name, value in lowered.literals.items()},
    }


def decode_lowered(data: dict[str, Any]) -> Lowered:
    """The inverse; InferixError for an op that is not installed, ValueError, TypeError or LookupError for damage."""
    return Lowered(
        body=decode_planned(data["body"]),
        fold=None if data["fold"] is None else decode_planned(data["fold"]),
        prompt=None if data["prompt"] is None else decode_planned(data["prompt"]),
        literals={name: decode_literal(value) for name, value in data["literals"].items()},
    )


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
    buffers = {
        name: Buffer(name, Role(role), constant(dtype, torch.dtype), tuple(size), tuple(stride))
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
    return Planned(Program(buffers, calls, outputs, sections), plan)


def encode_literal(value: Value) -> list[Any]:
    return [value.name, list(value.shape), word(value.dtype), list(value.data or ())]


def decode_literal(data: list[Any]) -> Value:
    name, shape, dtype, numbers = data
    return Value(name, Role.CONSTANT, tuple(shape), constant(dtype, torch.dtype), When.LOAD, tuple(numbers))


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
        return Ref(buffer, constant(dtype, torch.dtype), tuple(size), tuple(stride), offset)
    if tag == "device":
        return device(value)
    kinds: dict[str, Any] = {name: kind for kind, name in NAMED.items()}
    return constant(value, kinds[tag])


def device(name: Any) -> torch.device:
    """The device of a name; ValueError for any other value."""
    try:
        return torch.device(str(name))
    except RuntimeError as error:
        raise ValueError(f"{quoted(name)} is no device") from error


def constant(name: Any, kind: type[Constant]) -> Constant:
    """The dtype, layout or memory format of a name; ValueError for any other value."""
    value = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(value, kind):
        raise ValueError(f"{quoted(name)} is no {kind.__name__} of torch")
    return value


def word(value: torch.dtype | torch.layout | torch.memory_format) -> str:
    """`float32` of torch.float32."""
    return str(value).removeprefix("torch.")


def op_named(name: str) -> torch._ops.OpOverload:
    """The op of `aten::addmm.out`; InferixError for one that is not there."""
    if not isinstance(name, str):
        raise ValueError(f"{quoted(name)} is no name of an op")
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise missing_op(name) from error
    if not isinstance(found, torch._ops.OpOverload):
        raise missing_op(name)
    return found


def missing_op(name: str) -> InferixError:
    return InferixError(f"op {quoted(name)} of the stored graph is not in this installation; make it again")
