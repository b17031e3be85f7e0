"""The worker of one rank in this process: weights, page stores, prompts and the executor, driven by plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.collectives import all_to_all, group_of
from ..kernels.spec import using
from ..models.decoder import StreamState
from ..models.registry import family_of
from ..models.transformer import KeyValues
from ..schemes.presets import Preset
from .config import DTYPES, EngineConfig
from .execution.executors import Executor, Frames, Text, make_executors
from .execution.loading import Components
from .execution.lora_adapter import Adapter
from .kv.page_store import KV_DTYPES, PagedStore, PageForm
from .kv.sink_average import average_frame
from .kv.table_slots import TableSlots
from .plans import (
    AverageSink,
    CloseStore,
    Condition,
    Decode,
    EmbedFrames,
    Grid,
    GrowStore,
    GuidedPass,
    JoinTransfer,
    LoadSink,
    Offload,
    OffloadSink,
    Onload,
    OpenStore,
    PassPlan,
    Plan,
    ReadDecoding,
    ReadHost,
    ReadPages,
    ReadSink,
    RefreshWeights,
    Release,
    SetDecoding,
    SetSink,
    TimeExchange,
    UseAdapter,
    WritePages,
    WriteSink,
)
from .streams import make_current, rows_of
from .telemetry.profile import synchronise


@dataclass
class Prompt:
    """Rows [text_rows, text_dim] of a text, and what each executor made of them."""

    rows: Tensor
    texts: dict[Executor, Text]


class LocalWorker:
    """Owns the tensors of one rank: weights (`parts`), page stores, sink averages, pages in host memory, prompts.

    preset: as loaded, for which graphs are made. executor: in place of the one that `config` names. A model of several
    sets of weights has an executor for each.
    """

    def __init__(
        self, config: EngineConfig, preset: Preset, parts: Components, executor: Executor | None = None
    ) -> None:
        self.parts, self.device, self.dtype = parts, torch.device(config.device), DTYPES[config.dtype]
        self.kernels = config.kernels
        make_current(self.device)
        self.executors = (executor,) if executor is not None else make_executors(config, preset, parts)
        assert len(self.executors) >= len(preset.weight_sets), preset.weight_sets
        self.kv_dtype = self.dtype if config.kv_dtype is None else KV_DTYPES[config.kv_dtype]
        self.inputs = TableSlots(self.device, 4)  # actions and timesteps of a pass, and of the one before it
        adapters = {module: Adapter(module) for module in dict.fromkeys(parts.transformers)}
        self.adapters = tuple(adapters[module] for module in parts.transformers)  # of each set of weights
        self.stores: dict[Grid, PagedStore] = {}
        self.prompts: dict[int, Prompt] = {}
        self.frames: dict[int, dict[Executor, Frames]] = {}
        family, columns = family_of(parts.transformer.spec), parts.shard.columns
        self.decoder = family.column_decoder(parts.vae, columns) if columns.size > 1 else None
        self.decodings: dict[int, StreamState] = {}
        self.sinks: dict[int, Tensor] = {}  # [layers, 2, sink frames, page_tokens, heads, head_dim]
        self.hosts: dict[int, tuple[Tensor, Tensor | None]] = {}  # keys and values, scales
        self.runs: dict[type[Any], Callable[..., list[Tensor] | None]] = {
            PassPlan: self.run_pass,
            GuidedPass: self.run_branches,
            OpenStore: self.open_store,
            GrowStore: lambda plan: self.stores[plan.grid].grow(plan.pages),
            CloseStore: self.close_store,
            ReadPages: lambda plan: given(self.stores[plan.grid].read(list(plan.pages))),
            WritePages: lambda plan, kv, scales=None: self.stores[plan.grid].write(list(plan.pages), kv, scales),
            Offload: self.offload,
            ReadHost: self.read_host,
            Onload: self.onload,
            JoinTransfer: lambda plan: self.stores[plan.grid].transfer.join(),
            LoadSink: self.load_sink,
            AverageSink: self.average_sink,
            WriteSink: lambda plan: self.stores[plan.grid].replace(list(plan.pages), self.sinks[plan.sink]),
            OffloadSink: self.offload_sink,
            ReadSink: lambda plan: [self.sinks[plan.sink]],
            SetSink: self.set_sink,
            Condition: self.condition,
            EmbedFrames: self.embed_frames,
            Decode: self.decode,
            ReadDecoding: self.read_decoding,
            SetDecoding: self.set_decoding,
            TimeExchange: self.time_exchange,
            UseAdapter: self.use_adapter,
            RefreshWeights: self.refresh_weights,
            Release: self.release,
        }

    @property
    def supports_whole_block(self) -> bool:
        return self.executors[0].supports_whole_block

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        """Run a plan with the tensors that it takes; returns those that it gives."""
        with using(**self.kernels):
            return self.runs[type(plan)](plan, *tensors) or []

    # Passes

    def run_pass(self, plan: PassPlan, latents: Tensor | None = None) -> list[Tensor]:
        executor, attention = self.executors[plan.weights], self.attention(plan)
        text = executor.join([self.text(executor, parts) for parts in plan.texts])
        actions = None
        if plan.actions:
            kinds = self.parts.transformer.spec.action_dim
            assert kinds is not None
            (actions,) = self.inputs.put([F.one_hot(torch.tensor(plan.actions), kinds).to(self.dtype)])
        parts = [self.frames[number][executor] for number in plan.frames]
        given: dict[str, Any] = {"given": executor.join_frames(parts)} if parts else {}
        if plan.whole:
            frames = [range(block.first, block.first + block.frames) for block in plan.whole]
            seeds = [block.seed for block in plan.whole]
            if plan.before is not None:
                assert latents is not None
                first = self.stores[plan.layout.grid].attention(plan.before, len(plan.texts))
                given["before"] = latents, first
            return [executor.run_block(self.latent_shape(plan), text, attention, frames, seeds, actions, **given)]
        assert latents is not None
        timesteps = torch.tensor(plan.timesteps, dtype=torch.float32)
        if plan.condition is not None:
            timesteps = torch.stack((timesteps, torch.full_like(timesteps, plan.condition)), dim=-1)
        (timesteps,) = self.inputs.put([timesteps])
        return [executor.forward(latents, timesteps, text, attention, actions, **given)]

    def latent_shape(self, plan: PassPlan) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame of the plan's picture size."""
        spec, (rows, columns) = self.parts.transformer.spec, plan.layout.grid
        return spec.out_channels, rows * spec.patch[0], columns * spec.patch[1]

    def run_branches(self, plan: GuidedPass, latents: Tensor) -> list[Tensor]:
        """Run the branches of this rank's place."""
        place = self.parts.shard.branches.place
        own = [branch for branch in plan.branches if branch.place == place]
        runs = [self.run_pass(branch.run, rows_of(latents, branch.frames, 1)) for branch in own]
        return [velocity for velocities in runs for velocity in velocities]

    def attention(self, plan: PassPlan) -> KeyValues:
        return self.stores[plan.layout.grid].attention(plan.layout, len(plan.texts))

    def text(self, executor: Executor, parts: tuple[tuple[int, int, int], ...]) -> Text:
        """Join the texts of one session: (text, number of the prompt, frames that attend to it), in token order."""
        (_, number, _), *others = parts
        if not others:
            return self.prompts[number].texts[executor]
        texts = {text: self.prompts[number].texts[executor] for text, number, _ in parts}
        return executor.mix(texts, tuple((text, frames) for text, _, frames in parts))

    def condition(self, plan: Condition, rows: Tensor) -> None:
        self.prompts[plan.prompt] = Prompt(rows, self.conditioned(rows))

    def conditioned(self, rows: Tensor) -> dict[Executor, Text]:
        return {executor: executor.condition(rows) for executor in dict.fromkeys(self.executors)}

    def embed_frames(self, plan: EmbedFrames, channels: Tensor) -> None:
        self.frames[plan.frames] = {
            executor: executor.embed_frames(channels) for executor in dict.fromkeys(self.executors)
        }

    def use_adapter(self, plan: UseAdapter) -> None:
        adapters = list(dict.fromkeys(self.adapters[number] for number in plan.sets))
        if plan.path is None:
            for adapter in adapters:
                adapter.remove()
            return
        updates = [adapter.read(plan.path, plan.scale, plan.partial) for adapter in adapters]
        for adapter, update in zip(adapters, updates, strict=True):
            adapter.merge(update, plan.scale)

    def refresh_weights(self, plan: RefreshWeights) -> None:
        for executor in dict.fromkeys(self.executors):
            executor.refresh_derived_weights()
        for prompt in self.prompts.values():
            prompt.texts = self.conditioned(prompt.rows)

    # Pages

    def open_store(self, plan: OpenStore) -> None:
        form = PageForm(self.parts.transformer.spec, plan.grid, self.dtype, self.kv_dtype, self.parts.shard)
        self.stores[plan.grid] = PagedStore(
            form, self.parts.transformer.rope, plan.pages, plan.slots, self.device, plan.sessions
        )

    def close_store(self, plan: CloseStore) -> None:
        del self.stores[plan.grid]

    def offload(self, plan: Offload) -> None:
        store = self.stores[plan.grid]
        with store.transfer.beside():
            self.hosts[plan.host] = store.read(list(plan.pages), host=True)
        store.transfer.join()  # the freed pages may be written only after the copy

    def read_host(self, plan: ReadHost) -> list[Tensor]:
        self.stores[plan.grid].transfer.wait()
        return given(self.host_pages(plan.grid, plan.host, plan.slots))

    def onload(self, plan: Onload) -> None:
        store = self.stores[plan.grid]
        kv, scales = self.host_pages(plan.grid, plan.host, plan.slots)
        with store.transfer.beside():
            store.write(list(plan.pages), kv, scales)

    def host_pages(self, grid: Grid, host: int, slots: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Host copy of some slots. All slots in order: the pinned tensors themselves, without waiting for a copy."""
        kv, scales = self.hosts[host]
        if slots == tuple(range(kv.shape[2])):
            return kv, scales
        self.stores[grid].transfer.wait()
        chosen = list(slots)
        return kv[:, :, chosen], None if scales is None else scales[:, :, chosen]

    # Sink averages

    @property
    def sink_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def load_sink(self, plan: LoadSink) -> None:
        store = self.stores[plan.grid]
        self.sinks[plan.sink] = store.restored(list(plan.pages), self.sink_dtype)

    def average_sink(self, plan: AverageSink) -> None:
        store = self.stores[plan.grid]
        self.sinks[plan.sink] = self.sinks[plan.sink].to(store.device, non_blocking=True)
        leaving = store.restored([page for page, _, _ in plan.leaving], self.sink_dtype)
        new = self.sinks[plan.sink].clone()  # forks may share the old one
        for (_, at, shift), kv in zip(plan.leaving, leaving.unbind(2), strict=True):
            (cos_sin,), *_ = store.rope_cos_sin([shift])
            new[:, :, at] = average_frame(new[:, :, at], kv, store.rope, cos_sin, plan.decay)
        self.sinks[plan.result] = new

    def offload_sink(self, plan: OffloadSink) -> None:
        self.sinks[plan.result] = self.stores[plan.grid].to_host(self.sinks[plan.sink])

    def set_sink(self, plan: SetSink, sink: Tensor) -> None:
        self.sinks[plan.sink] = sink.to(self.stores[plan.grid].device)

    # Pictures

    def decode(self, plan: Decode, latents: Tensor) -> list[Tensor]:
        assert self.decoder is not None
        state = StreamState() if plan.before is None else self.decodings[plan.before].clone()
        state.frames = plan.frames
        pixels = self.decoder.decode(latents, state)
        self.decodings[plan.after] = state
        return [] if pixels is None else [pixels]

    def read_decoding(self, plan: ReadDecoding) -> list[Tensor]:
        history = self.decodings[plan.state].history
        return [torch.tensor(list(history)), *history.values()]

    def set_decoding(self, plan: SetDecoding, *tensors: Tensor) -> None:
        own = [tensor.to(self.device) for tensor in tensors]
        self.decodings[plan.state] = StreamState(dict(zip(plan.slots, own, strict=True)))

    # Ranks

    def time_exchange(self, plan: TimeExchange) -> list[Tensor]:
        group = self.parts.shard.every
        ranks = group_of(group).size
        x = torch.zeros(ranks, max(1, plan.nbytes // ranks), dtype=torch.uint8, device=self.device)
        out = torch.empty_like(x)
        all_to_all(x, group=group, out=out)  # the first call makes connections
        synchronise(self.device)
        begun = time.perf_counter()
        for _ in range(plan.calls):
            all_to_all(x, group=group, out=out)
        synchronise(self.device)
        return [torch.tensor([(time.perf_counter() - begun) / plan.calls])]

    def release(self, plan: Release) -> None:
        for kept in (self.prompts, self.frames, self.decodings, self.sinks, self.hosts):
            for number in plan.numbers:
                kept.pop(number, None)


def given(pages: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    kv, scales = pages
    return [kv] if scales is None else [kv, scales]
