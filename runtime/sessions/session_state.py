"""`SessionState`: everything that the next block of a session depends on.

Each field declares beside its type how a fork copies it, whether a rollback restores it, and its form in a saved file.
Fork, rewind, rollback, save, restore and release go through these declarations and name no field a second time, except
for the two kinds of object that own memory: caches and the decoder's state.

A copy costs integers and references. A session's tensors are replaced, never written in place; pages are, and a forked
cache writes to pages of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Sequence
from copy import copy
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UsageError, quoted
from ...graphs.passes import NULL, PROMPT
from ...models.decoder import StreamState
from ...models.solvers import Solver
from ...schemes.actions import ActionTrack
from ...schemes.camera import NORMALIZE, CameraMove, CameraSpeeds, CameraTrack, checked_intrinsics, checked_poses
from ...schemes.guidance import FOLLOWING, GuidanceBranch
from ...schemes.page_needs import needs_negative
from ...schemes.presets import Preset
from ...schemes.timeline import Span, Timeline
from ..capacity.rank_planner import check_pictures
from ..execution.decode_pipeline import DecoderTrack
from ..finite_check import Check, checked
from ..frame_channels import GivenFrames, ImageCondition
from ..kv.paged_cache import ExportedPages, PagedCache
from ..live_video import LiveVideo
from ..noise import InjectedNoise, Noise, PhiloxNoise
from ..resources import Resources
from ..sampler import Sampler
from ..streams import rows_of
from ..worker_client import Handle
from .saved_values import (
    LARGEST,
    InvalidField,
    ascending,
    boolean,
    check_tensor,
    fields_of,
    finite,
    integer,
    invalid,
    list_of,
    places,
)


@dataclass
class Branch:
    """One conditioning with the cache of its past; guidance has several, of which some share a cache.

    role: its text and past as guidance has them. null: the null caption, for presets whose passes use it. number: of
    the cache in `Guidance.caches`.
    """

    text: Handle
    cache: PagedCache
    null: Handle | None = None
    role: GuidanceBranch = FOLLOWING
    number: int = 0

    @property
    def texts(self) -> dict[int, Handle]:
        """Prompt rows that groups of a pass attend to, by the number of the text."""
        return {PROMPT: self.text} if self.null is None else {PROMPT: self.text, NULL: self.null}

    @classmethod
    def for_prompts(
        cls, resources: Resources, preset: Preset, rows: Tensor, negative: Tensor | None, size: tuple[int, int]
    ) -> list[Branch]:
        """The branches of a session, with empty caches; an error leaves none.

        rows and negative: [text_len, text_dim], of the prompt and, where the preset needs it, the negative prompt.
        """
        model, texts = resources.parts.transformer, dict[tuple[str, bool], Handle]()

        def condition(text: str, dropped: bool) -> Handle:
            own = rows if text == "prompt" else negative
            assert own is not None  # `Inputs.negative_rows` asks for one
            if (text, dropped) not in texts:
                texts[text, dropped] = resources.client.condition(model.text_inputs(own, dropped))
            return texts[text, dropped]

        guide = preset.sampler.guide
        caches: dict[int, PagedCache] = {}
        branches: list[Branch] = []
        try:
            for number in sorted(set(guide.caches)):
                caches[number] = resources.kv_manager.new_cache(size, number)
            for role, number in zip(guide.branches, guide.caches, strict=True):
                dropped = role.text == "negative"
                null = condition("negative", dropped) if preset.context.clean_text == "null" else None
                branches.append(cls(condition(role.text, dropped), caches[number], null, role, number))
        except BaseException:  # raised again; Ctrl-C must not leak pages either
            for cache in caches.values():
                cache.release()
            raise
        return branches


@dataclass
class BlockInFlight:
    """A block being denoised: latents [F, C, H, W] at noise level `step`; committed: its clean keys are cached.

    rows: the prompt that it follows [text_len, text_dim]; None for the one in force. texts: that prompt by branch, once
    a pass has needed it. check: of a finished block, raises InferixError if it is not finite.
    """

    span: Span
    latents: Tensor
    solver: Solver
    step: int = 0
    committed: bool = False
    rows: Tensor | None = None
    texts: tuple[Handle, ...] | None = None
    check: Check = checked

    def fork(self) -> BlockInFlight:
        return replace(self, solver=self.solver.fork())


@dataclass
class PromptChange:
    """A change from rows `old` to `new`, [text_len, text_dim] each, over `blocks` blocks, of which `left` remain."""

    old: Tensor
    new: Tensor
    blocks: int
    left: int


@dataclass(frozen=True)
class SavedFields:
    """A session's fields in their saved form: plain values in `header`, tensors on the CPU by name.

    preset: the one in force where the fields are read.
    """

    resources: Resources
    preset: Preset
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def put(self, name: str, tensor: Tensor | None) -> None:
        """Add a tensor; None adds nothing."""
        if tensor is not None:
            self.tensors[name] = tensor

    def tensor(self, name: str) -> Tensor:
        """A tensor on the engine's device, in memory of its own; KeyError for one that the file lacks."""
        return self.tensors[name].to(self.resources.device, copy=True)  # unaligned in the file: matmuls round otherwise

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.tensors else None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent frame."""
        return (self.resources.spec.out_channels, *self.resources.spec.latent_size(tuple(self.header["size"])))

    @property
    def caches(self) -> int:
        """Caches of a session: one for each branch of guidance that does not read another's."""
        return sum(branch.reads is None for branch in self.preset.sampler.guide.branches)


class SaveForm(ABC):
    """Writes one field to a saved file and reads it back. `fill` runs on admission, when pages can be taken.

    key: the field's name in the header; None where it is in tensors alone. optional: the header may lack it.
    """

    key: str | None = None
    optional = False

    @abstractmethod
    def write(self, value: Any, file: SavedFields) -> None: ...

    @abstractmethod
    def check(self, file: SavedFields) -> None:
        """InvalidField unless `read` and `fill` can use what the file holds; nothing is made."""

    @abstractmethod
    def read(self, file: SavedFields) -> Any: ...

    def fill(self, value: Any, file: SavedFields) -> None:  # noqa: B027
        """Load what needs memory of its own into `value`, as `read` returned it."""


class TensorForm(SaveForm):
    """A tensor or None. shape: what it must be, from the file's sizes. required: whether there must be one."""

    def __init__(
        self,
        name: str,
        shape: Callable[[SavedFields], Sequence[int | None]],
        required: Callable[[SavedFields], bool] = lambda file: False,
    ) -> None:
        self.name, self.shape, self.required = name, shape, required

    def write(self, value: Tensor | None, file: SavedFields) -> None:
        file.put(self.name, value)

    def check(self, file: SavedFields) -> None:
        if self.name in file.tensors or self.required(file):
            check_tensor(self.name, file.tensors.get(self.name), self.shape(file))

    def read(self, file: SavedFields) -> Tensor | None:
        return file.optional(self.name)


def rows_shape(file: SavedFields) -> Sequence[int | None]:
    return file.resources.spec.text_len, file.resources.spec.text_dim


def latents_shape(file: SavedFields) -> Sequence[int | None]:
    return None, *file.latent_shape


def pixels_shape(file: SavedFields) -> Sequence[int | None]:
    width, height = file.header["size"]
    return None, 3, height, width


class SizeForm(SaveForm):
    key = "size"

    def write(self, value: tuple[int, int], file: SavedFields) -> None:
        file.header["size"] = value

    def check(self, file: SavedFields) -> None:
        size = list_of("size", file.header["size"])
        if len(size) != 2:
            raise invalid("size", size, "[width, height]")
        width, height = (integer("size", length, 1, 1 << 16) for length in size)
        spec, shard = file.resources.spec, file.resources.parts.shard
        spec.latent_size((width, height))
        check_pictures(spec, (width, height), file.preset.sampler.guide, shard)

    def read(self, file: SavedFields) -> tuple[int, int]:
        width, height = file.header["size"]
        return width, height


class SamplerForm(SaveForm):
    """The strength; all else is the preset's."""

    key = "strength"

    def write(self, value: Sampler, file: SavedFields) -> None:
        file.header["strength"] = value.strength

    def check(self, file: SavedFields) -> None:
        strength = finite("strength", file.header["strength"])
        if not 0 < strength <= 1 or (strength < 1 and not file.preset.sampler.takes_strength):
            raise invalid("strength", strength, "a number above 0, up to 1, and 1 for a solver that starts from noise")

    def read(self, file: SavedFields) -> Sampler:
        return Sampler(file.preset.sampler, file.header["strength"])


class TimelineForm(SaveForm):
    """`pin_next` is true between blocks where a block that begins a shot was rolled back."""

    key = "timeline"
    FIELDS = ("next_block", "next_frame", "origin", "shot", "sink", "pinned", "pin_next")

    def write(self, value: Timeline, file: SavedFields) -> None:
        numbers = {name: getattr(value, name) for name in self.FIELDS}
        if (span := value.uncommitted) is not None:
            numbers["uncommitted"] = [span.index, span.frames.start, span.frames.stop]
        file.header["timeline"] = numbers | {"places": list(value.places.items())}

    def check(self, file: SavedFields) -> None:
        header = fields_of("timeline", file.header["timeline"], (*self.FIELDS, "places"), ("uncommitted",))
        stop = integer("timeline.next_frame", header["next_frame"])
        for name, most in (("next_block", stop), ("origin", stop), ("shot", LARGEST)):
            integer(f"timeline.{name}", header[name], 0, most)
        for name in ("sink", "pinned"):
            ascending(f"timeline.{name}", header[name], LARGEST)
        boolean("timeline.pin_next", header["pin_next"])
        places("timeline.places", header["places"], stop)
        if "uncommitted" in header:
            name = "timeline.uncommitted"
            span = [integer(name, number, 0, stop) for number in list_of(name, header["uncommitted"])]
            if len(span) != 3 or span[1] >= span[2]:
                raise invalid(name, span, "[block, first frame, last frame + 1]")

    def read(self, file: SavedFields) -> Timeline:
        timeline, header = Timeline(file.preset), file.header["timeline"]
        for name in self.FIELDS:
            setattr(timeline, name, tuple(header[name]) if isinstance(header[name], list) else header[name])
        timeline.places = {frame: position for frame, position in header["places"]}
        if "uncommitted" in header:
            index, start, stop = header["uncommitted"]
            timeline.uncommitted = Span(index, range(start, stop))
        return timeline


class NoiseForm(SaveForm):
    """A seed, or injected tensors. UsageError for noise of another type."""

    key = "noise"

    def write(self, value: Noise, file: SavedFields) -> None:
        if isinstance(value, PhiloxNoise):
            file.header["noise"] = {"seed": value.seed}
        elif isinstance(value, InjectedNoise):
            file.header["noise"] = {"first": value.first}
            file.put("noise.initial", value.initial)
            file.put("noise.renoise", value.renoise)
        else:
            kind = type(value).__name__
            raise UsageError(f"noise of type {kind} cannot be saved; expected a seed or InjectedNoise")

    def check(self, file: SavedFields) -> None:
        header = fields_of("noise", file.header["noise"], (), ("seed", "first"))
        if len(header) != 1:
            raise invalid("noise", header, "a seed, or the first frame of given noise")
        if "seed" in header:
            integer("noise.seed", header["seed"], 0, (1 << 64) - 1)
            return
        integer("noise.first", header["first"])
        check_tensor("noise.initial", file.tensors.get("noise.initial"), latents_shape(file))
        if "noise.renoise" in file.tensors:
            check_tensor("noise.renoise", file.tensors["noise.renoise"], (None, None, None, *file.latent_shape))

    def read(self, file: SavedFields) -> Noise:
        header = file.header["noise"]
        if "seed" in header:
            return PhiloxNoise(header["seed"], str(file.resources.device))
        return InjectedNoise(file.tensors["noise.initial"], file.tensors.get("noise.renoise"), header["first"])


class BranchesForm(SaveForm):
    """The pages of each branch that has a cache of its own. Conditionings are computed again from the prompt's rows."""

    key = "caches"

    def write(self, value: list[Branch], file: SavedFields) -> None:
        file.header["caches"] = []
        for index, cache in enumerate(caches_of(value)):
            pages = cache.export_pages()
            for name in ("kv", "scales", "sink"):
                file.put(f"cache.{index}.{name}", getattr(pages, name))
            file.header["caches"].append({"frames": pages.frames, "places": list(pages.positions.items())})

    def check(self, file: SavedFields) -> None:
        stop, caches = file.header["timeline"]["next_frame"], list_of("caches", file.header["caches"])
        if len(caches) != file.caches:
            raise invalid("caches", len(caches), f"{file.caches}, one for each conditioning")
        form, policy = file.resources.kv_manager.form(SizeForm().read(file)).whole, file.preset.context
        layers = file.resources.spec.num_layers
        for index, cache in enumerate(caches):
            name = f"caches.{index}"
            fields_of(name, cache, ("frames", "places"))
            frames = ascending(f"{name}.frames", cache["frames"], stop)
            if extra := set(places(f"{name}.places", cache["places"], stop)) - set(frames):
                raise invalid(f"{name}.places", min(extra), "frames that are held")
            tensors = {part: file.tensors.get(f"cache.{index}.{part}") for part in ("kv", "scales", "sink")}
            check_tensor(f"cache.{index}.kv", tensors["kv"], (layers, 2, len(frames), *form.shape), form.kv_dtype)
            if form.scaled:
                scales = layers, 2, len(frames), form.shape[1]
                check_tensor(f"cache.{index}.scales", tensors["scales"], scales, torch.float32)
            elif tensors["scales"] is not None:
                raise InvalidField(f"tensor 'cache.{index}.scales' is there; expected none for {form.kv_dtype}")
            if tensors["sink"] is not None:
                check_tensor(f"cache.{index}.sink", tensors["sink"], (layers, 2, policy.sink_size, *form.shape))

    def read(self, file: SavedFields) -> list[Branch]:
        negative = file.optional("negative")
        return Branch.for_prompts(file.resources, file.preset, file.tensor("rows"), negative, SizeForm().read(file))

    def fill(self, value: list[Branch], file: SavedFields) -> None:
        for index, (own, header) in enumerate(zip(caches_of(value), file.header["caches"], strict=True)):
            positions = {frame: position for frame, position in header["places"]}
            kv = file.tensor(f"cache.{index}.kv")
            scales, sink = (file.optional(f"cache.{index}.{name}") for name in ("scales", "sink"))
            own.import_pages(ExportedPages(tuple(header["frames"]), positions, kv, scales, sink))


class ActionsForm(SaveForm):
    key = "actions"

    def write(self, value: ActionTrack, file: SavedFields) -> None:
        file.header["actions"] = {"starts": value.starts, "held": value.indices}

    def check(self, file: SavedFields) -> None:
        header = fields_of("actions", file.header["actions"], ("starts", "held"))
        starts = ascending("actions.starts", header["starts"], LARGEST)
        if not starts or starts[0] != 0:
            raise invalid("actions.starts", starts, "frames from 0 on")
        most = max(0, len(file.resources.spec.actions) - 1)
        numbers = [integer("actions.held", number, 0, most) for number in list_of("actions.held", header["held"])]
        if len(numbers) != len(starts):
            raise invalid("actions.held", header["held"], "one for each of starts")

    def read(self, file: SavedFields) -> ActionTrack:
        actions = ActionTrack(file.resources.spec.actions)
        actions.starts, actions.indices = file.header["actions"]["starts"], file.header["actions"]["held"]
        return actions


class CameraForm(SaveForm):
    key, optional = "camera", True
    MOVES, NUMBERS = ("held", "tapped"), ("scale", "seconds")
    NAMES = ("first", "poses", *MOVES, "turn", "tap_frames", *NUMBERS, "normalize", "speeds", "intrinsics")

    def write(self, value: CameraTrack | None, file: SavedFields) -> None:
        if value is not None:
            header = {name: getattr(value, name) for name in self.NAMES}
            header |= {name: asdict(header[name]) for name in (*self.MOVES, "speeds")}
            file.header["camera"] = header | {"poses": [pose.tolist() for pose in value.poses]}

    def check(self, file: SavedFields) -> None:
        if ("camera" in file.header) != (file.resources.spec.camera_channels is not None):
            raise invalid("camera", "camera" in file.header, "a camera for a model that follows one, and for no other")
        if "camera" in file.header:
            try:
                self.check_values(file)
            except UsageError as error:
                raise InvalidField(f"camera: {error}") from error

    def check_values(self, file: SavedFields) -> None:
        """InvalidField or UsageError for values that no track has."""
        header = fields_of("camera", file.header["camera"], self.NAMES)
        integer("camera.first", header["first"])
        integer("camera.tap_frames", header["tap_frames"])
        for name in self.NUMBERS:
            if finite(f"camera.{name}", header[name]) <= 0:
                raise invalid(f"camera.{name}", header[name], "a number above 0")
        if header["normalize"] not in NORMALIZE:
            raise invalid("camera.normalize", header["normalize"], f"one of {', '.join(NORMALIZE)}")
        checked_poses(list_of("camera.poses", header["poses"]))
        checked_intrinsics(list_of("camera.intrinsics", header["intrinsics"]))
        turn = [finite("camera.turn", number) for number in list_of("camera.turn", header["turn"])]
        if len(turn) != 2:
            raise invalid("camera.turn", turn, "two numbers of degrees")
        fields_of("camera.speeds", header["speeds"], [item.name for item in fields(CameraSpeeds)])
        for name in self.MOVES:
            fields_of(f"camera.{name}", header[name], [item.name for item in fields(CameraMove)])
            list_of(f"camera.{name}.turn", header[name]["turn"])
        self.read(file)

    def read(self, file: SavedFields) -> CameraTrack | None:
        if (header := file.header.get("camera")) is None:
            return None
        poses, speeds = list(checked_poses(header["poses"])), CameraSpeeds(**header["speeds"])
        intrinsics = checked_intrinsics(header["intrinsics"])
        track = CameraTrack(intrinsics, poses, header["scale"], header["normalize"], speeds, header["seconds"])
        right, up = header["turn"]
        track.held, track.tapped = (
            CameraMove(**header[name] | {"turn": tuple(header[name]["turn"])}) for name in self.MOVES
        )
        track.first, track.turn, track.tap_frames = header["first"], (right, up), header["tap_frames"]
        return track


class ImageForm(SaveForm):
    """The image itself; its latents are encoded again."""

    def write(self, value: ImageCondition | None, file: SavedFields) -> None:
        file.put("image", None if value is None else value.pixels)

    def check(self, file: SavedFields) -> None:
        if file.resources.spec.condition_channels:
            check_tensor("image", file.tensors.get("image"), (1, *pixels_shape(file)[1:]))

    def read(self, file: SavedFields) -> ImageCondition | None:
        image = file.optional("image")
        parts = file.resources.parts
        return None if image is None else ImageCondition(file.resources.spec, parts.vae, image)


class FlightForm(SaveForm):
    key = "flight"

    def write(self, value: list[BlockInFlight], file: SavedFields) -> None:
        file.header["flight"] = []
        for index, block in enumerate(value):
            name, solver, frames = f"flight.{index}", block.solver, block.span.frames
            header = {"index": block.span.index, "start": frames.start, "stop": frames.stop, "step": block.step}
            file.put(name, block.latents)
            file.put(f"{name}.rows", block.rows)
            numbers, tensors = solver.save()
            for part, tensor in tensors.items():
                file.put(f"{name}.{part}", tensor)
            file.header["flight"].append(header | numbers)

    def check(self, file: SavedFields) -> None:
        timeline, flight = file.header["timeline"], list_of("flight", file.header["flight"])
        solver, steps = SamplerForm().read(file).begin(), len(SamplerForm().read(file).timesteps)
        if len(flight) > file.preset.window_blocks:
            raise invalid("flight", len(flight), f"at most {file.preset.window_blocks} blocks")
        for index, block in enumerate(flight):
            name = f"flight.{index}"
            fields_of(name, block, ("index", "start", "stop", "step", *solver.saved_numbers))
            integer(f"{name}.index", block["index"], 0, timeline["next_block"])
            start = integer(f"{name}.start", block["start"], 0, timeline["next_frame"])
            stop = integer(f"{name}.stop", block["stop"], start + 1, timeline["next_frame"])
            integer(f"{name}.step", block["step"], 0, steps)
            shape = stop - start, *file.latent_shape
            check_tensor(name, file.tensors.get(name), shape)
            if (rows := file.tensors.get(f"{name}.rows")) is not None:
                check_tensor(f"{name}.rows", rows, rows_shape(file))
            numbers: dict[str, int] = {}
            for number in solver.saved_numbers:
                least, most = solver.number_range(number, numbers)
                numbers[number] = integer(f"{name}.{number}", block[number], least, most)
            for part in solver.saved_tensors(numbers):
                check_tensor(f"{name}.{part}", file.tensors.get(f"{name}.{part}"), shape)

    def read(self, file: SavedFields) -> list[BlockInFlight]:
        sampler, flight = SamplerForm().read(file), []
        for index, header in enumerate(file.header["flight"]):
            name, solver = f"flight.{index}", sampler.begin()
            numbers = {number: header[number] for number in solver.saved_numbers}
            solver.restore(numbers, {part: file.tensor(f"{name}.{part}") for part in solver.saved_tensors(numbers)})
            span = Span(header["index"], range(header["start"], header["stop"]))
            rows = file.optional(f"{name}.rows")
            flight.append(BlockInFlight(span, file.tensor(name), solver, header["step"], rows=rows))
        return flight


class PromptChangeForm(SaveForm):
    key, optional = "change", True

    def write(self, value: PromptChange | None, file: SavedFields) -> None:
        if value is not None:
            file.header["change"] = {"blocks": value.blocks, "left": value.left}
            file.put("change.old", value.old)
            file.put("change.new", value.new)

    def check(self, file: SavedFields) -> None:
        if "change" in file.header:
            header = fields_of("change", file.header["change"], ("blocks", "left"))
            integer("change.left", header["left"], 1, integer("change.blocks", header["blocks"], 1))
            for name in ("change.old", "change.new"):
                check_tensor(name, file.tensors.get(name), rows_shape(file))

    def read(self, file: SavedFields) -> PromptChange | None:
        header = file.header.get("change")
        return header and PromptChange(file.tensor("change.old"), file.tensor("change.new"), **header)


class PromptsForm(SaveForm):
    """Prompts of later blocks, by number."""

    key, optional = "prompts", True

    def write(self, value: dict[int, Tensor], file: SavedFields) -> None:
        if value:
            file.header["prompts"] = sorted(value)
            for block, rows in value.items():
                file.put(f"prompts.{block}", rows)

    def check(self, file: SavedFields) -> None:
        for block in list_of("prompts", file.header.get("prompts", [])):
            integer("prompts", block, 1)
            check_tensor(f"prompts.{block}", file.tensors.get(f"prompts.{block}"), rows_shape(file))

    def read(self, file: SavedFields) -> dict[int, Tensor]:
        return {block: file.tensor(f"prompts.{block}") for block in file.header.get("prompts", [])}


class DecoderForm(SaveForm):
    """The state after the last decoded block, and which of the engine's two decoders it is of."""

    key = "decoder"

    def write(self, value: DecoderTrack, file: SavedFields) -> None:
        fast = value.vae is not file.resources.parts.vae
        file.header["decoder"] = {"frames": value.state.frames, "fast": fast}
        for slot, tensor in value.vae.whole_state(value.state).history.items():
            file.put(f"decoder.{slot}", tensor)

    def check(self, file: SavedFields) -> None:
        header = fields_of("decoder", file.header["decoder"], ("frames", "fast"))
        integer("decoder.frames", header["frames"])
        if boolean("decoder.fast", header["fast"]) and file.resources.parts.fast_vae is None:
            raise UsageError("the session was saved while the fast decoder was in use; load the engine with fast_vae")
        for name in file.tensors:
            slot = name.removeprefix("decoder.")
            if slot != name and not (slot.isascii() and slot.isdigit() and len(slot) < 6):
                raise InvalidField(f"tensor {quoted(name)} is there; expected decoder. and a number")

    def read(self, file: SavedFields) -> DecoderTrack:
        parts = file.resources.parts
        vae = parts.fast_vae if file.header["decoder"]["fast"] else parts.vae
        assert vae is not None  # the file's header is checked when it is opened
        policy = file.preset.context
        return DecoderTrack(vae, policy.rewind_blocks, policy.decoder_zero_start and vae is parts.vae)

    def fill(self, value: DecoderTrack, file: SavedFields) -> None:
        slots = [name for name in file.tensors if name.startswith("decoder.")]
        history = {int(name.removeprefix("decoder.")): file.tensor(name) for name in slots}
        value.state = value.vae.own_state(StreamState(history, file.header["decoder"]["frames"]))


@dataclass(frozen=True)
class FieldRule:
    """copy: makes a fork's value. save: the form in a file; None for a field that is not saved. rollback: restored when
    a block is rolled back; caches and the decoder roll back by themselves. release: reset to its default at the end.
    """

    copy: Callable[[Any], Any]
    save: SaveForm | None
    rollback: bool = True
    release: bool = True

    @staticmethod
    def of(declared: Field[Any]) -> FieldRule:
        rule: FieldRule = declared.metadata["rule"]
        return rule


def shared(save: SaveForm | None, release: bool = True) -> dict[str, FieldRule]:
    """Metadata of a field whose value is never changed in place: forks refer to the same object."""
    return {"rule": FieldRule(lambda value: value, save, release=release)}


def forked(save: SaveForm | None, copy: Callable[[Any], Any], rollback: bool = True) -> dict[str, FieldRule]:
    """Metadata of a field whose value changes in place: each fork has a copy of its own."""
    return {"rule": FieldRule(copy, save, rollback)}


UNCOMMITTED = TensorForm("uncommitted", latents_shape, lambda file: "uncommitted" in file.header["timeline"])
NEGATIVE = TensorForm("negative", rows_shape, lambda file: needs_negative(file.preset))


def fork_all(items: list[Any]) -> list[Any]:
    return [item.fork() for item in items]


def fork_camera(camera: CameraTrack | None) -> CameraTrack | None:
    return None if camera is None else camera.fork()


def caches_of(branches: Sequence[Branch]) -> list[PagedCache]:
    """The caches of some branches, each once."""
    return list(dict.fromkeys(branch.cache for branch in branches))


def fork_branches(branches: list[Branch]) -> list[Branch]:
    """The same conditionings; the forks' caches share pages until either side writes."""
    forks = {cache: cache.fork() for cache in caches_of(branches)}
    return [replace(branch, cache=forks[branch.cache]) for branch in branches]


@dataclass(eq=False, repr=False)
class SessionState:
    """The fields, each with its rule. Shapes: rows and negative [text_len, text_dim], latents [F, C, H, W].

    size: (width, height) in pixels. rows: the prompt in force. negative: the prompt that guidance keeps away from,
    which is the null caption too.
    source: latents of the video that blocks start from. live: of one that arrives meanwhile, which no file holds.
    clamped: latents of an image held as the first frame.
    flight: blocks being denoised, oldest first. recent: the last clean latents, as many as a rebuild or recache reads.
    prompts: of later blocks, by number. uncommitted: latents of `timeline.uncommitted`.
    pixels: the last decoded pictures [T, 3, H, W], where a rebuild encodes one again. prefix_frames: uint8
    [T, H, W, 3], the image or video that the stream continues, as the decoder shows it; readable after the end.
    camera: of the latent frames. image: the image that the stream begins with, as condition channels. given: what the
    worker has prepared of the channels of the last pass's frames.
    """

    size: tuple[int, int] = field(metadata=shared(SizeForm()))
    timeline: Timeline = field(metadata=forked(TimelineForm(), Timeline.fork))
    sampler: Sampler = field(metadata=shared(SamplerForm()))
    noise: Noise = field(metadata=shared(NoiseForm()))
    rows: Tensor = field(metadata=shared(TensorForm("rows", rows_shape, lambda file: True)))
    branches: list[Branch] = field(metadata=forked(BranchesForm(), fork_branches, rollback=False))
    actions: ActionTrack = field(metadata=forked(ActionsForm(), ActionTrack.fork))
    decoder: DecoderTrack = field(metadata=forked(DecoderForm(), DecoderTrack.fork, rollback=False))
    negative: Tensor | None = field(default=None, metadata=shared(NEGATIVE))
    source: Tensor | None = field(default=None, metadata=shared(TensorForm("source", latents_shape)))
    live: LiveVideo | None = field(default=None, metadata=shared(None))
    clamped: Tensor | None = field(default=None, metadata=shared(TensorForm("clamped", latents_shape)))
    flight: list[BlockInFlight] = field(default_factory=list, metadata=forked(FlightForm(), fork_all))
    prompts: dict[int, Tensor] = field(default_factory=dict, metadata=forked(PromptsForm(), dict))
    change: PromptChange | None = field(default=None, metadata=forked(PromptChangeForm(), copy))
    recent: Tensor | None = field(default=None, metadata=shared(TensorForm("recent", latents_shape)))
    uncommitted: Tensor | None = field(default=None, metadata=shared(UNCOMMITTED))
    pixels: Tensor | None = field(default=None, metadata=shared(TensorForm("pixels", pixels_shape)))
    camera: CameraTrack | None = field(default=None, metadata=forked(CameraForm(), fork_camera))
    image: ImageCondition | None = field(default=None, metadata=shared(ImageForm()))
    given: GivenFrames | None = field(default=None, metadata=forked(None, lambda given: None))
    prefix_frames: NDArray[np.uint8] | None = field(default=None, metadata=shared(None, release=False))

    @property
    def preset(self) -> Preset:
        """The preset that passes follow: the session manager sets it when a block begins."""
        return self.timeline.preset

    @property
    def next_block(self) -> int:
        """Index of the block that is finished next."""
        return self.flight[0].span.index if self.flight else self.timeline.next_block

    @property
    def first_frame(self) -> int:
        """First latent frame of the block that is finished next."""
        return self.flight[0].span.frames.start if self.flight else self.timeline.next_frame

    @property
    def batch_key(self) -> Hashable:
        """Equal for sessions whose next blocks take the same passes over equally many frames."""
        timeline, steps = self.timeline, tuple(block.step for block in self.flight)
        timesteps = self.sampler.of_block(self.next_block).timesteps
        clamped = self.clamped is not None and self.first_frame == 0
        size = timeline.preset.block_size(timeline.next_frame)
        committed = timeline.uncommitted is None
        return self.size, size, timesteps, steps, timeline.rebuild_due(), clamped, committed

    def fork(self, decoder: DecoderTrack | None = None) -> Self:
        """An independent copy that holds the same pages once more.

        A state to rewind to passes the session's own `decoder`, which rewinds itself; others get a fork of it.
        """
        values = {
            item.name: FieldRule.of(item).copy(getattr(self, item.name))
            for item in fields(self)
            if decoder is None or item.name != "decoder"
        }
        return type(self)(**(values if decoder is None else values | {"decoder": decoder}))

    def rollback_point(self) -> RollbackPoint:
        """A copy, without pages, to restore if memory runs out while a block is made."""
        return RollbackPoint.of(self)

    def release(self) -> None:
        """Free the pages and drop the tensors. The decoder stays: states to rewind to share it."""
        for branch in self.branches:
            branch.cache.release()
        self.branches = []
        for item in fields(self):
            if item.default is None and FieldRule.of(item).release:
                setattr(self, item.name, None)
            elif item.default_factory is not MISSING:
                setattr(self, item.name, item.default_factory())

    def save(self, file: SavedFields) -> None:
        """Write every field that has a saved form."""
        for item in fields(self):
            if (form := FieldRule.of(item).save) is not None:
                form.write(getattr(self, item.name), file)

    @classmethod
    def read(cls, file: SavedFields) -> Self:
        """A saved state, checked before, with empty caches and a decoder at its start."""
        values: dict[str, Any] = {}
        try:
            for name, form in cls.save_forms().items():
                values[name] = form.read(file)
            return cls(**values)
        except BaseException:  # raised again; Ctrl-C must not leak pages either
            for branch in values.get("branches", ()):
                branch.cache.release()
            raise

    @classmethod
    def save_forms(cls) -> dict[str, SaveForm]:
        """The saved form of each field that has one."""
        forms = {item.name: FieldRule.of(item).save for item in fields(cls)}
        return {name: form for name, form in forms.items() if form is not None}

    @classmethod
    def check_saved(cls, file: SavedFields, other: Collection[str]) -> None:
        """InvalidField or UsageError unless `read` and `fill` can use a file; `other`: names that are not fields."""
        forms = cls.save_forms().values()
        required = [form.key for form in forms if form.key is not None and not form.optional]
        fields_of("the header", file.header, [*other, *required], [form.key for form in forms if form.key])
        for form in forms:
            form.check(file)

    def fill(self, file: SavedFields) -> None:
        """Load pages and decoder state, once there is room for them."""
        for item in fields(self):
            if (form := FieldRule.of(item).save) is not None:
                form.fill(getattr(self, item.name), file)

    def remember(self, latents: Tensor, pixels: Tensor | None, frames_per_latent: int) -> None:
        """Keep the end of the clean latents and of the pixels, as far as the context may read them."""
        policy = self.preset.context
        count = policy.rebuild_frames
        if policy.prompt_switch == "recache":
            count = self.timeline.next_frame if policy.local_attn_size == -1 else policy.local_attn_size
        self.recent = last_of(self.recent, latents, count)
        if policy.needs_pixels and pixels is not None:
            self.pixels = last_of(self.pixels, pixels, (policy.rebuild_frames - 1) * frames_per_latent + 1)

    def recent_frames(self, frames: tuple[int, ...]) -> Tensor:
        """Clean latents [F, C, H, W] of absolute frames that are still kept."""
        assert self.recent is not None
        first = self.timeline.next_frame - len(self.recent)
        return rows_of(self.recent, [frame - first for frame in frames])


def last_of(before: Tensor | None, new: Tensor, count: int) -> Tensor:
    """The last `count` rows of `before` and `new` together, in memory of their own."""
    joined = new if before is None or len(new) >= count else torch.cat((before, new))
    return joined[max(0, len(joined) - count) :].clone()


@dataclass
class RollbackPoint:
    """A state at the start of a block, without pages. It is used up by `restore`.

    Frames that the block evicted stay evicted: the block would evict them again.
    """

    values: dict[str, Any]
    texts: list[Handle]

    @classmethod
    def of(cls, state: SessionState) -> RollbackPoint:
        rules = {item.name: FieldRule.of(item) for item in fields(state)}
        values = {name: rule.copy(getattr(state, name)) for name, rule in rules.items() if rule.rollback}
        return cls(values, [branch.text for branch in state.branches])

    def restore(self, state: SessionState) -> None:
        """Put the state back, and free the pages of frames that will be made again."""
        for name, value in self.values.items():
            setattr(state, name, value)
        for branch, text in zip(state.branches, self.texts, strict=True):
            branch.text = text
            branch.cache.rollback(state.first_frame)
