"""An exported engine inside Inferix: its programs behind the executor, decoder and text encoder that sessions use.

Keys and values stay in the pages of sessions, so forks, rewinds, saves and several sessions work as on any engine. A
pass gathers the pages that it sees into the tensors that a program reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, quoted
from ..graphs.paged_attention import PagedAttention
from ..graphs.staged_attention import StagedAttention
from ..models.decoder import Decoder, DecoderSpec, StreamState
from ..models.registry import family_named
from ..models.rope import Rope
from ..models.spec import ModelSpec
from ..models.transformer import KeyValues
from ..runtime.config import EngineConfig
from ..runtime.engine import Engine
from ..runtime.execution.executors import Frames, Text
from ..runtime.execution.loading import Components
from ..runtime.executor_specs import MODEL_EXECUTORS, ExecutorSpec
from ..runtime.limits import Limits
from ..runtime.sampler import Sampler
from ..runtime.telemetry.profile import Profile
from ..schemes.page_needs import window
from ..schemes.presets import FIELDS, Preset, with_settings
from .backends import LoadProgram, Program, program_loader
from .kv_precision import dequantised, quantised
from .network import joined
from .plan import Plan, read_plan, restored, takes_groups
from .targets import TARGETS, check_target
from .word_table import PromptTable

KEPT = ("kv_memory", "kv_offload", "batches", "drift_meter")  # settings of an engine that do not concern its programs

MODEL_EXECUTORS["exported"] = ExecutorSpec(
    about="programs of an exported engine, pass by pass", make=f"{__name__}:make_exported", devices=("cpu",),
    kv_dtypes=("float32", "int8"), lowp=("int8",),
)  # fmt: skip


def load_exported(
    folder: str | Path, limits: Limits, settings: Mapping[str, Any], load: LoadProgram | None = None
) -> Engine:
    """Load an exported engine. settings: `KEPT` ones, and fields of the preset that its programs do not depend on.

    load: makes a program from its file; by default the backend of the plan's target. Raises UsageError for a setting
    that the engine was not made for, CheckpointError for a damaged folder, InferixError for a missing runtime.
    """
    plan = read_plan(folder)
    for key in settings:
        if key not in KEPT and key not in FIELDS:
            raise UsageError(f"{key} is {quoted(settings[key])}, but the engine {quoted(folder)} has its own; "
                             "leave it out, or export another engine")  # fmt: skip
    preset = with_settings(plan.preset, **{key: value for key, value in settings.items() if key in FIELDS})
    check_target(TARGETS[plan["target"]], preset, plan["dtype"], False, kv_dtype=plan.kv_dtype)
    if (field := needs_other_programs(plan, preset)) is not None:
        asked, made = (quoted((TRACED_WITH | GROUPED_WITH)[field](each)) for each in (preset, plan.preset))
        raise UsageError(f"{field} is {asked}, but the programs of the engine {quoted(folder)} were made for {made}; "
                         "leave it out, or export another engine")  # fmt: skip
    kept = {key: value for key, value in settings.items() if key in KEPT}
    if plan.kv_dtype != plan["dtype"]:
        kept["kv_dtype"] = plan.kv_dtype
    if lowp := plan.values.get("lowp"):
        kept |= {"lowp": lowp["kind"], "lowp_layers": tuple(lowp["layers"]), "lowp_keep": tuple(lowp["keep"])}
    source = plan["model"]["source"]
    config = EngineConfig.of(source, preset.name, device="cpu", dtype=plan["dtype"],
                            executor="exported", engine=str(folder), **kept)  # fmt: skip
    load = load or program_loader(plan)
    programs = {name: load(path) for name in plan["programs"] if (path := plan.program(name)) is not None}
    return Engine(config, preset, exported_components(plan, preset, programs), limits)


TRACED_WITH: dict[str, Callable[[Preset], Any]] = {  # what the programs of an engine are traced with
    "num_frame_per_block": lambda preset: preset.num_frame_per_block,
    "independent_first_frame": lambda preset: preset.independent_first_frame,
    "window_blocks": lambda preset: preset.window_blocks,
    "clean_weights": lambda preset: preset.context.clean_weights,
    "decoder_zero_start": lambda preset: preset.context.decoder_zero_start,
    "solver": lambda preset: preset.sampler.condition(0) is not None,
    "local_attn_size": window,  # the longest
}


GROUPED_WITH: dict[str, Callable[[Preset], Any]] = {  # what else, where frames of a pass all see the same
    "prompt_switch": lambda preset: preset.context.prompt_switch,
    "commit_in_next": lambda preset: preset.context.commit_in_next,
    "clean_text": lambda preset: preset.context.clean_text,
    "noise2clean_kvrange": lambda preset: preset.context.noise2clean_kvrange,
    "clean_chunk_kvrange": lambda preset: preset.context.clean_chunk_kvrange,
}


def needs_other_programs(plan: Plan, preset: Preset) -> str | None:
    """A field of a preset for which an engine has no programs; None where it can run the preset."""
    for key, value in TRACED_WITH.items():
        asked, made = value(preset), value(plan.preset)
        if asked > made if key == "local_attn_size" else asked != made:
            return key
    if plan.grouped or not takes_groups(preset):
        return None
    return next(key for key, value in GROUPED_WITH.items() if value(preset) != value(plan.preset))


def exported_components(plan: Plan, preset: Preset, programs: Mapping[str, Program]) -> Components:
    """The parts of an engine: the transformer has no weights, which are in the programs."""
    size = (plan["size"]["picture"][0], plan["size"]["picture"][1])
    family = family_named(plan["spec"]["family"], plan["spec"]["name"])
    kind = type(next(iter(family.models.values())))
    spec: ModelSpec = replace(restored(kind, plan["spec"]), default_size=size)
    with torch.device("meta"):
        transformer = family.build(spec).eval().requires_grad_(False)
    if (file := plan.values.get("parameters")) is not None:
        with np.load(plan.folder / file) as kept:
            state = {name: torch.from_numpy(kept[name]) for name in kept.files}
        transformer.load_state_dict(state, strict=False, assign=True)
    sizes = family.chosen_decoder_spec(spec, not plan["decoder"]["encodes"])
    table = PromptTable(plan["text"], plan.folder)
    return Components(
        transformer=transformer,
        vae=ExportedDecoder(sizes, plan, programs, preset.context.decoder_zero_start),
        text=lambda: ExportedText(table),
        source=plan["model"]["source"],
        form="exported",
        digest=lambda: plan["built"]["checkpoint"],
        size=size,
        more=(transformer,) * (len(preset.weight_sets) - 1),  # one executor runs the programs of all sets
        fingerprints=dict.fromkeys(("transformer", "decoder"), plan.fingerprint),
    )


def make_exported(config: EngineConfig, preset: Preset, parts: Components) -> ExportedExecutor:
    """Make the executor of `MODEL_EXECUTORS["exported"]`. UsageError for a model that is not an exported engine."""
    if not isinstance(parts.vae, ExportedDecoder):
        message = f"executor is {quoted(config.executor)}, but {quoted(parts.source)} is not exported; give engine"
        raise UsageError(message)
    return ExportedExecutor(parts.vae.programs, parts.transformer.rope, preset, parts.vae.grouped)


class ExportedText:
    """The text encoder of an engine: rows of its words or its prompts."""

    def __init__(self, table: PromptTable) -> None:
        self.table = table

    def encode(self, prompt: str) -> Tensor:
        return torch.from_numpy(np.array(self.table.encode(prompt)))


class ExportedDecoder(Decoder):
    """A decoder by programs, and an encoder where the engine has one; slots of their states are those of the plan."""

    name = "ExportedDecoder"

    def __init__(self, spec: DecoderSpec, plan: Plan, programs: Mapping[str, Program], zero_start: bool) -> None:
        super().__init__()
        self.spec, self.programs, self.zero_start = spec, programs, zero_start
        self.decoder, self.encoder, self.grouped = plan["decoder"], plan.encoder, plan.grouped

    def encode(self, pixels: Tensor, state: StreamState) -> Tensor:
        """Encode pixels [T, 3, H, W] in [-1, 1] to normalised latents [F, z, h, w]; advances `state`.

        UsageError for an engine that was exported without an encoder.
        """
        facts = self.encoder
        if facts is None:
            raise UsageError("this engine was exported without an encoder; begin without an image or video, or export "
                             "it with prefixes")  # fmt: skip
        begun = [] if state.frames else [facts["first_pictures"]]
        later = (len(pixels) - sum(begun)) // facts["pictures"]
        latents = [
            self.advance("encode_next" if state.frames else "encode_first", {"pixels": part}, facts, state)["latents"]
            for part in pixels.split([*begun, *[facts["pictures"]] * later])
        ]
        return torch.cat(latents)

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        """Decode normalised latents [F, z, h, w] to pixels [T, 3, H, W] in [-1, 1]; advances `state`."""
        pixels = []
        for part in latents.split(self.spec.tile_frames):
            begins = state.frames == 0
            name = self.decoder["first"] if begins else "decode_next"
            pictures = self.advance(name, {"latents": part}, self.decoder, state)["pixels"]
            pixels.append(pictures[-self.decoder["first_pictures"] :] if begins else pictures)
        return torch.cat(pixels)

    def advance(
        self, name: str, values: Mapping[str, Tensor], facts: Mapping[str, Any], state: StreamState
    ) -> dict[str, Tensor]:
        """Run a program over the next frames and a state, and store the next state; returns the other results."""
        slots = {
            f"state_{slot}": state.history[slot].numpy() if slot in state.history else np.zeros(shape, np.float32)
            for slot, shape in enumerate(facts["state"])
        }
        made = self.programs[name](slots | {key: value.contiguous().numpy() for key, value in values.items()})
        results = {key: torch.from_numpy(value) for key, value in made.items()}
        following = {key for key in results if key.startswith("next_")}
        state.history |= {int(key.removeprefix("next_")): results.pop(key) for key in sorted(following)}
        state.frames += 1
        return results


class ExportedExecutor:
    """Runs passes by programs over pages of float32 or int8; see `Executor`.

    grouped: programs take what each frame of a pass sees, and its text; otherwise all see the same.
    """

    supports_whole_block = False

    def __init__(self, programs: Mapping[str, Program], rope: Rope, preset: Preset, grouped: bool) -> None:
        self.programs, self.rope, self.context_timestep = programs, rope, preset.sampler.context_noise
        self.grouped = grouped
        sampler = Sampler(preset.sampler)
        self.denoises_at_context = self.context_timestep in (*sampler.timesteps, *sampler.first.timesteps)

    def condition(self, rows: Tensor) -> dict[str, Any]:
        return self.programs["prompt"]({"rows": rows[None].numpy()})

    def join(self, texts: Sequence[Text]) -> Text:
        (text,) = texts
        return text

    def mix(self, texts: Mapping[int, Text], groups: tuple[tuple[int, int], ...]) -> Text:
        return joined([values_of(texts[text]) for text, frames in groups for _ in range(frames)])

    def embed_frames(self, channels: Tensor) -> Frames:
        raise AssertionError("models whose frames are given channels are not exported")

    def join_frames(self, frames: Sequence[Frames]) -> Frames:
        raise AssertionError("passes of an exported engine are of one session")

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Text,
        attention: KeyValues,
        actions: Tensor | None,
        given: Frames | None = None,
    ) -> Tensor:
        """Run `step`, or for a pass with clean latents `commit`, whose keys and values go to pages of these frames.

        A commit of a pass whose frames all see the same has no use for a velocity, and may have more frames than `step`
        takes: its velocity is 0.
        """
        values, own, stores, scales = self.inputs(latents, timesteps, text, attention, actions)
        levels = timesteps[0].reshape(len(own), -1)[:, 0]  # conditions of the step stand behind them
        clean = (levels == self.context_timestep).nonzero()[:, 0].tolist()
        if clean and (self.grouped or len(clean) == len(own)):
            made = self.programs["commit"](values)
            velocity = made.pop("velocity", None)
            for name, value in made.items():
                *kind, part, layer = name.split("_")
                store = stores[int(layer)] if kind == ["new"] else scales[int(layer)]
                store[int(part == "v"), [own[row] for row in clean]] = torch.from_numpy(value[clean])
            if velocity is not None:
                return torch.from_numpy(velocity)
            if not self.denoises_at_context:
                return torch.zeros_like(latents)
        return torch.from_numpy(self.programs["step"](values)["velocity"])

    def inputs(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> tuple[dict[str, Any], list[int], Sequence[Tensor], Sequence[Tensor]]:
        """Inputs of a pass by name, the pages of its own frames, and the page store and the scales of each layer."""
        assert isinstance(attention, PagedAttention | StagedAttention)
        part, parts = attention.parts[0], attention.parts
        rope = torch.cat([each.rope_time.flatten(0, 1) for each in parts]).float()
        own = [page for each in parts for page in each.pages.flatten().tolist()]
        rows = [
            (each.frames, row[:count].tolist())
            for each in parts
            for row, count in zip(each.page_table, each.page_count, strict=True)
        ]
        listed = list(dict.fromkeys(page for _, row in rows for page in row))
        assert len(latents) == 1 and (self.grouped or all(len(row) == len(listed) for _, row in rows)), parts
        seen = [page for page in listed if page not in own]
        values = dict(values_of(text))
        if self.grouped:
            values |= {
                name: np.array([[page in row for page in pages] for frames, row in rows for _ in range(frames)], bool)
                for name, pages in (("sees_past", seen), ("sees_own", own))
            }
            values.setdefault("text_of", np.zeros(len(own), np.int64))
        if isinstance(attention, StagedAttention):  # what it lists are slots
            assert attention.seen is not None
            at = dict(zip(*(places.tolist() for places in reversed(attention.seen)), strict=True))
            at |= dict(zip(*(places.tolist() for places in attention.written), strict=True))
            own, seen = [at[slot] for slot in own], [at[slot] for slot in seen]
        scales = attention.scales or ()
        values |= {
            "latents": latents.numpy(), "timesteps": timesteps.numpy(), "rope_cos": rope[..., 0].numpy(),
            "rope_sin": rope[..., 1].numpy(),
        }  # fmt: skip
        if actions is not None:
            values["actions"] = actions.numpy()
        sinks = 0 if part.sink_count is None else int(part.sink_count[0])
        for layer, store in enumerate(attention.kv):
            keys, kept = store[:, seen].unbind(0)
            by_keys, by_kept = scales[layer][:, seen].unbind(0) if scales else (None, None)
            if sinks and part.rope_sink is not None:
                moved = between(part.rope_sink[0, 0], part.rope_time[0, 0])
                early = keys[:sinks] if by_keys is None else dequantised(keys[:sinks], by_keys[:sinks])
                early = self.rope.rotate_time(early, moved)
                if by_keys is not None:
                    early, scale = quantised(early)
                    by_keys = torch.cat((scale, by_keys[sinks:]))
                keys = torch.cat((early, keys[sinks:]))
            if by_keys is not None and by_kept is not None:
                values |= {f"past_scale_k_{layer}": by_keys.numpy(), f"past_scale_v_{layer}": by_kept.numpy()}
            values |= {f"past_k_{layer}": keys.contiguous().numpy(), f"past_v_{layer}": kept.contiguous().numpy()}
        return values, own, attention.kv, scales

    def run_block(
        self,
        shape: tuple[int, int, int],
        text: Text,
        attention: KeyValues,
        frames: Sequence[range],
        seeds: Sequence[int],
        actions: Tensor | None,
        given: Frames | None = None,
        before: tuple[Tensor, KeyValues] | None = None,
    ) -> Tensor:
        raise AssertionError("an exported engine runs pass by pass")

    def refresh_derived_weights(self) -> None:
        """Do nothing: the weights are in the programs."""

    def start_profile(self, profile: Profile) -> None:
        raise UsageError("an exported engine cannot be profiled by calls; use executor fused")

    def bytes_by_owner(self) -> dict[str, int]:
        return {}

    def fallbacks(self) -> list[str]:
        return []


def values_of(text: Text) -> dict[str, Any]:
    """Inputs of a program by name, as `ExportedExecutor.condition` and `mix` make them."""
    assert isinstance(text, dict)
    return text


def between(first: Tensor, second: Tensor) -> Tensor:
    """Cosines and sines [a, 2] of the rotation from one to another."""
    (c1, s1), (c2, s2) = first.unbind(-1), second.unbind(-1)
    return torch.stack((c2 * c1 + s2 * s1, s2 * c1 - c2 * s1), dim=-1)
