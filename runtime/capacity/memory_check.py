"""Memory check before weights are read: the planner's numbers against the memory there is, and changes that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...errors import UsageError
from ...graphs.shards import ALONE, Shard
from ...models.decoder import DecoderSpec
from ...models.spec import ModelSpec
from ...schemes.page_needs import page_needs
from ...schemes.presets import Preset
from ..byte_sizes import format_bytes
from ..config import FP8_CAPABILITY, EngineConfig
from . import costs, planner
from .available_memory import Available, available_memory
from .costs import ITEMSIZE
from .planner import Suggestion, Workload
from .rank_choice import RankChoice, choose_ranks
from .rank_planner import decoder_ranks, rank_memory

MOST_SUGGESTIONS = 4


@dataclass(frozen=True)
class MemoryCheck:
    """Check for an engine of `config` and `preset`: `sessions` streams of pictures of `size` (None: the model's own).

    force: check the size alone, not the memory.
    """

    config: EngineConfig
    preset: Preset
    size: tuple[int, int] | None = None
    sessions: int = 1
    force: bool = False

    def __call__(
        self,
        spec: ModelSpec,
        decoder: DecoderSpec,
        text: int,
        fast: DecoderSpec | None,
        made_on_host: bool,
        files: Sequence[Path] = (),
        choice: RankChoice | None = None,
    ) -> Shard:
        """Raise UsageError for a size that the model cannot make, and where memory is too small.

        text: parameters of the text encoder, 0 for none. made_on_host: weights are, before they are moved. files: of
        the weights, whose sizes are not looked at. choice: of the ranks' layout; None where it is made here.
        """
        load, device = self.workload(spec, decoder, text), torch.device(self.config.device)
        if self.force:
            return ALONE
        total = planner.needed(load) + self.more_bytes(load, fast)
        if (gpus := self.config.gpus) > 1:
            choice = choice or self.choice(spec, decoder, text, fast)
            decoders = decoder_ranks(spec, load.size, gpus, self.config.shard_decoder)
            total = rank_memory(load, choice.grid, self.sessions, choice.shard_weights, decoders)
            total += self.more_bytes(load, fast)
            total *= gpus if device.type == "cpu" else 1  # processes share the memory of the machine
        self.compare(load, total, available_memory(device))
        if made_on_host and device.type != "cpu":
            weights = len(self.preset.weight_sets) * costs.transformer_bytes(spec, load.dtype)
            self.compare(load, weights, available_memory(torch.device("cpu")))
        return ALONE

    def choice(self, spec: ModelSpec, decoder: DecoderSpec, text: int, fast: DecoderSpec | None) -> RankChoice:
        """The layout of the ranks, within the memory that each has."""
        load, device = self.workload(spec, decoder, text), torch.device(self.config.device)
        available = available_memory(device)
        shares = self.config.gpus if device.type == "cpu" else 1
        memory = None if available is None else available.count // shares - self.more_bytes(load, fast)
        return choose_ranks(self.config, load, memory)

    def workload(self, spec: ModelSpec, decoder: DecoderSpec, text: int) -> Workload:
        """Workload for the planner; a stream that keeps every frame counts with its first window."""
        config, preset, on_gpu = self.config, self.preset, self.config.device.startswith("cuda")
        if page_needs(preset).context is None:
            preset = planner.with_window(preset, planner.shortest_window(preset))
        load = Workload(
            spec, preset, decoder, text, self.size or spec.default_size, config.dtype, config.kv_dtype or config.dtype,
            self.sessions, executor=config.executor, keeps_frames=config.keeps_frames, on_gpu=on_gpu,
        )  # fmt: skip
        if on_gpu and torch.cuda.get_device_capability(config.device) < FP8_CAPABILITY:
            return replace(load, narrow="int8")
        return load

    def more_bytes(self, load: Workload, fast: DecoderSpec | None) -> int:
        """Bytes of a second decoder, and of page memory beyond what the streams need."""
        second = ITEMSIZE[load.dtype] * fast.parameters if fast is not None else 0
        pages = self.sessions * planner.memory(load).each["pages"]
        return second + max(0, (self.config.kv_memory or 0) - pages)

    def compare(self, load: Workload, needed: int, available: Available | None) -> None:
        """Raise UsageError if more is needed than is available."""
        if available is None or needed <= available.count:
            return
        parts = planner.memory(load)
        sizes = parts.once | {name: load.sessions * count for name, count in parts.each.items()}
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        width, height = load.size
        streams = "a stream" if load.sessions == 1 else f"{load.sessions} streams"
        listed = ", ".join(f"{name} {format_bytes(sizes[name])}" for name in largest if sizes[name])
        budget = available.count - (needed - planner.needed(load))
        fitting = [change for change in planner.suggestions(load, budget) if change.fits][:MOST_SUGGESTIONS]
        advice = "; or ".join(map(advised, fitting)) or "no change that the planner knows of, but a smaller model"
        raise UsageError(
            f"{self.config.model} with {load.preset.name} needs {format_bytes(needed)} for {streams} of "
            f"{width}x{height} in {load.dtype} ({listed}); there are {available}. What would fit: {advice}. "
            "force=True (--force) loads it all the same"
        )


def advised(change: Suggestion) -> str:
    """Format a suggestion as arguments, options of the commands, and the bytes that it needs."""
    options = ["--prompt-embeds" if name == "text_prompts" else planner.as_option(name, value)
               for name, value in change.arguments.items()]  # fmt: skip
    return f"{change} ({' '.join(options)}), {format_bytes(change.needed)}"
