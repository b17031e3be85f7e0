"""Executors: `eager` calls the model, `fused` launches its lowered graph, `captured` replays that as a CUDA graph.

The block loop asks an executor for a pass or a whole block and does not know about graphs. All executors compute the
same function; `eager` is the reference of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...errors import InferixError, UsageError, quoted
from ...graphs.capture import CaptureBackend, CudaGraphs
from ...graphs.lowered import Lowered, with_pages
from ...graphs.rewrites import chosen
from ...graphs.shards import ALONE, Shard, run_on_tile
from ...models.cross_attention import TextByFrames
from ...models.registry import family_of
from ...models.transformer import KeyValues, TextContext, Transformer
from ...schemes.block_schedule import supports_whole_block
from ...schemes.page_needs import least_pages, page_needs
from ...schemes.presets import Preset
from ..capacity.planner import Workload, needed, suggestions
from ..config import DTYPES, EngineConfig
from ..executor_specs import REFERENCE, names_with
from ..kv.page_store import KV_DTYPES
from ..programs.graph_builder import GraphBuilder, GraphKey, OnPages, lowered_graph, stores, tables
from ..programs.graph_store import GraphStore
from ..telemetry.profile import Profile
from .launcher import Launcher, Loaded, NotEnoughMemory
from .loading import Components
from .lowp_reference import check_layers, with_packed_layers


@dataclass(eq=False)
class Conditioning:
    """Prompt input of graphs: rows [1, text_len, text_dim], and cached outputs of prompt graphs.

    cached: by recipe; of graphs that read other texts too, by recipe and those texts.
    """

    rows: Tensor
    cached: dict[tuple[object, ...], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MixedConditioning:
    """Prompt input of a pass whose frames follow different texts.

    texts: by their numbers in a pass, ascending. groups: (text, frames) in token order.
    """

    texts: Mapping[int, Conditioning]
    groups: tuple[tuple[int, int], ...]


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

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> Tensor:
        """Run one pass: latents [B, F, C, H, W] to velocity, arguments as of the model's forward."""

    def run_block(
        self, latents: Tensor, text: Text, attention: KeyValues, frames: range, seed: int, actions: Tensor | None
    ) -> Tensor:
        """Denoise a block from noise [F, C, H, W] to clean latents and write its keys and values to its pages.

        Noise between steps is that of `PhiloxNoise(seed)` for the absolute `frames`.
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
    ) -> None:
        self.model, self.plain, self.faster, self.shard = model, packed or model, faster, shard
        self.passes = faster(self.plain)

    def condition(self, rows: Tensor) -> TextContext:
        return self.model.embed_text(rows[None])

    def join(self, texts: Sequence[Text]) -> Text:
        return texts[0] if len(texts) == 1 else joined(texts)

    def mix(self, texts: Mapping[int, Text], groups: tuple[tuple[int, int], ...]) -> TextByFrames:
        return TextByFrames([(frames, eager_text(texts[text])) for text, frames in groups])

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> Tensor:
        context = eager_text(text)

        def run(latents: Tensor, kv: KeyValues, origin: tuple[int, int] | None = None) -> Tensor:
            more = () if origin is None else (origin,)
            velocity: Tensor = self.passes(latents, timesteps, context, kv, actions, *more)
            return velocity

        if self.shard.ranks == 1:
            return run(latents, attention)
        spec = self.model.spec
        return run_on_tile(run, self.shard, spec.patch, spec.grid, latents, paged(attention))

    def run_block(
        self, latents: Tensor, text: Text, attention: KeyValues, frames: range, seed: int, actions: Tensor | None
    ) -> Tensor:
        raise AssertionError("eager runs pass by pass")

    def refresh_derived_weights(self) -> None:
        """Forget what the faster layers keep; the model reads its weights at each pass."""
        self.passes = self.faster(self.plain)

    def start_profile(self, profile: Profile) -> None:
        raise UsageError(f"executor {REFERENCE!r} cannot be profiled; use {names_with(lambda spec: spec.graphs)}")

    def bytes_by_owner(self) -> dict[str, int]:
        return {}

    def fallbacks(self) -> list[str]:
        return []


class GraphExecutor:
    """Traces, lowers and launches block graphs; with a backend, captures them. Owns the launcher and loaded programs.

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
        rewrites = tuple(chosen(["lowp"] if lowp else [])) if rewrites is None else rewrites
        kv_dtype = None if config.kv_dtype in (None, config.dtype) else KV_DTYPES[config.kv_dtype]
        self.graph_of = GraphBuilder(
            model.spec, preset, config.precision, dtype, config.device, rewrites, lowp, kv_dtype, parts.shard
        )
        self.supports_whole_block = supports_whole_block(preset)
        self.launcher = Launcher(dict(model.named_parameters()), device, backend)
        self.programs: dict[GraphKey, Lowered] = {}
        self.loaded: dict[GraphKey, Loaded] = {}
        self.store = None if config.graphs is None else GraphStore.open(Path(config.graphs), self.graph_of, create=True)
        self.traces = self.prompts = 0

    def condition(self, rows: Tensor) -> Conditioning:
        return Conditioning(rows[None])

    def join(self, texts: Sequence[Text]) -> Text:
        (text,) = texts  # no batches
        return text

    def mix(self, texts: Mapping[int, Text], groups: tuple[tuple[int, int], ...]) -> MixedConditioning:
        read = sorted({text for text, _ in groups})
        single = {text: found for text in read if isinstance(found := texts[text], Conditioning)}
        return MixedConditioning(single, groups)

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> Tensor:
        given = {"latents": latents, "timesteps": timesteps}
        texts = text.groups if isinstance(text, MixedConditioning) else ()
        key = GraphKey.of(latents, paged(attention), whole=False, texts=texts)
        return self.run(key, given, text, attention, actions)["velocity"]

    def run_block(
        self, latents: Tensor, text: Text, attention: KeyValues, frames: range, seed: int, actions: Tensor | None
    ) -> Tensor:
        given = {
            "latents": latents[None],
            "frames": torch.tensor([list(frames)], dtype=torch.int32),
            "noise_key": torch.tensor([signed(seed)]),
        }
        key = GraphKey.of(latents, paged(attention), whole=True)
        return self.run(key, given, text, attention, actions)["latents"][0]

    def start_profile(self, profile: Profile) -> None:
        self.launcher.profile = profile

    def bytes_by_owner(self) -> dict[str, int]:
        return self.launcher.bytes_by_owner()

    def fallbacks(self) -> list[str]:
        return list(self.launcher.fallbacks)

    def refresh_derived_weights(self) -> None:
        """Recompute the constants in place; captured graphs stay valid."""
        self.launcher.refresh_derived_weights()

    def run(
        self, key: GraphKey, given: Mapping[str, Tensor], text: Text, attention: KeyValues, actions: Tensor | None
    ) -> dict[str, Tensor]:
        assert isinstance(text, Conditioning | MixedConditioning) and isinstance(attention, OnPages)
        loaded = self.load(key, attention)
        inputs = {**given, **tables(key, attention), **self.prompt_inputs(loaded, text)}
        if actions is not None:
            inputs["block.actions"] = actions
        return self.launcher.run(loaded.body, inputs)

    def prompt_inputs(self, loaded: Loaded, text: Conditioning | MixedConditioning) -> dict[str, Tensor]:
        """The graph's prompt inputs; runs the prompt graph once for each prompt and caches the result."""
        if isinstance(text, Conditioning):
            owner, others, rows = text, tuple[Conditioning, ...](), {"text": text.rows}
        else:  # the prompt, first of the texts, is replaced most often: what is cached with it goes with it
            owner, *rest = text.texts.values()
            others, rows = tuple(rest), {f"text.{number}": single.rows for number, single in text.texts.items()}
        if loaded.prompt is None:
            return rows
        if any((recipe, *others) not in owner.cached for recipe in loaded.recipes.values()):
            self.prompts += 1
            outputs = self.launcher.run(loaded.prompt, rows)
            owner.cached |= {(loaded.recipes[name], *others): tensor for name, tensor in outputs.items()}
        return {name: owner.cached[(recipe, *others)] for name, recipe in loaded.recipes.items()}

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
            self.loaded[key] = self.launcher.load(self.lowered(key), state)
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

    def lowered(self, key: GraphKey) -> Lowered:
        """Return the program of a key, traced for the pages of one session and adapted to the store's size."""
        least = replace(key, pages=least_pages(self.preset))
        if least not in self.programs:
            self.programs[least] = self.stored_or_traced(least)
        return with_pages(self.programs[least], key.pages)

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
        load = Workload(spec, self.preset, self.decoder, 0, key.size(spec), config.dtype, kv_dtype)
        smaller = suggestions(load, needed(load) - missing)
        fitting = [str(suggestion) for suggestion in smaller if suggestion.fits]
        return f"{'; or '.join(fitting)} would fit" if fitting else "no smaller window, size or dtype would fit"


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
        raise UsageError(f"executor {config.executor!r} made {quoted(executor)}, which is no Executor: no {lacking}")
    return executor


def make_eager(config: EngineConfig, preset: Preset, parts: Components) -> EagerExecutor:
    model, precision = parts.transformer, config.precision_map
    packed = None if precision is None else with_packed_layers(model, precision)
    if config.shard_weights:
        return EagerExecutor(model, shard=parts.shard)  # faster layers would keep the whole weights
    return EagerExecutor(model, packed, family_of(model.spec).on_cpu, parts.shard)


def make_fused(config: EngineConfig, preset: Preset, parts: Components) -> GraphExecutor:
    return GraphExecutor(config, preset, parts)


def make_captured(config: EngineConfig, preset: Preset, parts: Components) -> GraphExecutor:
    return GraphExecutor(config, preset, parts, CudaGraphs(torch.device(config.device)))
