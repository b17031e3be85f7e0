"""The launches for one query shape: the flat program of a block or a pass, and those of its constants and prompt.

Made from a `BlockGraph` once, or read from an artefact; it holds no tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.dense_attention import OP as DENSE_ATTENTION
from .lowering import lower
from .plan import BufferPlan, plan_buffers
from .program import Buffer, Call, Program, Ref
from .types import PROMPT_TABLE, BlockGraph, PassGraph, Role, Runs, Value, name_in_set

STORES = ("kv.", "scale.")  # buffers of pages, a layer each
STAGING = "staging"


@dataclass(frozen=True)
class Planned:
    """A program with the places of its buffers."""

    program: Program
    plan: BufferPlan


@dataclass(frozen=True)
class Lowered:
    """body: what runs each time. fold: makes constants from weights, once they are there. prompt: makes what the body
    reads of a prompt, once per prompt. frames: makes what it reads of the channels that a block's frames are given,
    once per block. Each is None where there is nothing to do. literals: constants that are numbers, by name.
    """

    body: Planned
    fold: Planned | None
    prompt: Planned | None
    literals: Mapping[str, Value]
    frames: Planned | None = None


def lower_block(block: BlockGraph, runs: Collection[Runs] = (Runs.BLOCK,)) -> Lowered:
    """The passes of a block graph that `runs` names, one after the other, on one arena."""
    passes = [graph for graph in block.passes if graph.runs in runs]
    graphs = [graph for graph in (block.fold, block.prompt, block.frames, *passes) if graph is not None]
    values = [value for graph in graphs for value in graph.inputs.values()]
    handed = {value.name for graph in passes for value in graph.outputs}
    return Lowered(
        body=planned(passes, [name for name in block.results if name in handed]),
        fold=planned([block.fold]) if block.fold else None,
        prompt=planned([block.prompt]) if block.prompt else None,
        literals={value.name: value for value in values if value.data is not None},
        frames=planned([block.frames]) if block.frames else None,
    )


def planned(graphs: Sequence[PassGraph], results: Sequence[str] | None = None) -> Planned:
    """Graphs lowered and planned; results: by default all outputs of the last one."""
    program = lower(graphs, results if results is not None else [value.name for value in graphs[-1].outputs])
    return Planned(program, plan_buffers(program))


def with_pages(lowered: Lowered, pages: int, slots: int | None = None) -> Lowered:
    """The same for stores of another number of pages, on which nothing but their own size depends.

    slots: of the staging buffer; None leaves it as it is.
    """

    def resize(program: Program) -> Program:
        sizes = {name: pages for name in program.buffers if name.startswith(STORES)}
        if slots is not None and STAGING in program.buffers:
            sizes[STAGING] = slots
        return resized(program, sizes)

    programs = (lowered.body, lowered.fold, lowered.prompt, lowered.frames)
    body, fold, prompt, frames = (part and replace(part, program=resize(part.program)) for part in programs)
    assert body is not None
    return replace(lowered, body=body, fold=fold, prompt=prompt, frames=frames)


def with_weights(lowered: Lowered, number: int) -> Lowered:
    """The same over the weights of another set, by its number."""
    parts = (lowered.body, lowered.fold, lowered.prompt, lowered.frames)
    body, fold, prompt, frames = (part and replace(part, program=in_set(part.program, number)) for part in parts)
    assert body is not None
    return replace(lowered, body=body, fold=fold, prompt=prompt, frames=frames)


def in_set(program: Program, number: int) -> Program:
    """A program whose weights have the names of a set."""
    names = {buffer.name: name_in_set(buffer.name, number) for buffer in program.of(Role.WEIGHT)}

    def renamed(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return replace(argument, buffer=names.get(argument.buffer, argument.buffer))
        return tuple(map(renamed, argument)) if isinstance(argument, tuple) else argument

    buffers = [replace(buffer, name=names.get(name, name)) for name, buffer in program.buffers.items()]
    outputs = {name: renamed(ref) for name, ref in program.outputs.items()}
    calls = with_arguments(program.calls, renamed)
    return replace(program, buffers={buffer.name: buffer for buffer in buffers}, calls=calls, outputs=outputs)


def with_arguments(calls: Sequence[Call], change: Callable[[Any], Any]) -> tuple[Call, ...]:
    """Calls with `change` applied to their arguments, keyword arguments and results."""
    return tuple(
        replace(call, args=change(call.args), kwargs=change(call.kwargs), outs=change(call.outs)) for call in calls
    )


def prompt_pages(program: Program) -> frozenset[str]:
    """Buffers of prompts that a program finds by its `PROMPT_TABLE`."""
    calls = [call.named for call in program.calls if call.op.namespace == "inferix"]
    tables = [(named.get("kv"), named.get("page_table")) for named in calls]
    return frozenset(
        kv.buffer
        for kv, table in tables
        if isinstance(kv, Ref) and isinstance(table, Ref) and table.buffer == PROMPT_TABLE
    )


def with_run(lowered: Lowered, first: int) -> Lowered:
    """The same over another run of as many pages, by its first page."""

    def moved(call: Call) -> Call:
        is_dense = call.op is DENSE_ATTENTION.overload
        return replace(call, args=(*call.args[:2], first, *call.args[3:])) if is_dense else call

    body = lowered.body
    program = replace(body.program, calls=tuple(map(moved, body.program.calls)))
    return replace(lowered, body=replace(body, program=program))


def with_prompts(lowered: Lowered, prompts: int) -> Lowered:
    """The same with room for a number of prompts that the body finds by its table."""
    program = lowered.body.program
    sizes = dict.fromkeys(prompt_pages(program), prompts)
    return replace(lowered, body=replace(lowered.body, program=resized(program, sizes)))


def resized(program: Program, sizes: Mapping[str, int]) -> Program:
    """A program over stores [2, pages, ...] of these sizes, by name; it refers to them as a whole."""
    stores = {name: of_pages(program.buffers[name], pages) for name, pages in sizes.items()}

    def with_store(argument: Any) -> Any:
        if isinstance(argument, Ref) and argument.buffer in stores:
            assert argument.covers(program.buffers[argument.buffer]), f"a part of {argument.buffer} is read"
            return replace(argument, size=stores[argument.buffer].size, stride=stores[argument.buffer].stride)
        return tuple(map(with_store, argument)) if isinstance(argument, tuple) else argument

    return replace(program, buffers={**program.buffers, **stores}, calls=with_arguments(program.calls, with_store))


def of_pages(buffer: Buffer, pages: int) -> Buffer:
    size = (buffer.size[0], pages, *buffer.size[2:])
    return replace(buffer, size=size, stride=(pages * buffer.stride[1], *buffer.stride[1:]))


def recipes(program: Program, made: Mapping[str, str] | None = None) -> dict[str, str]:
    """A digest of how each output is made: outputs of two programs with one recipe hold the same numbers.

    The contents of a buffer are described by the calls that wrote it, down to weights and literals by name; `made` has
    the recipes of constants.
    """
    contents = {name: "fresh" for name, buffer in program.buffers.items() if buffer.role is Role.SCRATCH}
    contents |= made or {}

    def described(argument: Any) -> str:
        if isinstance(argument, Ref):
            content = contents.get(argument.buffer, argument.buffer)
            return f"[{content} {argument.dtype} {argument.size} {argument.stride} {argument.offset}]"
        return f"({','.join(map(described, argument))})" if isinstance(argument, tuple) else repr(argument)

    for call in program.calls:
        did = f"{call.op.name()}{described(call.args)}{described(call.kwargs)}"
        contents |= {ref.buffer: digest(f"{did}{index}") for index, ref in enumerate(call.writes)}
    return {name: digest(described(ref)) for name, ref in program.outputs.items()}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
