"""Executors: `eager` calls the model, `fused` launches its lowered graph, `captured` replays that as a CUDA graph.

The block loop asks an executor for a pass or a whole block and does not know about graphs. All executors compute the
same function; `eager` is the reference of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...errors import InferixError, UsageError, quoted
from ...graphs.capture import CaptureBackend, CudaGraphs
from ...graphs.lowered import STAGING, Lowered, with_pages, with_prompts, with_run, with_weights
from ...graphs.paged_attention import PagedAttention
from ...graphs.rewrites import chosen
from ...graphs.shards import ALONE, Shard, run_on_ranks
from ...graphs.types import PROMPT_TABLE, name_in_set
from ...kernels.spec import multiprocessors_of, using
from ...models.cross_attention import TextByFrames
from ...models.registry import family_of
from ...models.transformer import FrameContext, KeyValues, TextContext, Transformer
from ...schemes.block_schedule import supports_whole_block
from ...schemes.page_needs import branches, least_pages, page_needs, staging_slots
from ...schemes.presets import Preset
from ..capacity.planner import Workload, needed, suggestions
from ..config import DTYPES, EngineConfig
from ..executor_specs import REFERENCE
from ..kv.page_store import KV_DTYPES
from ..programs.graph_builder import FRAME_CHANNELS, GraphBuilder, GraphKey, OnPages, lowered_graph, stores, tables
from ..programs.graph_store import GraphStore
from ..telemetry.profile import Profile
from .dense_runs import DenseRuns
from .launcher import Launcher, Loaded, NotEnoughMemory
from .loading import Components
from .lowp_reference import check_layers, with_packed_layers
from .prompts import BatchConditioning, Conditioning, MixedConditioning


@dataclass(eq=False)
class FrameInputs:
    """Channels [B, F, C, H, W] that the frames of blocks are given."""

    channels: Tensor


Frames = object  # what passes are given of a block's frames: what the executor's own `embed_frames` returned
Text = object  # a conditioned prompt: what the executor's own `condition`, `join` or `mix` returned


@runtime_checkable
class Executor(Protocol):
    """Runs passes of the network.

    An entry of `EXECUTORS` makes it and has its capabilities. supports_whole_block: True if `run_block` can be called.
    """

    supports_whole_block: bool

    def condition(self, rows: Tensor) -> Text:
        """Prepare a prompt for passes, from the text encoder's rows [text_len, text_dim]."""

    def join(self, texts: Sequence[Text]) -> Text:
        """Join the prompts of several sessions for one pass."""

    def mix(self, texts: Mapping[int, Text], groups: tuple[tuple[int, int], ...]) -> Text:
        """Return the prompt of a pass whose frames follow different texts: (text, frames) in token order."""

    def embed_frames(self, channels: Tensor) -> Frames:
        """Prepare the channels [F, C, H, W] that frames are given beside their latents, for all passes of a block."""

    def join_frames(self, frames: Sequence[Frames]) -> Frames:
        """Join the frames of several sessions for one pass."""

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Text,
        attention: KeyValues,
        actions: Tensor | None,
        given: Frames | None = None,
    ) -> Tensor:
        """Run one pass: latents [B, F, C, H, W] to velocity, arguments as of the model's forward.

        given: of `embed_frames`, for models whose frames are given channels.
        """

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
        """Denoise blocks of B sessions to clean latents [B, F, C, H, W]; write keys and values to pages.

        shape: (C, H, W). Noise, at the start and between steps, is that of `PhiloxNoise` with each session's seed for
        its absolute `frames`. before: latents of the blocks before and the pages of a first pass that commits them;
        actions are those of both then, and a block's own commit is left to the next.
        """

    def refresh_derived_weights(self) -> None:
        """Recompute tensors derived from the weights after an in-place change; conditioned prompts stay as they are."""

    def start_profile(self, profile: Profile) -> None:
        """Profile all passes from now on; UsageError for an executor that cannot be profiled."""

    def bytes_by_owner(self) -> dict[str, int]:
        """Bytes of memory other than weights and pages, by owner."""

    def fallbacks(self) -> list[str]:
        """Reasons why passes ran another way than this executor's, such as calls that could not be captured."""


class EagerExecutor:
    """Calls the model pass by pass.

    packed: the model with low-precision layers, used for passes only. faster: makes a copy of it over the same weights
    that is faster on its device. shard: part of each pass that this rank computes.
    """

    supports_whole_block = False

    def __init__(
        self,
        model: Transformer,
        packed: Transformer | None = None,
        faster: Callable[[Transformer], Transformer] = lambda model: model,
        shard: Shard = ALONE,
        keep_frames: bool = True,
    ) -> None:
        self.model, self.plain, self.faster, self.shard = model, packed or model, faster, shard
        self.keep_frames = keep_frames
        self.profile: Profile | None = None
        self.passes = faster(self.plain)

    def condition(self, rows: Tensor) -> TextContext:
        return self.model.embed_text(rows[None])

    def join(self, texts: Sequence[Text]) -> Text:
        return texts[0] if len(texts) == 1 else joined(texts)

    def mix(self, texts: Mapping[int, Text], groups: tuple[tuple[int, int], ...]) -> TextByFrames:
        return TextByFrames([(frames, eager_text(texts[text])) for text, frames in groups])

    def embed_frames(self, channels: Tensor) -> FrameContext:
        own = channels[None]
        if self.shard.ranks > 1:
            own = self.shard.cut(own, self.model.spec.patch)
        return self.model.embed_frames(own, self.keep_frames)

    def join_frames(self, frames: Sequence[Frames]) -> FrameContext:
        return FrameContext.joined([part for part in frames if isinstance(part, FrameContext)])

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Text,
        attention: KeyValues,
        actions: Tensor | None,
        given: Frames | None = None,
    ) -> Tensor:
        context = eager_text(text)
        beside = {} if given is None else {"frames": given}

        def run(latents: Tensor, kv: KeyValues, origin: tuple[int, int] | None = None) -> Tensor:
            more = () if origin is None else (origin,)
            velocity: Tensor = self.passes(latents, timesteps, context, kv, actions, *more, **beside)
            return velocity

        def whole() -> Tensor:
            if self.shard.runs_alone:
                return run(latents, attention)
            spec = self.model.spec
            return run_on_ranks(run, self.shard, spec.patch, spec.grid, latents, paged(attention))

        return whole() if self.profile is None else self.profile.observe(whole)

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
        raise AssertionError("eager runs pass by pass")

    def refresh_derived_weights(self) -> None:
        """Forget what the faster layers keep; the model reads its weights at each pass."""
        self.passes = self.faster(self.plain)

    def start_profile(self, profile: Profile) -> None:
        self.profile = profile

    def bytes_by_owner(self) -> dict[str, int]:
        return {}

    def fallbacks(self) -> list[str]:
        return []


class GraphExecutor:
    """Traces, lowers and launches block graphs; with a backend, captures them. Owns the launcher and loaded programs.

    A batch has a program of its own for each number of sessions. Single passes run the first set of weights; programs
    of whole blocks read all sets that their passes run.

    preset: as loaded, for block sizes and graph names; the window of a pass is in its page tables. rewrites: applied to
    every graph; None for the default ones. traces: number of programs not read from a
    store. prompts: number of runs of a prompt graph.
    """

    def __init__(
        self,
        config: EngineConfig,
        preset: Preset,
        parts: Components,
        backend: CaptureBackend | None = None,
        rewrites: tuple[str, ...] | None = None,
    ) -> None:
        self.config, self.preset, self.decoder = config, preset, parts.vae.spec
        model, device, dtype = parts.transformer, torch.device(config.device), DTYPES[config.dtype]
        lowp = config.precision_map
        if rewrites is None:
            left_out = [] if config.keeps_frames else ["hoist-frames"]
            if "block_attention" in config.kernels:  # these would put another op in the place of the chosen form
                left_out += ["split-keys"] if "dense_attention" in config.kernels else ["dense-attention", "split-keys"]
            rewrites = tuple(chosen(["lowp"] if lowp else [], left_out))
        kv_dtype = None if config.kv_dtype in (None, config.dtype) else KV_DTYPES[config.kv_dtype]
        self.graph_of = GraphBuilder(
            model.spec, preset, config.precision, dtype, config.device, rewrites, lowp, kv_dtype, parts.shard,
            multiprocessors_of(config.device),
        )  # fmt: skip
        self.supports_whole_block, self.session_slots = supports_whole_block(preset), staging_slots(preset)
        weights = {
            name_in_set(name, number): weight
            for number, module in enumerate(parts.transformers)
            for name, weight in module.named_parameters()
        }
        self.weights = 0  # number of the set that single passes run
        self.launcher = Launcher(weights, device, backend)
        dense = "dense-attention" in rewrites and parts.shard.tokens.size == 1  # several have sums to merge
        grouped = model.spec.kv_heads != model.spec.num_heads
        self.dense = DenseRuns(config.kernels.get("dense_attention"), device, dense, grouped)
        self.programs: dict[GraphKey, Lowered] = {}
        self.loaded: dict[GraphKey, Loaded] = {}
        self.store = None if config.graphs is None else GraphStore.open(Path(config.graphs), self.graph_of, create=True)
        self.traces = self.prompts = 0
        self.frames: tuple[tuple[FrameInputs, ...], FrameInputs] | None = None  # of the last batch

    def for_set(self, number: int) -> GraphExecutor:
        """An executor of single passes under another set of weights, with the same launcher and traced programs."""
        other = copy.copy(self)
        other.weights, other.loaded, other.frames, other.supports_whole_block = number, {}, None, False
        return other

    def condition(self, rows: Tensor) -> Conditioning:
        return Conditioning(rows[None])

    def join(self, texts: Sequence[Text]) -> Text:
        return texts[0] if len(texts) == 1 else BatchConditioning(tuple(map(graph_text, texts)))

    def mix(self, texts: Mapping[int, Text], groups: tuple[tuple[int, int], ...]) -> MixedConditioning:
        read = sorted({text for text, _ in groups})
        single = {text: found for text in read if isinstance(found := texts[text], Conditioning)}
        return MixedConditioning(single, groups)

    def embed_frames(self, channels: Tensor) -> FrameInputs:
        return FrameInputs(channels[None])

    def join_frames(self, frames: Sequence[Frames]) -> Frames:
        inputs = tuple(one for one in frames if isinstance(one, FrameInputs))
        if len(inputs) == 1:
            return inputs[0]
        if self.frames is None or self.frames[0] != inputs:  # of the passes of one block
            self.frames = inputs, FrameInputs(torch.cat([one.channels for one in inputs]))
        return self.frames[1]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Text,
        attention: KeyValues,
        actions: Tensor | None,
        given: Frames | None = None,
    ) -> Tensor:
        values = {"latents": latents, "timesteps": timesteps}
        first, *_ = sessions_of(text)
        texts = first.groups if isinstance(first, MixedConditioning) else ()
        pages = paged(attention)
        key = GraphKey.of(latents.shape, pages, False, self.session_slots, texts)
        return self.run(key, values, text, pages, actions, given)["velocity"]

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
        values = {
            "frames": torch.tensor([list(each) for each in frames], dtype=torch.int32),
            "noise_key": torch.tensor([signed(seed) for seed in seeds]),
        }
        pages = paged(attention)
        key = GraphKey.of((len(frames), len(frames[0]), *shape), pages, True, self.session_slots)
        if before is not None:
            assert given is None
            latents, first = before[0], paged(before[1])
            key = replace(key, commits_before=True)
            values |= {"before": latents, **tables(key, first, "both")}
            if actions is not None:
                values["both.actions"], actions = actions, actions[:, latents.shape[1] :]
        return self.run(key, values, text, pages, actions, given)["latents"]

    def start_profile(self, profile: Profile) -> None:
        self.launcher.profile = profile

    def bytes_by_owner(self) -> dict[str, int]:
        return {} if self.weights else self.launcher.bytes_by_owner()

    def fallbacks(self) -> list[str]:
        return list(self.launcher.fallbacks)

    def refresh_derived_weights(self) -> None:
        """Recompute the constants in place; captured graphs stay valid."""
        if not self.weights:
            self.launcher.refresh_derived_weights()
        for loaded in self.loaded.values():
            loaded.shown = None

    def run(
        self,
        key: GraphKey,
        values: Mapping[str, Tensor],
        text: Text,
        attention: OnPages,
        actions: Tensor | None,
        given: Frames | None,
    ) -> dict[str, Tensor]:
        form = None if key.commits_before else self.dense.form_for(attention)  # a commit lists other pages
        if form is not None:
            assert isinstance(attention, PagedAttention) and attention.run is not None
            key = replace(key, run=attention.run)
        loaded = self.load(key, attention)
        inputs = {**values, **tables(key, attention), **self.prompt_inputs(loaded, sessions_of(text))}
        if actions is not None:
            inputs["block.actions"] = actions
        if given is not None:
            assert isinstance(given, FrameInputs)
            inputs |= self.frame_inputs(loaded, given)
        with using(**({} if form is None else {"dense_attention": form})):  # which a capture keeps
            return self.launcher.run(loaded.body, inputs)

    def frame_inputs(self, loaded: Loaded, given: FrameInputs) -> dict[str, Tensor]:
        """The graph's inputs from the channels of a block's frames.

        The frames graph runs where the last block was another, and writes to the static inputs of the body.
        """
        inputs = {FRAME_CHANNELS: given.channels}
        if loaded.frames is None:
            return inputs
        own = {name: loaded.body.inputs[name] for name in loaded.frames.launches.outputs}
        if loaded.shown is not given:
            self.launcher.run_into(loaded.frames, inputs, own)
            loaded.shown = given
        return inputs | own

    def prompt_inputs(
        self, loaded: Loaded, texts: Sequence[Conditioning | MixedConditioning]
    ) -> dict[str, Tensor]:
        """The graph's prompt inputs, of one text for each session."""
        if loaded.slots is not None:
            return {PROMPT_TABLE: loaded.slots.place([self.prompt_outputs(loaded, text) for text in texts])}
        return self.prompt_outputs(loaded, texts[0]) if len(texts) == 1 else self.batch_outputs(loaded, texts)

    def prompt_outputs(self, loaded: Loaded, text: Conditioning | MixedConditioning) -> dict[str, Tensor]:
        """Outputs of the prompt graph for one text; runs it once for each prompt and caches the result."""
        owner, *others = text.by_input.values()  # what is cached with the first goes with it
        rows = {name: single.rows for name, single in text.by_input.items()}
        if loaded.prompt is None:
            return rows
        if any((recipe, *others) not in owner.cached for recipe in loaded.recipes.values()):
            self.prompts += 1
            outputs = self.launcher.run(loaded.prompt, rows)
            owner.cached |= {(loaded.recipes[name], *others): tensor for name, tensor in outputs.items()}
        return {name: owner.cached[(recipe, *others)] for name, recipe in loaded.recipes.items()}

    def batch_outputs(
        self, loaded: Loaded, texts: Sequence[Conditioning | MixedConditioning]
    ) -> dict[str, Tensor]:
        """Outputs of the prompt graph for a batch with a row of text for each session; those of the last are kept."""
        singles = tuple(single for text in texts for single in text.by_input.values())
        if loaded.batch is None or loaded.batch[0] != singles:
            rows = {name: torch.cat([text.by_input[name].rows for text in texts]) for name in texts[0].by_input}
            self.prompts += 1
            loaded.batch = singles, rows if loaded.prompt is None else self.launcher.run(loaded.prompt, rows)
        return loaded.batch[1]

    def load(self, key: GraphKey, attention: OnPages) -> Loaded:
        """Return the program of a key, bound to the page tensors; binds it again if they have moved.

        InferixError, with settings that would fit, if the device has too little memory.
        """
        state = stores(attention)
        loaded = self.loaded.get(key)
        if loaded is not None and all(loaded.state[name] is kv for name, kv in state.items()):
            return loaded
        self.drop_outgrown(key, state)
        try:
            self.loaded[key] = self.launcher.load(self.lowered(key, state), state)
        except NotEnoughMemory as error:
            raise InferixError(f"{error}; {self.advice(key, error.missing)}") from error
        return self.loaded[key]

    def drop_outgrown(self, key: GraphKey, state: Mapping[str, Tensor]) -> None:
        """Release programs bound to page tensors of this picture size that have moved."""
        self.loaded = {
            other: loaded for other, loaded in self.loaded.items()
            if other.latent[2:] != key.latent[2:]
            or all(state.get(name, kv) is kv for name, kv in loaded.state.items())
        }  # fmt: skip

    def lowered(self, key: GraphKey, state: Mapping[str, Tensor]) -> Lowered:
        """Return the program of a key, traced for the pages of one session and adapted to the sizes of the stores.

        A batch that finds its prompts by table has room for those of each session.
        """
        least = replace(key, pages=least_pages(self.preset), run=(0, key.run[1]) if key.run else ())
        if least not in self.programs:
            self.programs[least] = self.stored_or_traced(least)
        staging = state.get(STAGING)
        program = with_pages(self.programs[least], key.pages, None if staging is None else staging.shape[1])
        program = with_weights(program, self.weights) if self.weights else program
        program = with_run(program, key.run[0]) if key.run else program
        return program if key.sessions == 1 else with_prompts(program, key.sessions * branches(self.preset))

    def stored_or_traced(self, key: GraphKey) -> Lowered:
        """Return the stored program, or build and store one; tracing needs no memory for weights."""
        if self.store is not None and (stored := self.store.find(key)) is not None:
            return stored
        self.traces += 1
        lowered = lowered_graph(self.graph_of, key)
        if self.store is not None:
            self.store.keep(key, lowered)
        return lowered

    def advice(self, key: GraphKey, missing: int) -> str:
        """Settings that need `missing` bytes less, as text."""
        config, spec = self.config, self.graph_of.spec
        if page_needs(self.preset).context is None:
            return "give a window such as local_attn_size=21"
        kv_dtype = config.kv_dtype or config.dtype
        on_gpu = config.device.startswith("cuda")
        load = Workload(
            spec, self.preset, self.decoder, 0, key.size(spec), config.dtype, kv_dtype, on_gpu=on_gpu
        )
        smaller = suggestions(load, needed(load) - missing)
        fitting = [str(suggestion) for suggestion in smaller if suggestion.fits]
        return f"{'; or '.join(fitting)} would fit" if fitting else "no smaller window, size or dtype would fit"


def graph_text(text: Text) -> Conditioning | MixedConditioning:
    assert isinstance(text, Conditioning | MixedConditioning)
    return text


def sessions_of(text: Text) -> tuple[Conditioning | MixedConditioning, ...]:
    """The texts of a pass, one for each session."""
    return text.sessions if isinstance(text, BatchConditioning) else (graph_text(text),)


def eager_text(text: Text) -> TextContext | TextByFrames:
    assert isinstance(text, TextContext | TextByFrames)
    return text


def joined(texts: Sequence[Text]) -> TextContext | TextByFrames:
    """Concatenate texts of one model along the batch dim; those by frames have frames in the same places."""
    if mixed := [text.parts for text in texts if isinstance(text, TextByFrames)]:
        places = zip(*mixed, strict=True)
        return TextByFrames([(part[0][0], joined([text for _, text in part])) for part in places])
    contexts = [text for text in texts if isinstance(text, TextContext)]
    text = tuple(concatenated(layer) for layer in zip(*(context.text for context in contexts), strict=True))
    images = [context.image for context in contexts if context.image is not None]
    masks = [context.mask for context in contexts if context.mask is not None]
    vectors = [context.vector for context in contexts if context.vector is not None]
    return TextContext(
        text,
        tuple(concatenated(layer) for layer in zip(*images, strict=True)) if images else None,
        torch.cat(masks) if masks else None,
        torch.cat(vectors) if vectors else None,
    )


def concatenated(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate (keys, values) pairs along the batch dim."""
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys), torch.cat(values)


def paged(attention: KeyValues) -> OnPages:
    if not isinstance(attention, OnPages):
        raise UsageError(f"graphs read pages, and {type(attention).__name__} has none; use executor {REFERENCE!r}")
    return attention


def signed(seed: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def make_executor(config: EngineConfig, preset: Preset, parts: Components) -> Executor:
    """Make the executor that `config` names.

    UsageError for low-precision layers that the model does not have, and for an entry that makes something else.
    """
    if config.precision_map is not None:
        check_layers(parts.transformer, config.precision_map)
    executor = config.executor_spec.maker(config, preset, parts)
    if not isinstance(executor, Executor):
        methods = [name for name in vars(Executor) if not name.startswith("_")] + [*Executor.__annotations__]
        lacking = ", ".join(sorted(name for name in methods if not hasattr(executor, name)))
        made = f"executor {quoted(config.executor)} made {quoted(executor)}"
        raise UsageError(f"{made}, which is no Executor: no {lacking}")
    return executor


def make_executors(config: EngineConfig, preset: Preset, parts: Components) -> tuple[Executor, ...]:
    """Make an executor for each set of weights; sets that are one module share theirs."""
    made: dict[Transformer, Executor] = {parts.transformer: (first := make_executor(config, preset, parts))}
    for number, module in enumerate(parts.transformers):
        if module in made:
            continue
        if isinstance(first, GraphExecutor):
            made[module] = first.for_set(number)
        else:
            made[module] = make_executor(config, preset, replace(parts, transformer=module, more=()))
    return tuple(made[module] for module in parts.transformers)


def make_eager(config: EngineConfig, preset: Preset, parts: Components) -> EagerExecutor:
    model, precision = parts.transformer, config.precision_map
    packed = None if precision is None else with_packed_layers(model, precision)
    if config.shard_weights:  # faster layers would keep the whole weights
        return EagerExecutor(model, shard=parts.shard, keep_frames=config.keeps_frames)
    return EagerExecutor(model, packed, family_of(model.spec).with_fast_layers, parts.shard, config.keeps_frames)


def make_fused(config: EngineConfig, preset: Preset, parts: Components) -> GraphExecutor:
    return GraphExecutor(config, preset, parts)


def make_captured(config: EngineConfig, preset: Preset, parts: Components) -> GraphExecutor:
    return GraphExecutor(config, preset, parts, CudaGraphs(torch.device(config.device)))
