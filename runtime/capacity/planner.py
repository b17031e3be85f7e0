"""Capacity planner: memory and best possible speed of streams, before anything is loaded.

The block schedule lists the passes, `costs` counts their FLOPs and bytes, and a roofline ceiling turns those into time.
Times are lower bounds: every operation runs at the ceiling. Measured times are longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ...errors import UsageError
from ...graphs.passes import Pass
from ...models.decoder import DecoderSpec
from ...models.registry import family_of
from ...models.spec import ModelSpec
from ...schemes.block_schedule import (
    ScheduledBlock,
    blocks_before_repeat,
    repeat_period,
    supports_whole_block,
)
from ...schemes.page_needs import branches, conditionings, page_needs, staging_slots, window
from ...schemes.presets import FIELDS, Preset, with_settings
from ..executor_specs import REFERENCE, executor_spec
from ..limits import Limits
from ..sampler import scheduled_blocks
from . import costs
from .costs import ITEMSIZE
from .memory_need import batch_row_bytes, session_need

LONGEST = 4096  # frames; the longest page table of the kernels
CPU_SPEED = 1e11  # FLOP/s assumed of a fast CPU, for the warning of `long_on_cpu`
SLOW = 60 * CPU_SPEED  # FLOPs of a block above which that warning is given


@dataclass(frozen=True)
class Workload:
    """`sessions` streams with pictures of `size` (width, height); UsageError for a window without an end.

    text: parameters of the text encoder; 0 where prompts are given as embeddings. dtype: of weights and activations,
    kv_dtype: of pages; names in `costs.ITEMSIZE`. narrow: kv_dtype to suggest where memory is short. executor: a name
    in `EXECUTORS`. keeps_frames: what depends on a camera alone is computed once for a block, and kept.
    batch: sessions that one pass serves at most; 1 where they take turns. on_gpu: the decoder has the layers of a GPU.
    """

    spec: ModelSpec
    preset: Preset
    decoder: DecoderSpec
    text: int
    size: tuple[int, int]
    dtype: str
    kv_dtype: str
    sessions: int = 1
    narrow: str = "fp8"
    executor: str = REFERENCE
    keeps_frames: bool = True
    batch: int = 1
    on_gpu: bool = False

    def __post_init__(self) -> None:
        self.spec.latent_size(self.size)
        if self.sessions < 1:
            raise UsageError(f"sessions is {self.sessions}; expected 1 or more")
        if not 1 <= self.batch <= self.sessions:
            raise UsageError(f"batch is {self.batch}; expected 1 to {self.sessions}, the sessions")
        if page_needs(self.preset).context is None:
            raise UsageError(
                f"local_attn_size is -1 ({self.preset.name} keeps every frame), so its memory has no limit; plan for a "
                "window such as local_attn_size=21"
            )

    @property
    def kept_frames(self) -> int:
        """Bytes that are kept of a block's cameras."""
        block = self.preset.num_frame_per_block
        return costs.frame_bytes(self.spec, self.tokens, block, self.dtype) if self.keeps_frames else 0

    @property
    def decode_scratch(self) -> int:
        """Bytes of decoding a block, besides weights, state and latents."""
        block, item = self.preset.num_frame_per_block, ITEMSIZE[self.dtype]
        return self.decoder.scratch_bytes(self.latent, block, item, self.on_gpu)

    @property
    def tokens(self) -> int:
        return self.spec.tokens_per_frame(self.size)

    @property
    def latent(self) -> tuple[int, int]:
        return self.spec.latent_size(self.size)


# Passes


def steady_blocks(preset: Preset) -> list[ScheduledBlock]:
    """The period of blocks that a stream repeats once the window is full."""
    full = blocks_before_repeat(preset)
    return list(islice(scheduled_blocks(preset), full, full + repeat_period(preset)))


# The window


def window_field(preset: Preset) -> str:
    """Name of the setting that changes the length of the window."""
    if preset.context.segment_frames:
        return "segment_frames"
    return "local_attn_size" if preset.context.commit else "rebuild_frames"


def with_window(preset: Preset, frames: int) -> Preset:
    """Return the preset with a window of `frames` frames; UsageError if a block does not fit into it."""
    field = window_field(preset)
    value = frames - preset.num_frame_per_block if field == "rebuild_frames" else frames
    return with_settings(preset, **{field: value})


def shortest_window(preset: Preset) -> int:
    policy, block = preset.context, preset.num_frame_per_block
    if window_field(preset) == "local_attn_size":
        reached = policy.blocks_reached(preset.window_blocks, preset.sampler.steps)
        return block * max(reached, preset.window_blocks) + policy.sink_size
    return block + (policy.rebuild_frames if policy.segment_frames else 1)


# Memory


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. once: shared by all sessions. each: added by each session."""

    once: dict[str, int]
    each: dict[str, int]

    def needed(self, sessions: int) -> int:
        return sum(self.once.values()) + sessions * sum(self.each.values())


def memory(load: Workload) -> Memory:
    """Upper bound of the memory of a workload; scratch of a pass and of a decode are counted both."""
    spec, preset, item = load.spec, load.preset, ITEMSIZE[load.dtype]
    page = costs.page_bytes(spec, load.tokens, load.kv_dtype)
    queued = Limits().queue_blocks
    session = session_need(preset, spec, load.decoder, load.size, load.dtype, page, queued)
    staged = staging_slots(preset) if load.kv_dtype != load.dtype else 0
    averaged = preset.context.sink_size if preset.context.sink_decay < 1 else 0  # frames
    once = {
        "transformer": len(preset.weight_sets) * costs.transformer_bytes(spec, load.dtype),
        "vae": item * load.decoder.parameters,
        "text_encoder": item * load.text,
        "pass_scratch": costs.pass_scratch(spec, load.tokens, longest_pass(preset), load.dtype),
        "decode_scratch": load.decode_scratch,
        **(graph_memory(load) if executor_spec(load.executor).graphs else {}),
        "page_buffer": load.batch * staged * costs.page_bytes(spec, load.tokens, load.dtype) // spec.num_layers,
        "batch": batch_memory(load),
    }
    each = {
        "pages": session.pages,
        "moving_sink": branches(preset) * averaged * costs.page_bytes(spec, load.tokens, "float32"),
        "cross_keys": conditionings(preset) * costs.cross_bytes(spec, load.dtype),
        "decoder_state": session.decoder,
        "latents": session.latents + solving_bytes(load),
        "camera": costs.channel_bytes(spec, load.size, preset.num_frame_per_block, load.dtype)
        + (0 if executor_spec(load.executor).graphs else load.kept_frames),
    }
    return Memory(once, each)


def batch_memory(load: Workload) -> int:
    """Upper bound of the bytes that batches need beyond a session that runs alone.

    Graph executors have a program for each number of sessions, which keep their arenas.
    """
    graphs = executor_spec(load.executor).graphs
    rows = sum(size for size in batch_sizes(load) if size > 1) if graphs else load.batch - 1
    return rows * batch_row_bytes(load.preset, load.spec, load.size, load.dtype, graphs)


def batch_sizes(load: Workload) -> list[int]:
    """Numbers of sessions up to `batch` that one pass serves: 1, 2, 4 and so on, as far as the executor has them."""
    executor = executor_spec(load.executor)
    most = max(executor.batch_sizes, default=load.batch) if executor.batches else 1
    return [size for power in range(load.batch.bit_length()) if (size := 1 << power) <= most]


def graph_memory(load: Workload) -> dict[str, int]:
    """Bytes that graph executors add: an arena for each program, folded constants, and static inputs.

    `making`: while query, key and value weights are merged they are stored twice; this is the part of that peak that
    exceeds the scratch which is not allocated yet (all of it for the first program, the arena for a later one).
    """
    spec, sampler, dtype = load.spec, load.preset.sampler, load.dtype
    whole, frames = supports_whole_block(load.preset), programs(load.preset)
    sets = len(load.preset.weight_sets)
    constants = sets * costs.wide_bytes(spec, dtype)
    if whole:
        block, commit = load.preset.num_frame_per_block, load.preset.context.commit
        constants += costs.table_bytes(spec, block, sampler.steps, commit, dtype)
    arenas = [costs.arena_bytes(spec, load.tokens, count, dtype) for count in frames]
    absent = load.decode_scratch + arenas[0] if len(arenas) == 1 else min(arenas)
    return {
        "pass_scratch": sum(arenas),
        "constants": constants,
        "camera_inputs": 2 * load.kept_frames,  # where it is computed, and where passes read it
        "static_inputs": (len(frames) + whole * (sets - 1)) * costs.cross_bytes(spec, dtype),
        "making": max(0, (sets if whole else 1) * costs.merged_bytes(spec, dtype) - absent),
    }


def programs(preset: Preset) -> list[int]:
    """Latent frames of each program of a graph executor.

    One program for whole blocks or one for each shape of a pass, one for the passes of a first block with its own step
    list, one for a rebuild, and one for the recache of a new prompt.
    """
    if supports_whole_block(preset):
        frames = [preset.num_frame_per_block]
        if preset.context.commit_in_next:  # blocks that commit the one before, and a commit before a new prompt
            frames += [2 * preset.num_frame_per_block, preset.num_frame_per_block]
        if not supports_whole_block(preset, 0):  # the first block runs pass by pass
            frames = [preset.block_size(0), *frames]
    else:
        runs = [run for block in islice(scheduled_blocks(preset), 2) for run in runs_of(block, preset)]
        shapes = {(tuple(len(group.frames) for group in run.groups), run.weights) for run in runs}
        frames = [sum(shape) for shape, _ in sorted(shapes)]
    return frames + [count for count in (preset.context.rebuild_frames, recached_frames(preset)) if count]


def recached_frames(preset: Preset) -> int:
    """Latent frames that are recached for a new prompt once the window has rolled; 0 if the preset does not recache."""
    policy = preset.context
    return window(preset) - (0 if policy.recache_sink else policy.sink_size) if policy.prompt_switch == "recache" else 0


def longest_pass(preset: Preset) -> int:
    """Latent frames of the longest pass: of the blocks in flight, of a rebuild, or of a recache."""
    in_flight = preset.num_frame_per_block * (preset.window_blocks + preset.context.commit_in_next)
    recached = window(preset) if preset.context.prompt_switch == "recache" else 0  # until the window rolls
    return max(in_flight, preset.context.rebuild_frames, recached)


def solving_bytes(load: Workload) -> int:
    """Bytes of a solver step besides the latents, and of pixels cached to be encoded again."""
    preset, policy = load.preset, load.preset.context
    frame = costs.latent_bytes(load.spec, load.size, costs.latent_kind(preset, load.dtype))
    wide = costs.latent_bytes(load.spec, load.size, "float64")
    flight = preset.num_frame_per_block * preset.window_blocks
    pictures = 0
    if policy.needs_pixels:
        shown = (policy.rebuild_frames - 1) * load.spec.vae_stride[0] + 1
        pictures = shown * 3 * math.prod(load.size) * ITEMSIZE[load.dtype]
    return flight * ((1 + branches(preset)) * frame + 3 * wide) + pictures


def needed(load: Workload) -> int:
    """Bytes that a workload needs for all its sessions."""
    return memory(load).needed(load.sessions)


def most_sessions(load: Workload, budget: int) -> int:
    """Number of sessions that fit into `budget` bytes; 0 if none does."""
    split = memory(load)
    return max(0, (budget - split.needed(0)) // sum(split.each.values()))


def longest_window(load: Workload, budget: int) -> int | None:
    """Longest window, in frames, with which all sessions fit into `budget` bytes; None if none fits."""
    low, high = shortest_window(load.preset), LONGEST
    if not fits_with(load, low, budget):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits_with(load, middle, budget) else (low, middle - 1)
    return low


def fits_with(load: Workload, frames: int, budget: int) -> bool:
    return needed(replace(load, preset=with_window(load.preset, frames))) <= budget


# Time


@dataclass(frozen=True)
class Ceiling:
    """Peak speed of a machine: TFLOP/s, GB/s, and the source of the figures."""

    tflops: float
    bandwidth: float
    source: str

    def seconds(self, flops: int, nbytes: int) -> float:
        """Roofline time: the longer of compute and memory time."""
        return max(flops / (self.tflops * 1e12), nbytes / (self.bandwidth * 1e9))


@dataclass(frozen=True)
class Speed:
    """FLOPs, least bytes moved and seconds of one block at a ceiling, for the transformer and the decoder."""

    transformer_flops: float
    decoder_flops: float
    transformer_bytes: float
    decoder_bytes: float
    transformer_seconds: float
    decoder_seconds: float
    encoder_seconds: float  # of the decoder's, for pictures that the block encodes again
    frames: float  # video frames of the block

    @property
    def seconds(self) -> float:
        """Sum of both: on one GPU, concurrent work takes as long."""
        return self.transformer_seconds + self.decoder_seconds

    @property
    def fps(self) -> float:
        return self.frames / self.seconds


def speed(load: Workload, block: ScheduledBlock, ceiling: Ceiling) -> Speed:
    """Least time of one block; of a batch, the share of one session, whose passes read the weights once for all."""
    spec, tokens, rows = load.spec, load.tokens, load.batch
    weights = costs.pass_bytes(spec, load.dtype)
    flops, moved, seconds = 0, 0.0, 0.0
    for run in runs_of(block, load.preset):
        one = costs.pass_flops(spec, tokens, run).total
        flops += one
        each = costs.pass_traffic(spec, tokens, run, load.dtype, load.kv_dtype) - weights
        moved += weights / rows + each
        seconds += ceiling.seconds(rows * one, weights + rows * each) / rows
    for count in camera_runs(load, block):
        one = costs.frame_flops(spec, tokens, count)
        flops += one
        moved += ITEMSIZE[load.dtype] * costs.frame_parameters(spec)
        seconds += ceiling.seconds(one, ITEMSIZE[load.dtype] * costs.frame_parameters(spec))
    first = block.decoder_begins and not load.preset.context.decoder_zero_start
    decoding = [
        load.decoder.decode_flops(load.latent, first=first and frame == 0)
        for frame in range(block.decoded)
    ]
    traffic = costs.decode_traffic(load.decoder, load.latent, load.dtype)
    decoder_seconds, encoder_seconds = sum(ceiling.seconds(one, traffic) for one in decoding), 0.0
    if block.encoded and load.decoder.encodes:
        encoding = block.encoded * load.decoder.encode_flops(load.latent)
        decoding.append(encoding)
        encoder_seconds = ceiling.seconds(encoding, 0)
    shown = len(block.span.frames) * spec.vae_stride[0] - (spec.vae_stride[0] - spec.first_pictures) * block.first
    decoder_seconds += encoder_seconds
    return Speed(flops, sum(decoding), moved, block.decoded * traffic, seconds, decoder_seconds, encoder_seconds, shown)


def camera_runs(load: Workload, block: ScheduledBlock) -> list[int]:
    """Frames of each run of the layers that read a camera alone: one for a block, or one for each pass."""
    if load.keeps_frames:
        return [len(block.span.frames)]
    return [len(run.frames) for run in runs_of(block, load.preset)]


def runs_of(block: ScheduledBlock, preset: Preset) -> list[Pass]:
    """The passes of a block as each branch of guidance runs them."""
    guidance = preset.sampler.guide
    return [run for scheduled in block.passes for run in scheduled.branch_runs(guidance).values()]


def operations(spec: ModelSpec, preset: Preset, decoder: DecoderSpec, size: tuple[int, int]) -> int:
    """FLOPs of a stream's first block, decoder included."""
    block, tokens, latent = next(scheduled_blocks(preset)), spec.tokens_per_frame(size), spec.latent_size(size)
    passes = sum(costs.pass_flops(spec, tokens, run).total for run in runs_of(block, preset))
    passes += costs.frame_flops(spec, tokens, len(block.span.frames))
    decoding = decoder.decode_flops(latent, first=True)
    return passes + decoding + (block.decoded - 1) * decoder.decode_flops(latent)


def long_on_cpu(spec: ModelSpec, preset: Preset, decoder: DecoderSpec, size: tuple[int, int]) -> str | None:
    """Warning for a stream whose first block takes a CPU minutes; None for a faster one."""
    count = operations(spec, preset, decoder, size)
    if count <= SLOW:
        return None
    return (
        f"the first block has {count / 1e12:.3g} TFLOP: at {CPU_SPEED / 1e12:g} TFLOP/s that is "
        f"{count / CPU_SPEED / 60:.0f} minutes on this CPU; a smaller --size, --model wan-tiny or a GPU takes less"
    )


def first_speed(load: Workload, ceiling: Ceiling) -> Speed:
    """Least time of a stream's first block."""
    return speed(load, next(scheduled_blocks(load.preset)), ceiling)


def steady_speed(load: Workload, ceiling: Ceiling) -> Speed:
    """Least time of a block once the window is full, averaged over the period of blocks."""
    blocks = [speed(load, block, ceiling) for block in steady_blocks(load.preset)]
    fields = [field.name for field in dataclasses.fields(Speed)]
    return Speed(*(sum(getattr(block, name) for block in blocks) / len(blocks) for name in fields))


def prompt_seconds(load: Workload, ceiling: Ceiling) -> float:
    """Least time in seconds to switch prompts once the window is full: its cross keys and the recache."""
    spec = load.spec
    nbytes = ITEMSIZE[load.dtype] * costs.prompt_parameters(spec) + costs.cross_bytes(spec, load.dtype)
    seconds = ceiling.seconds(costs.prompt_flops(spec), nbytes)
    if recache := steady_blocks(load.preset)[0].recache:
        traffic = costs.pass_traffic(spec, load.tokens, recache.run, load.dtype, load.kv_dtype)
        seconds += ceiling.seconds(costs.pass_flops(spec, load.tokens, recache.run).total, traffic)
    return seconds


# Suggestions


def without_text(load: Workload, budget: int) -> Workload | None:
    return replace(load, text=0) if load.text else None


def in_half_precision(load: Workload, budget: int) -> Workload | None:
    if ITEMSIZE[load.dtype] <= 2:
        return None
    narrower = min(load.kv_dtype, "bfloat16", key=ITEMSIZE.__getitem__)
    return replace(load, dtype="bfloat16", kv_dtype=narrower)


def with_tiny_decoder(load: Workload, budget: int) -> Workload | None:
    tiny = family_of(load.spec).tiny_decoder_spec(load.spec)
    if tiny is None or not load.decoder.encodes or load.preset.context.encodes_pictures:
        return None
    return replace(load, decoder=tiny)


def without_graphs(load: Workload, budget: int) -> Workload | None:
    return replace(load, executor=REFERENCE) if executor_spec(load.executor).graphs else None


def without_kept_frames(load: Workload, budget: int) -> Workload | None:
    return replace(load, keeps_frames=False) if load.kept_frames else None


def with_narrow_pages(load: Workload, budget: int) -> Workload | None:
    return replace(load, kv_dtype=load.narrow) if ITEMSIZE[load.kv_dtype] > 1 else None


def with_fewer_sessions(load: Workload, budget: int) -> Workload | None:
    if load.sessions == 1:
        return None
    sessions = max(1, most_sessions(load, budget))
    return replace(load, sessions=sessions, batch=min(sessions, load.batch))


def with_shorter_window(load: Workload, budget: int) -> Workload | None:
    frames = longest_window(load, budget) or shortest_window(load.preset)
    return replace(load, preset=with_window(load.preset, frames)) if frames < window(load.preset) else None


def with_smaller_pictures(load: Workload, budget: int) -> Workload | None:
    """Largest picture size of nearly the same aspect ratio that fits; None if none does."""
    stride, (down, across) = load.spec.vae_stride[1], load.spec.patch
    columns, rows = load.size[0] // (stride * across), load.size[1] // (stride * down)
    for fewer in range(columns - 1, 0, -1):
        size = (fewer * stride * across, max(1, round(rows * fewer / columns)) * stride * down)
        if needed(other := replace(load, size=size)) <= budget:
            return other
    return None


Saving = Callable[[Workload, int], Workload | None]
SAVINGS: tuple[Saving, ...] = (  # ordered by their effect on the video, the least first
    without_text,
    in_half_precision,
    with_fewer_sessions,
    without_kept_frames,
    without_graphs,
    with_narrow_pages,
    with_tiny_decoder,
    with_shorter_window,
    with_smaller_pictures,
)


@dataclass(frozen=True)
class Suggestion:
    """Settings that need less memory, as arguments of `load`, and the bytes they need."""

    arguments: dict[str, Any]
    needed: int
    fits: bool

    @property
    def options(self) -> tuple[str, ...]:
        """The arguments as options of the commands."""
        return tuple(as_option(name, value) for name, value in self.arguments.items())

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())


def as_option(name: str, value: Any) -> str:
    """`kv_dtype="fp8"` as `--kv-dtype fp8`; a field of the preset as `--set NAME=VALUE`."""
    if name in FIELDS:
        return f"--set {name}={value}"
    if name == "text_prompts":
        return "--no-text-encoder"
    return f"--{name.replace('_', '-')} {'x'.join(map(str, value)) if name == 'size' else value}"


def suggestions(load: Workload, budget: int) -> list[Suggestion]:
    """Suggest smaller workloads: each saving by itself and, if none of them fits, several in order until they do."""
    single = [other for saving in SAVINGS if (other := applied(load, saving, budget)) != load]
    listed = [suggestion(load, other, budget) for other in single]
    if not any(one.fits for one in listed):
        combined = load
        for saving in SAVINGS:
            combined = applied(combined, saving, budget)
            if needed(combined) <= budget:
                break
        if combined not in (load, *single):
            listed.append(suggestion(load, combined, budget))
    return listed


def applied(load: Workload, saving: Saving, budget: int) -> Workload:
    """Apply a saving to a workload; returns the workload unchanged if that saves nothing."""
    other = saving(load, budget)
    return other if other is not None and needed(other) < needed(load) else load


def suggestion(load: Workload, other: Workload, budget: int) -> Suggestion:
    field = window_field(load.preset)
    changes: dict[str, tuple[Any, bool]] = {
        "text_prompts": (False, load.text != other.text),
        "dtype": (other.dtype, load.dtype != other.dtype),
        "sessions": (other.sessions, load.sessions != other.sessions),
        "kv_dtype": (other.kv_dtype, load.kv_dtype != other.kv_dtype and other.kv_dtype != other.dtype),
        "camera_layers": ("pass", load.keeps_frames != other.keeps_frames),
        "executor": (other.executor, load.executor != other.executor),
        "vae": ("taehv", load.decoder != other.decoder),
        field: (getattr(other.preset.context, field), load.preset != other.preset),
        "size": (other.size, load.size != other.size),
    }
    total = needed(other)
    return Suggestion({name: value for name, (value, differs) in changes.items() if differs}, total, total <= budget)
