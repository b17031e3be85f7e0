"""A session on disk: one safetensors file with all that its next block depends on, decoder included.

Numbers and names stand as JSON in the file's header. A file of another model, preset or version is refused with
what differs; what was kept for rewinding is not saved.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InferixError, UsageError
from ...models.files import write_tensors
from ...models.wan.vae import StreamState
from ...schemes.actions import ActionTrack
from ...schemes.presets import Preset
from ...schemes.timeline import Span, Timeline
from ..files import check_output, check_paths, write_atomically
from ..kv.paged_cache import HeldPages
from ..noise import InjectedNoise, Noise, PhiloxNoise
from ..sampler import Sampler, UniPCSolver
from .branch import InFlight, PromptChange

if TYPE_CHECKING:
    from ..engine import Engine
    from .session import Session

KEY = "inferix-session"  # of the header's JSON
VERSION = 1
MODEL_PATHS = ("model", "base", "vae", "lora", "text_encoder", "fast_vae")  # settings that name files read
OPTIONAL = ("negative", "source", "clamped", "recent", "pixels")  # tensors that a session may have
SAMPLED = 64  # values of each weight that a fingerprint looks at
NO_MATTER = ("name", "about", "rewind_blocks")  # settings of a preset that change no block


def write_session(session: Session, path: Path) -> None:
    """Write a session that stands between two blocks, nothing of it being decoded."""
    track = session.track
    tensors: dict[str, Tensor] = {"rows": session.rows}
    header: dict[str, Any] = {
        "version": VERSION,
        "made_by": made_by(session.engine, session.timeline.preset),
        "size": session.size,
        "strength": session.sampler.strength,
        "timeline": timeline_fields(session.timeline),
        "actions": {"starts": session.actions.starts, "held": session.actions.held},
        "decoder": {"frames": track.state.frames, "fast": track.vae is not session.engine.parts.vae},
    }
    tensors |= {name: value for name in OPTIONAL if (value := getattr(session, name)) is not None}
    tensors |= {f"decoder.{slot}": tensor for slot, tensor in track.state.history.items()}
    header["noise"] = noise_fields(session.noise, tensors)
    header["flight"] = [flight_fields(block, f"flight.{place}", tensors) for place, block in enumerate(session.flight)]
    header["caches"] = []
    for place, branch in enumerate(session.branches):
        held = branch.cache.export_pages()
        parts = {"kv": held.kv, "scales": held.scales, "sink": held.sink}
        tensors |= {f"cache.{place}.{name}": part for name, part in parts.items() if part is not None}
        header["caches"].append({"frames": held.frames, "places": list(held.places.items())})
    if session.change is not None:
        tensors |= {"change.old": session.change.old, "change.new": session.change.new}
        header["change"] = {"blocks": session.change.blocks, "left": session.change.left}
    header["tensors"] = sorted(tensors)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {KEY: json.dumps(header)}
    config = session.engine.config
    check_paths({name: getattr(config, name) for name in MODEL_PATHS}, {"path": path})
    write_atomically(check_output(path), partial(write_whole, unshared(whole), metadata))


def write_whole(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    try:
        write_tensors(tensors, path, metadata)
    except SafetensorError as error:  # how the library tells of a full disk
        raise OSError(str(error)) from error


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory with another one, which the format does not take."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def timeline_fields(timeline: Timeline) -> dict[str, Any]:
    fields = ("next_block", "next_frame", "origin", "shot", "sink", "pinned", "pin_next")
    return {name: getattr(timeline, name) for name in fields} | {"places": list(timeline.places.items())}


def noise_fields(noise: Noise, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(noise, PhiloxNoise):
        return {"seed": noise.seed}
    if not isinstance(noise, InjectedNoise):
        raise UsageError(f"noise of type {type(noise).__name__} cannot be saved; expected a seed or InjectedNoise")
    tensors["noise.initial"] = noise.initial
    if noise.renoise is not None:
        tensors["noise.renoise"] = noise.renoise
    return {"first": noise.first}


def flight_fields(block: InFlight, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors[name] = block.latents
    solver = block.solver
    fields = {"index": block.span.index, "start": block.span.frames.start, "stop": block.span.frames.stop}
    fields["step"] = block.step
    if isinstance(solver, UniPCSolver):
        fields |= {"order": solver.order, "predictions": len(solver.predictions)}
        tensors |= {f"{name}.x0.{place}": x0 for place, x0 in enumerate(solver.predictions)}
        if solver.before is not None:
            tensors[f"{name}.before"] = solver.before
    return fields


def made_by(engine: Engine, preset: Preset) -> dict[str, Any]:
    """What must be the same for a session to go on: sizes, settings, and a look at the weights."""
    fields, config = asdict(preset), engine.config
    settings = {**fields.pop("sampler"), **fields.pop("context"), **fields}
    made = {
        "model": asdict(engine.spec),
        "preset": {name: value for name, value in settings.items() if name not in NO_MATTER},
        "decoder": asdict(engine.parts.vae.spec),
        "dtype": {
            "dtype": config.dtype, "precision": config.precision, "kv": config.kv_dtype,
            "lowp": None if config.precision_map is None else asdict(config.precision_map),
        },
        "weights": {"transformer": fingerprint(engine.parts.transformer), "decoder": fingerprint(engine.parts.vae)},
    }
    found: dict[str, Any] = json.loads(json.dumps(made))  # as it will be read: lists for tuples
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of some values of every weight: other checkpoints have another one."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        values = weight.flatten()[:: max(1, weight.numel() // SAMPLED)]
        digest.update(name.encode() + values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Saved:
    """A file's header and tensors, on the CPU, of a session that `engine` can go on with."""

    engine: Engine
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def fields(self) -> dict[str, Any]:
        """What a session is made from, caches and decoder as they are at the beginning."""
        engine, header = self.engine, self.header
        size: tuple[int, int] = tuple(header["size"])
        sampler = Sampler(engine.preset.sampler, header["strength"])
        change = header.get("change")
        texts = [self.tensors[name] for name in ("rows", "negative") if name in self.tensors]
        return {
            "engine": engine,
            "timeline": self.timeline(),
            "sampler": sampler,
            "size": size,
            "noise": self.noise(),
            "rows": self.tensor("rows"),
            "branches": [engine.new_branch(text.to(engine.device), size) for text in texts],
            "actions": self.actions(),
            "flight": [self.in_flight(place, sampler) for place in range(len(header["flight"]))],
            "change": PromptChange(self.tensor("change.old"), self.tensor("change.new"), **change) if change else None,
            **{name: self.tensor(name) for name in OPTIONAL if name in self.tensors},
        }

    def fill(self, session: Session) -> None:
        """Give a session that was let in its pages and its decoder's state."""
        for place, branch in enumerate(session.branches):
            fields = self.header["caches"][place]
            places = {frame: position for frame, position in fields["places"]}
            kv = self.tensor(f"cache.{place}.kv")
            scales, sink = (self.optional(f"cache.{place}.{name}") for name in ("scales", "sink"))
            branch.cache.import_pages(HeldPages(tuple(fields["frames"]), places, kv, scales, sink))
        decoder, track = self.header["decoder"], session.track
        if decoder["fast"] and self.engine.parts.fast_vae is not None:
            track.vae = self.engine.parts.fast_vae
        slots = [name for name in self.tensors if name.startswith("decoder.")]
        history = {int(name.removeprefix("decoder.")): self.tensor(name) for name in slots}
        track.state = StreamState(history, decoder["frames"])

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].to(self.engine.device)

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.tensors else None

    def timeline(self) -> Timeline:
        timeline = Timeline(self.engine.preset)
        for name, value in self.header["timeline"].items():
            setattr(timeline, name, tuple(value) if isinstance(value, list) else value)
        timeline.places = {frame: place for frame, place in self.header["timeline"]["places"]}
        return timeline

    def actions(self) -> ActionTrack:
        actions = ActionTrack(self.engine.spec.actions)
        actions.starts, actions.held = self.header["actions"]["starts"], self.header["actions"]["held"]
        return actions

    def noise(self) -> Noise:
        fields = self.header["noise"]
        if "seed" in fields:
            return PhiloxNoise(fields["seed"], str(self.engine.device))
        return InjectedNoise(self.tensors["noise.initial"], self.tensors.get("noise.renoise"), fields["first"])

    def in_flight(self, place: int, sampler: Sampler) -> InFlight:
        fields, name = self.header["flight"][place], f"flight.{place}"
        solver = sampler.begin()
        if isinstance(solver, UniPCSolver):
            solver.order = fields["order"]
            solver.predictions = [self.tensor(f"{name}.x0.{index}") for index in range(fields["predictions"])]
            solver.before = self.optional(f"{name}.before")
        span = Span(fields["index"], range(fields["start"], fields["stop"]))
        return InFlight(span, self.tensor(name), solver, fields["step"])


def read_session(engine: Engine, path: Path) -> Saved:
    """UsageError for a file that this engine cannot go on with, InferixError for a broken one."""
    if not path.is_file():
        raise UsageError(f"no saved session {str(path)!r}; expected a file that session.save() wrote")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise UsageError(f"{str(path)!r} is a safetensors file, but no saved session")
            header = json.loads(text)
            check_header(header, engine, path)
            if missing := set(header["tensors"]) - set(file.keys()):
                raise KeyError(min(missing))
            return Saved(engine, header, {name: file.get_tensor(name) for name in header["tensors"]})
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        said = " ".join(str(error).split())
        raise InferixError(
            f"{str(path)!r} is cut short or no saved session: {said}; save it again, or use an older copy"
        ) from error
    except KeyError as error:
        raise InferixError(f"{str(path)!r} lacks {error}; save it again, or use an older copy") from error


def check_header(header: dict[str, Any], engine: Engine, path: Path) -> None:
    """UsageError with the first difference, unless the file was made with what this engine has."""
    if header["version"] != VERSION:
        raise UsageError(
            f"{str(path)!r} has version {header['version']} of the format, this is version {VERSION}; "
            "restore it with the version of inferix that saved it"
        )
    here = made_by(engine, engine.preset)
    for part, values in here.items():
        for name, value in values.items():
            there = header["made_by"][part].get(name)
            if there != value:
                raise UsageError(
                    f"{str(path)!r} was saved with another {part}: {name} is {there!r} there and {value!r} here; "
                    "load the engine as it was loaded then"
                )
    if header["decoder"]["fast"] and engine.parts.fast_vae is None:
        raise UsageError(f"{str(path)!r} was saved while the fast decoder was in use; load the engine with fast_vae")
    engine.spec.latent_size(tuple(header["size"]))
