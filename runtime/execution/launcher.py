"""Launcher: runs lowered programs. Owns the arena, the constants, the static input buffers and the captured graphs.

Weights and state (page tensors) are owned by others and must not move. A program is bound once for each graph key; each
run then copies the inputs that changed, and launches or replays.
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
from ...graphs.lowered import Lowered, Planned, prompt_pages, recipes
from ...graphs.program import Call, Ref
from ...graphs.types import Role
from ..byte_sizes import format_bytes
from ..streams import sendable
from ..telemetry.profile import Profile
from .prompts import Conditioning, PromptSlots


class NotEnoughMemory(InferixError):
    """Too little free memory for a program. missing: bytes."""

    def __init__(self, parts: Mapping[str, int], free: int) -> None:
        total = sum(parts.values())
        listed = ", ".join(f"{what} {format_bytes(count)}" for what, count in parts.items())
        super().__init__(f"the graph needs {format_bytes(total)} ({listed}), but {format_bytes(free)} are free")
        self.missing = total - free


CAT = torch.ops.aten.cat.out


@dataclass
class Bound:
    """A program bound to tensors.

    inputs: static buffers. copied: the tensor last copied into each buffer, and its version. events: of a captured
    program that is profiled, before each pass and at the end.
    """

    launches: LaunchPlan
    inputs: dict[str, Tensor]
    copied: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    replay: Replay | None = None
    events: Sequence[Event] | None = None

    def fill(self, given: Mapping[str, Tensor]) -> None:
        """Copy inputs into the static buffers, except tensors that have not changed since the last copy.

        ValueError for a shape that differs from the program's.
        """
        for name, buffer in self.inputs.items():
            tensor = given[name]
            if tensor is buffer:  # written by another program
                continue
            if name in self.copied and self.copied[name][0] is tensor and self.copied[name][1] == tensor._version:
                continue
            if tensor.shape != buffer.shape:
                raise ValueError(f"shape of {name} is {list(tensor.shape)}; expected {list(buffer.shape)}")
            buffer.copy_(sendable(tensor, buffer.device), non_blocking=True)
            self.copied[name] = (tensor, tensor._version)


@dataclass
class Loaded:
    """A `Lowered` bound to the device.

    prompt, frames: programs that run once for a prompt, or for a block; None where there is nothing to do. recipes:
    digest of each output of the prompt program. shown: what the frames program ran for last. slots: of
    prompts that a batch finds by table. batch: the texts of the last batch whose prompts are rows, and what the prompt
    program made of them.
    """

    lowered: Lowered
    body: Bound
    prompt: Bound | None
    state: Mapping[str, Tensor]
    recipes: Mapping[str, str]
    frames: Bound | None = None
    shown: object = None
    slots: PromptSlots | None = None
    batch: tuple[tuple[Conditioning, ...], dict[str, Tensor]] | None = None


class Launcher:
    """Binds and runs programs.

    With a backend, a program is captured at its first run and replayed afterwards; one that cannot be captured is
    launched call by call, as all programs are without a backend.
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
        self.fallbacks: list[str] = []  # reasons why programs could not be captured

    def load(self, lowered: Lowered, state: Mapping[str, Tensor]) -> Loaded:
        """Bind a program to weights, constants and `state`; NotEnoughMemory if it needs more than is free."""
        needs = self.needs(lowered)
        if (free := free_bytes(self.device)) is not None and sum(needs.values()) > free:
            raise NotEnoughMemory(needs, free)
        given = {**self.weights, **state, **self.literals(lowered)}
        folded: dict[str, str] = {}
        if lowered.fold is not None:
            folded = recipes(lowered.fold.program)
            given |= self.folded(lowered.fold, folded, given)
        self.constant_bytes = self.bytes_of_constants()
        prompt, frames = (self.bind_once(part, given) for part in (lowered.prompt, lowered.frames))
        known = {} if lowered.prompt is None else recipes(lowered.prompt.program, folded)
        body = self.bind(lowered.body, given)
        pages = {name: body.inputs.pop(name) for name in sorted(prompt_pages(lowered.body.program))}
        return Loaded(lowered, body, prompt, state, known, frames, slots=PromptSlots(pages) if pages else None)

    def bind_once(self, planned: Planned | None, given: Mapping[str, Tensor]) -> Bound | None:
        """Bind a program that runs once for a prompt or a block, and is never captured."""
        if planned is None:
            return None
        bound = self.bind(planned, given)
        bound.replay = bound.launches.run
        return bound

    def needs(self, lowered: Lowered) -> dict[str, int]:
        """Bytes that a program adds: scratch, constants (with the arena of the fold program), and inputs."""
        planned = [part for part in (lowered.body, lowered.prompt, lowered.frames) if part is not None]
        scratch = max(part.plan.size for part in planned)
        inputs = sum(buffer.nbytes for part in planned for buffer in part.program.of(Role.INPUT))
        fold = lowered.fold
        folded = {} if fold is None else recipes(fold.program)
        missing = any(recipe not in self.constants for recipe in folded.values())
        return {
            "scratch": scratch if scratch > self.arena.numel() else 0,
            "constants": fold.plan.size if fold is not None and missing else 0,
            "inputs": inputs,
        }

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes of constants and scratch; weights that are part of a constant are not counted."""
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
        """Return an arena of at least `nbytes`; programs share it, since they run one after another.

        A larger arena is a new tensor, and programs bound before keep the old one.
        """
        if self.arena.numel() < nbytes:
            self.arena = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self.arena

    def run(self, bound: Bound, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a program; returns copies of its outputs."""
        self.launch(bound, given)
        return {name: output.clone() for name, output in bound.launches.outputs.items()}

    def run_into(self, bound: Bound, given: Mapping[str, Tensor], results: Mapping[str, Tensor]) -> None:
        """Run a program and copy its outputs into tensors, by name."""
        self.launch(bound, given)
        for name, output in bound.launches.outputs.items():
            results[name].copy_(output)

    def launch(self, bound: Bound, given: Mapping[str, Tensor]) -> None:
        """Run a program; its outputs stand in the arena until another runs."""
        bound.fill(given)
        if bound.replay is None:
            bound.replay = bound.launches.run if self.backend is None else self.captured(bound, self.backend)
        if self.profile is None:
            bound.replay()
        else:
            self.profile.launch(bound.launches, bound.replay, bound.events)

    def captured(self, bound: Bound, backend: CaptureBackend) -> Replay:
        """Capture the launches; where that fails, return the launches themselves, with a warning."""
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
            message = f"{call.op.name()} ({call.node}) cannot be captured: {error}; running as executor fused"
            self.fallbacks.append(message)
            warnings.warn(message, stacklevel=2)
            return launches.run
        self.captures += 1
        if self.profile is not None:
            bound.events = [events[index] for index in marks]
        return replay

    def literals(self, lowered: Lowered) -> dict[str, Tensor]:
        """Literal constants of a program, by name."""
        for name, value in lowered.literals.items():
            if name not in self.constants:
                self.constants[name] = value.literal(self.device)
        return {name: self.constants[name] for name in lowered.literals}

    def folded(self, fold: Planned, by_name: Mapping[str, str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of a fold program by name; programs share constants of equal recipes. by_name: recipes."""
        missing = {name: recipe for name, recipe in by_name.items() if recipe not in self.constants}
        if missing:
            outputs = self.computed(fold, given)
            for name, recipe in missing.items():  # if some are shared, copy the rest so that the arena can be freed
                self.constants[recipe] = outputs[name] if len(missing) == len(by_name) else outputs[name].clone()
            self.folds.append((fold, {name: given[name] for name in fold.program.buffers if name in given}))
            self.join_weights(fold, {name: self.constants[recipe] for name, recipe in missing.items()})
        return {name: self.constants[recipe] for name, recipe in by_name.items()}

    def join_weights(self, fold: Planned, constants: Mapping[str, Tensor]) -> None:
        """Make weights views into a constant that is their concatenation, so that they are stored once.

        Weights that a program is bound to already, or that are views of other storage, stay where they are.
        """
        by_buffer = {fold.program.outputs[name].buffer: tensor for name, tensor in constants.items()}
        for call in fold.program.calls:
            names = [ref.buffer for ref in call.reads]
            free = all(
                name in self.weights and name not in self.bound and owns_storage(self.weights[name]) for name in names
            )
            if call.op is CAT and call.args[1:] in ((), (0,)) and free and call.writes[0].buffer in by_buffer:
                whole = by_buffer[call.writes[0].buffer]
                parts = whole.split([len(self.weights[name]) for name in names])
                for name, part in zip(names, parts, strict=True):
                    self.weights[name].data = part

    def refresh_derived_weights(self) -> None:
        """Recompute the constants in place after an in-place change of weights; captured graphs stay valid."""
        for fold, given in self.folds:
            by_name = recipes(fold.program)
            for name, tensor in self.computed(fold, given).items():
                self.constants[by_name[name]].copy_(tensor)

    def computed(self, fold: Planned, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a program once in an arena of its own; returns its outputs, which are views of that arena."""
        arena = torch.empty(fold.plan.size, dtype=torch.uint8, device=self.device)
        launches = LaunchPlan(fold.program, fold.plan, arena, given)
        launches.run()
        return launches.outputs


def unrecordable(call: Call, device: torch.device) -> str | None:
    """Known reason why a call cannot be captured, or None; checked first because a failed capture is slow."""
    if torch.Tag.cudagraph_unsafe in call.op.tags:
        return "it is tagged as unsafe in a CUDA graph"
    spec = spec_of(call.op)
    if device.type != "cuda" or spec is None:
        return None
    like: Ref = call.named[spec.like]
    form = spec.chosen(device, like.dtype, like.size[-1])
    if not spec.is_host_form(form):
        return None
    return f"its form for {str(like.dtype)[6:]}, {form}, reads tensors on the host"


def owns_storage(tensor: Tensor) -> bool:
    """True if a tensor spans its whole storage."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
