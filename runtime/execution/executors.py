"""How passes run: `eager` calls the model, `fused` launches its lowered graph, `captured` replays that as a CUDA graph.

The engine asks an executor for a pass, or for a whole block at once, and knows nothing of graphs. All three mean
the same; `eager` is what the others are held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InferixError, UsageError
from ...graphs.capture import CaptureBackend, CudaGraphs
from ...graphs.lowered import Lowered, lower_block, with_pages
from ...graphs.rewrites import chosen
from ...models.wan.transformer import KeyValues, TextContext, WanTransformer
from ...schemes.block_schedule import supports_whole_block
from ...schemes.page_needs import least_pages, page_needs
from ...schemes.presets import Preset
from ..capacity.planner import Workload, needed, suggestions
from ..config import DTYPES, EngineConfig
from ..kv.page_store import KV_DTYPES
from ..programs.graph_builder import GraphBuilder, GraphKey, OnPages, stores, tables
from ..programs.graph_store import GraphStore
from ..telemetry.profile import Profile
from .launcher import Launcher, Loaded, NotEnoughMemory
from .loading import Components
from .lowp_reference import check_layers, with_packed_layers


@dataclass
class Conditioning:
    """A prompt as graphs read it: rows [1, text_len, text_dim], and what prompt graphs made of them, by recipe."""

    rows: Tensor
    made: dict[str, Tensor] = field(default_factory=dict)


Text = TextContext | Conditioning


class Executor(Protocol):
    """What the engine asks. supports_whole_block: whether `run_block` can be called. batches: whether passes
    of several sessions can be run as one.
    """

    supports_whole_block: bool
    batches: bool

    def condition(self, rows: Tensor) -> Text:
        """What passes read of a prompt, from the text encoder's rows [text_len, text_dim]."""

    def join(self, texts: Sequence[Text]) -> Text:
        """What a pass over several sessions reads of their prompts."""

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> Tensor:
        """One pass of the network: the arguments and result of the model's own forward."""

    def run_block(
        self, latents: Tensor, text: Text, attention: KeyValues, frames: range, seed: int, actions: Tensor | None
    ) -> Tensor:
        """A block from noise [F, C, H, W] to clean latents, its keys and values left in its pages.

        Noise between steps is that of `PhiloxNoise(seed)` for the absolute `frames`.
        """

    def refresh_derived_weights(self) -> None:
        """Make anew what was made of weights that have changed in place, but for what `condition` made."""

    def start_profile(self, profile: Profile) -> None:
        """Time what runs from now on; UsageError where that cannot be."""

    def bytes_by_owner(self) -> dict[str, int]:
        """Memory beside weights and pages."""


class EagerExecutor:
    """The model as it is, pass by pass. packed: the same with layers in low precision, for passes alone."""

    supports_whole_block = False
    batches = True

    def __init__(self, model: WanTransformer, packed: WanTransformer | None = None) -> None:
        self.model, self.passes = model, packed or model

    def condition(self, rows: Tensor) -> TextContext:
        return self.model.embed_text(rows[None])

    def join(self, texts: Sequence[Text]) -> TextContext:
        contexts = [text for text in texts if isinstance(text, TextContext)]
        return contexts[0] if len(contexts) == 1 else joined(contexts)

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> Tensor:
        assert isinstance(text, TextContext)
        velocity: Tensor = self.passes(latents, timesteps, text, attention, actions)
        return velocity

    def run_block(
        self, latents: Tensor, text: Text, attention: KeyValues, frames: range, seed: int, actions: Tensor | None
    ) -> Tensor:
        raise AssertionError("eager runs pass by pass")

    def refresh_derived_weights(self) -> None:
        """Nothing to do: the model reads its weights."""

    def start_profile(self, profile: Profile) -> None:
        raise UsageError("executor eager cannot be profiled; use fused, or captured on a GPU")

    def bytes_by_owner(self) -> dict[str, int]:
        return {}


class GraphExecutor:
    """Traces, lowers and launches; with a backend, captures. Owns the launcher and what it loaded, by graph key.

    preset: as loaded, for block sizes and graph names; which window a pass sees is in its page tables.

    rewrites: done to every graph; all that are on by default unless told. traces and prompts count graphs traced and
    runs of a prompt graph.
    """

    batches = False

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
        kept = None if config.kv_dtype in (None, config.dtype) else KV_DTYPES[config.kv_dtype]
        self.graph_of = GraphBuilder(model.spec, preset, config.precision, dtype, config.device, rewrites, lowp, kept)
        self.supports_whole_block = supports_whole_block(preset)
        self.launcher = Launcher(dict(model.named_parameters()), device, backend)
        self.programs: dict[GraphKey, Lowered] = {}
        self.loaded: dict[GraphKey, Loaded] = {}
        self.store = None if config.graphs is None else GraphStore.open(Path(config.graphs), self.graph_of, create=True)
        self.traces = self.prompts = 0

    def condition(self, rows: Tensor) -> Conditioning:
        return Conditioning(rows[None])

    def join(self, texts: Sequence[Text]) -> Text:
        (text,) = texts
        return text

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Text, attention: KeyValues, actions: Tensor | None
    ) -> Tensor:
        given = {"latents": latents, "timesteps": timesteps}
        key = GraphKey.of(latents, paged(attention), whole=False)
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

    def refresh_derived_weights(self) -> None:
        """Make constants anew, where they are: nothing is captured again."""
        self.launcher.refresh_derived_weights()

    def run(
        self, key: GraphKey, given: Mapping[str, Tensor], text: Text, attention: KeyValues, actions: Tensor | None
    ) -> dict[str, Tensor]:
        assert isinstance(text, Conditioning) and isinstance(attention, OnPages)
        loaded = self.load(key, attention)
        inputs = {**given, **tables(key, attention), **self.told(loaded, text)}
        if actions is not None:
            inputs["block.actions"] = actions
        return self.launcher.run(loaded.body, inputs)

    def told(self, loaded: Loaded, text: Conditioning) -> dict[str, Tensor]:
        """What the graph reads of a prompt, made by the prompt graph where nobody made it for this prompt yet."""
        if loaded.prompt is None:
            return {"text": text.rows}
        if any(recipe not in text.made for recipe in loaded.recipes.values()):
            self.prompts += 1
            made = self.launcher.run(loaded.prompt, {"text": text.rows})
            text.made |= {loaded.recipes[name]: tensor for name, tensor in made.items()}
        return {name: text.made[recipe] for name, recipe in loaded.recipes.items()}

    def load(self, key: GraphKey, attention: OnPages) -> Loaded:
        """The program of a key, bound to the pages; bound again if the pages have moved."""
        state = stores(attention)
        found = self.loaded.get(key)
        if found is not None and all(found.state[name] is kv for name, kv in state.items()):
            return found
        self.drop_outgrown(key, state)
        try:
            self.loaded[key] = self.launcher.load(self.lowered(key), state)
        except NotEnoughMemory as error:
            raise InferixError(f"{error}; {self.what_fits(key, error.missing)}") from error
        return self.loaded[key]

    def drop_outgrown(self, key: GraphKey, state: Mapping[str, Tensor]) -> None:
        """Let go of what is bound to pages that pictures of this size have left, and of those pages."""
        self.loaded = {
            other: loaded for other, loaded in self.loaded.items()
            if other.latent[2:] != key.latent[2:]
            or all(state.get(name, kv) is kv for name, kv in loaded.state.items())
        }  # fmt: skip

    def lowered(self, key: GraphKey) -> Lowered:
        """The program of a key: made for as few pages as one session needs, then adapted to as many as there are."""
        least = replace(key, pages=least_pages(self.preset))
        if least not in self.programs:
            self.programs[least] = self.stored_or_traced(least)
        return with_pages(self.programs[least], key.pages)

    def stored_or_traced(self, key: GraphKey) -> Lowered:
        """The stored program, or one traced from a model of the same shape without memory, and kept."""
        if self.store is not None and (stored := self.store.find(key)) is not None:
            return stored
        self.traces += 1
        made = lower_block(self.graph_of(key))
        if self.store is not None:
            self.store.keep(key, made)
        return made

    def what_fits(self, key: GraphKey, missing: int) -> str:
        """What to change, where so many bytes are missing."""
        config, spec = self.config, self.graph_of.spec
        if page_needs(self.preset).held is None:
            return "give a window (--set local_attn_size=21)"
        kept = config.kv_dtype or config.dtype
        load = Workload(spec, self.preset, self.decoder, 0, key.size(spec), config.dtype, kept)
        smaller = suggestions(load, needed(load) - missing)
        fitting = [" ".join(suggestion.options) for suggestion in smaller if suggestion.fits]
        return f"this would fit: {', or '.join(fitting)}" if fitting else "no smaller window, size or dtype would fit"


def joined(contexts: Sequence[TextContext]) -> TextContext:
    """Contexts of one model side by side, along B."""
    text = tuple(beside(layer) for layer in zip(*(context.text for context in contexts), strict=True))
    images = [context.image for context in contexts if context.image is not None]
    return TextContext(text, tuple(beside(layer) for layer in zip(*images, strict=True)) if images else None)


def beside(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys), torch.cat(values)


def paged(attention: KeyValues) -> OnPages:
    if not isinstance(attention, OnPages):
        raise UsageError(f"graphs read pages, and {type(attention).__name__} has none; use executor eager")
    return attention


def signed(seed: int) -> int:
    """A seed of 64 bits as the signed number of the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def make_executor(config: EngineConfig, preset: Preset, parts: Components) -> Executor:
    """The executor that the configuration names. UsageError for layers that the model does not have."""
    model, precision = parts.transformer, config.precision_map
    if precision is not None:
        check_layers(model, precision)
    if config.executor == "eager":
        return EagerExecutor(model, None if precision is None else with_packed_layers(model, precision))
    backend = CudaGraphs(torch.device(config.device)) if config.executor == "captured" else None
    return GraphExecutor(config, preset, parts, backend)
