"""Where each buffer of a program lies in one arena: lifetimes, offsets, and what holds the peak.

A plan is data; nothing here allocates. An elementwise op writes over an input that dies with it. What is left is
placed greedily, largest first, each at the gap that it fits best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .program import Buffer, Call, Form, Program, Ref
from .types import Role

ALIGNMENT = 256  # bytes; what the widest loads and the matmuls of all cards ask for


@dataclass(frozen=True)
class Slot:
    """Bytes [offset, offset + size) of the arena, from call `first` to call `last`, both included.

    buffers: those that lie there, one after the other, each written over the one before.
    """

    buffers: tuple[str, ...]
    offset: int
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class BufferPlan:
    """size: bytes of the arena. live: the largest sum of slots that are alive together, which no plan can beat."""

    slots: tuple[Slot, ...]
    size: int
    live: int
    peak: int  # the call at which that is

    @property
    def offsets(self) -> dict[str, int]:
        return {name: slot.offset for slot in self.slots for name in slot.buffers}

    def at(self, call: int) -> tuple[Slot, ...]:
        """Slots alive at a call, largest first."""
        alive = [slot for slot in self.slots if slot.first <= call <= slot.last]
        return tuple(sorted(alive, key=lambda slot: -slot.size))

    def text(self, program: Program) -> str:
        """The arena's size, the call at which most is alive together, and what is: bytes, shape, and what made it."""
        lines = [
            f"arena {self.size} bytes in {len(self.slots)} slots for {len(self.offsets)} buffers; "
            f"{self.live} alive together at call {self.peak}"
        ]
        if program.calls:
            lines[0] += f", {shown(program, self.peak)}"
        made = {ref.buffer: index for index, call in enumerate(program.calls[: self.peak + 1]) for ref in call.writes}
        alike: dict[tuple[int, str, str], list[str]] = {}
        for slot in self.at(self.peak):
            name = next(name for name in reversed(slot.buffers) if name in made)
            buffer, call = program.buffers[name], program.calls[made[name]]
            size = f"{'x'.join(map(str, buffer.size))} {str(buffer.dtype).removeprefix('torch.')}"
            alike.setdefault((slot.size, size, call.op.name()), []).append(shown(program, made[name]))
        for (nbytes, size, _), calls in alike.items():
            count = f"{len(calls)} x " if len(calls) > 1 else ""
            lines.append(f"  {count + str(nbytes):>20}  {size:<28}  {calls[0]}{' and others' if count else ''}")
        return "\n".join(lines)


def plan_buffers(program: Program) -> BufferPlan:
    """Places for the scratch buffers of a program; its outputs live to the end."""
    slots = merged(program, lifetimes(program))
    placed = place(slots)
    sums = [sum(slot.size for slot in slots if slot.first <= call <= slot.last) for call in range(len(program.calls))]
    peak = max(range(len(sums)), key=sums.__getitem__, default=0)
    return BufferPlan(
        tuple(sorted(placed, key=lambda slot: (slot.first, slot.offset))),
        max((slot.offset + slot.size for slot in placed), default=0),
        sums[peak] if sums else 0,
        peak,
    )


def lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """First and last call that touches each scratch buffer."""
    spans: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(program.calls):
        for name in call.touches:
            if program.buffers[name].role is Role.SCRATCH:
                spans[name] = (spans.get(name, (index, index))[0], index)
    end = len(program.calls) - 1
    for ref in program.outputs.values():
        if ref.buffer in spans:
            spans[ref.buffer] = (spans[ref.buffer][0], end)
    return spans


def merged(program: Program, lives: dict[str, tuple[int, int]]) -> list[Slot]:
    """Slots without a place yet: one for each chain of buffers that are written over each other."""
    chain: dict[str, list[str]] = {}
    for index, call in enumerate(program.calls):
        for name in sorted(call.touches):
            if name not in lives or name in chain or lives[name][0] != index:
                continue
            dying = overwritten(program, call, name, lives, index)
            chain[name] = [] if dying is None else chain[dying]
            chain[name].append(name)
    chains = {id(names): names for names in chain.values()}.values()
    return [
        Slot(tuple(names), 0, aligned(program.buffers[names[0]].nbytes), lives[names[0]][0], lives[names[-1]][1])
        for names in chains
    ]


def overwritten(program: Program, call: Call, name: str, lives: dict[str, tuple[int, int]], index: int) -> str | None:
    """The input that an elementwise call may write its result `name` over, if there is one.

    It must end here, look just like the result, and be read element by element with it, not at another shape too.
    """
    if call.form is not Form.OUT or torch.Tag.pointwise not in call.op.tags or call.allocates:
        return None
    result = program.buffers[name]
    for ref in call.reads:
        same = ref.buffer in lives and lives[ref.buffer][1] == index and ref.buffer != name
        if same and alike(ref, program.buffers[ref.buffer], result) and one_view(call.reads, ref):
            return ref.buffer
    return None


def shown(program: Program, index: int) -> str:
    """A call by its op, and where it stands."""
    call = program.calls[index]
    return f"{call.op.name()} ({call.node})"


def alike(ref: Ref, old: Buffer, new: Buffer) -> bool:
    """Return True if a reference reads all of a buffer in the order in which `new` is written."""
    read = (ref.dtype, ref.size, ref.stride, ref.offset)
    return read == (new.dtype, new.size, new.stride, 0) and old.nbytes == new.nbytes


def one_view(reads: Iterable[Ref], ref: Ref) -> bool:
    return all(other == ref for other in reads if other.buffer == ref.buffer)


def place(slots: list[Slot]) -> list[Slot]:
    """Offsets for slots, largest first, each in the smallest gap that holds it, or at the end."""
    placed: list[Slot] = []
    for slot in sorted(slots, key=lambda slot: (-slot.size, slot.first)):
        beside = sorted(
            (other for other in placed if other.first <= slot.last and slot.first <= other.last),
            key=lambda other: other.offset,
        )
        gaps, end = [], 0
        for other in beside:
            if other.offset - end >= slot.size:
                gaps.append((other.offset - end, end))
            end = max(end, other.offset + other.size)
        offset = min(gaps)[1] if gaps else end
        placed.append(Slot(slot.buffers, offset, slot.size, slot.first, slot.last))
    return placed


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
