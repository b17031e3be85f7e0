"""Programs on a device: owns the arena, the constants, the static buffers that inputs are copied into, and what was
captured.

Weights and state come from outside and must stay where they are. A program is bound once for its key; after that
a run copies what changed and launches.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InferixError
from ...graphs.capture import CaptureBackend, CaptureFailed, Event, Replay
from ...graphs.cost import spec_of
from ...graphs.launch import LaunchPlan
from ...graphs.lowered import Lowered, Planned, recipes
from ...graphs.program import Call, Ref
from ...graphs.types import Role
from ..byte_sizes import format_bytes
from ..streams import sendable
from ..telemetry.profile import Profile


class NotEnoughMemory(InferixError):
    """A program that does not fit; `missing` bytes."""

    def __init__(self, parts: Mapping[str, int], free: int) -> None:
        total = sum(parts.values())
        listed = ", ".join(f"{what} {format_bytes(count)}" for what, count in parts.items())
        super().__init__(f"the graph needs {format_bytes(total)} ({listed}), and {format_bytes(free)} are free")
        self.missing = total - free


CAT = torch.ops.aten.cat.out


@dataclass
class Bound:
    """A program on its tensors. inputs: the static buffers; held: what was last copied into each, and its version."""

    launches: LaunchPlan
    inputs: dict[str, Tensor]
    held: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    replay: Replay | None = None
    events: Sequence[Event] | None = None  # of a captured program that is profiled: before each pass, and at its end

    def fill(self, given: Mapping[str, Tensor]) -> None:
        """Copy inputs into their places; one that is the same tensor, unchanged, is there already."""
        for name, place in self.inputs.items():
            tensor = given[name]
            if name in self.held and self.held[name][0] is tensor and self.held[name][1] == tensor._version:
                continue
            if tensor.shape != place.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}; the program was made for {list(place.shape)}")
            place.copy_(sendable(tensor, place.device), non_blocking=True)
            self.held[name] = (tensor, tensor._version)


@dataclass
class Loaded:
    """One `Lowered` on the device. recipes: how each value that the prompt program hands on is made."""

    lowered: Lowered
    body: Bound
    prompt: Bound | None
    state: Mapping[str, Tensor]
    recipes: Mapping[str, str]


class Launcher:
    """Binds and runs programs. Without a backend every call is launched by itself; with one, a program is captured at
    its first run and replayed afterwards, or, if that cannot be, launched after all.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], device: torch.device, backend: CaptureBackend | None = None
    ) -> None:
        self.weights, self.device, self.backend = dict(weights), device, backend
        self.bound: set[str] = set()  # weights that a program is bound to
        self.constants: dict[str, Tensor] = {}  # by recipe, literals by name
        self.constant_bytes = 0
        self.folds: list[tuple[Planned, Mapping[str, Tensor]]] = []
        self.arena = torch.empty(0, dtype=torch.uint8, device=device)
        self.profile: Profile | None = None
        self.captures = 0
        self.fallbacks: list[str] = []  # why programs are launched call by call that were to be captured

    def load(self, lowered: Lowered, state: Mapping[str, Tensor]) -> Loaded:
        """Bind a program to weights, constants and `state`; NotEnoughMemory if what it needs is not free."""
        needs = self.needs(lowered)
        if (free := free_bytes(self.device)) is not None and sum(needs.values()) > free:
            raise NotEnoughMemory(needs, free)
        given = {**self.weights, **state, **self.literals(lowered)}
        made: dict[str, str] = {}
        if lowered.fold is not None:
            made = recipes(lowered.fold.program)
            given |= self.folded(lowered.fold, made, given)
        self.constant_bytes = self.bytes_of_constants()
        if lowered.prompt is None:
            return Loaded(lowered, self.bind(lowered.body, given), None, state, {})
        prompt = self.bind(lowered.prompt, given)
        prompt.replay = prompt.launches.run  # it runs once a prompt, which is not worth a capture
        return Loaded(lowered, self.bind(lowered.body, given), prompt, state, recipes(lowered.prompt.program, made))

    def needs(self, lowered: Lowered) -> dict[str, int]:
        """Bytes that a program would add: its scratch, its constants with what making them takes, its inputs."""
        planned = [part for part in (lowered.body, lowered.prompt) if part is not None]
        scratch = max(part.plan.size for part in planned)
        inputs = sum(buffer.nbytes for part in planned for buffer in part.program.of(Role.INPUT))
        fold = lowered.fold
        made = {} if fold is None else recipes(fold.program)
        missing = any(recipe not in self.constants for recipe in made.values())
        return {
            "scratch": scratch if scratch > self.arena.numel() else 0,
            "constants": fold.plan.size if fold is not None and missing else 0,
            "inputs": inputs,
        }

    def bytes_by_owner(self) -> dict[str, int]:
        """What the launcher holds beside weights; those that are part of a constant count as weights."""
        return {"constants": self.constant_bytes, "scratch": self.arena.numel()}

    def bytes_of_constants(self) -> int:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.constants.values()}
        weights = (weight for weight in self.weights.values() if weight.untyped_storage().data_ptr() in storages)
        return sum(storage.nbytes() for storage in storages.values()) - sum(weight.nbytes for weight in weights)

    def bind(self, planned: Planned, given: Mapping[str, Tensor]) -> Bound:
        inputs = {
            buffer.name: torch.zeros(buffer.size, dtype=buffer.dtype, device=self.device)
            for buffer in planned.program.of(Role.INPUT)
        }
        self.bound |= {buffer.name for buffer in planned.program.of(Role.WEIGHT)}
        arena = self.room(planned.plan.size)
        return Bound(LaunchPlan(planned.program, planned.plan, arena, {**given, **inputs}), inputs)

    def room(self, nbytes: int) -> Tensor:
        """An arena of at least that size. Programs share it, since they run one after the other; a larger one is a
        new one, and what was bound to the old keeps it.
        """
        if self.arena.numel() < nbytes:
            self.arena = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.arena

    def run(self, bound: Bound, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a program leaves, as tensors of their own."""
        bound.fill(given)
        if bound.replay is None:
            bound.replay = bound.launches.run if self.backend is None else self.captured(bound, self.backend)
        if self.profile is None:
            bound.replay()
        else:
            self.profile.launch(bound.launches, bound.replay, bound.events)
        return {name: output.clone() for name, output in bound.launches.outputs.items()}

    def captured(self, bound: Bound, backend: CaptureBackend) -> Replay:
        """A recording of the launches; where that cannot be, the launches themselves, with a warning."""
        launches, calls = bound.launches, bound.launches.program.calls
        marks = [*(section.first for section in launches.program.sections), len(calls)]
        events = {index: backend.event() for index in marks} if self.profile is not None else {}
        at = 0

        def before(index: int) -> None:
            nonlocal at
            at = index
            if index in events:
                events[index].record()

        try:
            for index, call in enumerate(calls):
                if reason := unrecordable(call, self.device):
                    at = index
                    raise CaptureFailed(reason)
            replay = backend.capture(lambda: launches.run_with(before))
        except CaptureFailed as error:
            call = calls[at]
            said = f"{call.op.name()} ({call.node}) cannot be captured: {error}; running as executor fused"
            self.fallbacks.append(said)
            warnings.warn(said, stacklevel=2)
            return launches.run
        self.captures += 1
        if self.profile is not None:
            bound.events = [events[index] for index in marks]
        return replay

    def literals(self, lowered: Lowered) -> dict[str, Tensor]:
        """Constants that are numbers."""
        for name, value in lowered.literals.items():
            if name not in self.constants:
                self.constants[name] = value.literal(self.device)
        return {name: self.constants[name] for name in lowered.literals}

    def folded(self, fold: Planned, made: Mapping[str, str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a fold program by name; one that another program has made by the same recipe is shared."""
        missing = {name: recipe for name, recipe in made.items() if recipe not in self.constants}
        if missing:
            outputs = self.computed(fold, given)
            for name, recipe in missing.items():  # all of them are the whole arena, which stays; else they leave it
                self.constants[recipe] = outputs[name] if len(missing) == len(made) else outputs[name].clone()
            self.folds.append((fold, {name: given[name] for name in fold.program.buffers if name in given}))
            self.join_weights(fold, {name: self.constants[recipe] for name, recipe in missing.items()})
        return {name: self.constants[recipe] for name, recipe in made.items()}

    def join_weights(self, fold: Planned, constants: Mapping[str, Tensor]) -> None:
        """Let weights that a constant puts one after the other be parts of it, so that they are there once.

        Weights that a program is bound to already, or that are part of something, stay where they are.
        """
        by_buffer = {fold.program.outputs[name].buffer: tensor for name, tensor in constants.items()}
        for call in fold.program.calls:
            names = [ref.buffer for ref in call.reads]
            free = all(name in self.weights and name not in self.bound and alone(self.weights[name]) for name in names)
            if call.op is CAT and call.args[1:] in ((), (0,)) and free and call.writes[0].buffer in by_buffer:
                whole = by_buffer[call.writes[0].buffer]
                parts = whole.split([len(self.weights[name]) for name in names])
                for name, part in zip(names, parts, strict=True):
                    self.weights[name].data = part

    def refresh_derived_weights(self) -> None:
        """Make the constants anew, in place, after weights have changed in place. Nothing is captured again."""
        for fold, given in self.folds:
            made = recipes(fold.program)
            for name, tensor in self.computed(fold, given).items():
                self.constants[made[name]].copy_(tensor)

    def computed(self, fold: Planned, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A program run once, on an arena of its own."""
        arena = torch.empty(fold.plan.size, dtype=torch.uint8, device=self.device)
        launches = LaunchPlan(fold.program, fold.plan, arena, given)
        launches.run()
        return launches.outputs


def unrecordable(call: Call, device: torch.device) -> str | None:
    """Why a call cannot be recorded, as far as that is known beforehand: a recording that fails costs a good deal."""
    if torch.Tag.cudagraph_unsafe in call.op.tags:
        return "it is tagged as unsafe in a CUDA graph"
    spec = spec_of(call.op)
    if device.type != "cuda" or spec is None:
        return None
    like: Ref = call.named[spec.like]
    form = spec.chosen(device, like.dtype, like.size[-1])
    return f"its form for {str(like.dtype)[6:]}, {form}, reads tensors on the host" if form in spec.reads_host else None


def alone(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds nothing else."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated; None where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
