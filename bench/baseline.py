"""Plain loop with the engine's weights, in the structure of the public reference code: the baseline of the executors.

Each layer has one contiguous cache of the window's size and rolls it by copying. Every pass computes text, time and
patch embedding; cross-attention keys are computed once per prompt; attention is torch's. The loop leaves out what only
slows the public code down: reads of device values by the host, and rotation in float64. Optionally each layer, or all
layers of a pass together, run through `torch.compile`. The block loop is written here a second time to check the block
schedule that the engine and the planners share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError, quoted
from ..graphs.passes import Pass
from ..kernels.attention import attention
from ..kernels.rope import Angles, rope_angles, rotate
from ..models.transformer import TextContext
from ..models.wan.transformer import WanTransformer
from ..runtime.engine import Engine
from ..runtime.execution.decode_pipeline import to_frames
from ..runtime.inputs import Pixels
from ..runtime.noise import PhiloxNoise
from ..runtime.sampler import Sampler, scheduled_blocks
from ..schemes.block_schedule import ScheduledPass
from ..schemes.page_needs import branches
from ..schemes.presets import Preset
from ..schemes.timeline import Span, Timeline
from .machine import synchronize
from .work import blocks_until_full

LayerForward = Callable[..., Tensor]
LayersForward = Callable[..., Tensor]  # of all layers of a pass


def unsupported_reason(preset: Preset) -> str | None:
    """The reason why the plain loop cannot run a preset; None if it can."""
    if preset.window_blocks > 1 or any(len(scheduled.run.groups) > 1 for scheduled in passes_until_full(preset)):
        return "it has passes over frames at several noise levels"
    if preset.context.positions != "absolute":
        return "positions move with its window"
    if preset.context.rest_sink:
        return "its sink moves at rest"
    if preset.context.decoder_zero_start:
        return "its decoder starts from zero caches"
    if branches(preset) > 1:
        return "it uses guidance"
    return None


def passes_until_full(preset: Preset) -> list[ScheduledPass]:
    """Passes of a stream's blocks up to the first with a full window, and of the block after it."""
    blocks = islice(scheduled_blocks(preset), blocks_until_full(preset) + 2)
    return [scheduled for block in blocks for scheduled in block.passes]


@dataclass
class LayerCache:
    """Keys and values [1, capacity*P, n, c] of one layer; `used` tokens are valid, a pass writes at `start`."""

    keys: Tensor
    values: Tensor
    angles: Angles
    rope: torch.dtype
    start: int = 0
    used: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`KeyValues` of a single layer."""
        q, k = rotate(q, self.angles, self.rope), rotate(k, self.angles, self.rope)
        stop = self.start + k.shape[1]
        self.keys[:, self.start : stop] = k
        self.values[:, self.start : stop] = v
        return attention(q, self.keys[:, : self.used], self.values[:, : self.used])

    def roll(self, remaining: list[slice]) -> None:
        """Copy the remaining tokens to the front."""
        for store in (self.keys, self.values):
            tokens = torch.cat([store[:, rows] for rows in remaining], dim=1) if remaining else store[:, :0]
            store[:, : tokens.shape[1]] = tokens


def run_layer(block: nn.Module, x: Tensor, modulation: Tensor, text: TextContext, cache: LayerCache) -> Tensor:
    out: Tensor = block(x, modulation, text, cache)
    return out


def run_layers(
    run: LayerForward,
    layers: Sequence[nn.Module],
    x: Tensor,
    modulation: Tensor,
    texts: Sequence[TextContext],
    caches: Sequence[LayerCache],
) -> Tensor:
    for layer, text, layer_cache in zip(layers, texts, caches, strict=True):
        x = run(layer, x, modulation, text, layer_cache)
    return x


@dataclass(frozen=True)
class BlockOutput:
    """A finished block: latents [F, C, H, W] and frames uint8 [T, H, W, 3], None if not decoded.

    timings: seconds of the stages that were timed. passes: seconds of each pass; empty if passes do not run one by one.
    """

    latents: Tensor
    frames: Pixels | None
    timings: dict[str, float]
    passes: tuple[float, ...] = ()


class PlainLoop:
    """Stream of one prompt over an engine's weights; `step` computes its next block.

    compiled: runs a layer at the full window. all_layers: in its place, runs all layers of a pass there, with caches
    and text that stay where they are.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Tensor,
        seed: int,
        size: tuple[int, int],
        compiled: LayerForward,
        all_layers: LayersForward | None = None,
    ) -> None:
        self.engine, self.size, self.rows = engine, size, rows
        transformer = engine.parts.transformer
        if not isinstance(transformer, WanTransformer):
            raise UsageError(
                f"model {quoted(engine.spec.name)} is no Wan transformer, which the plain loop is for; use none"
            )
        self.transformer, self.spec = transformer, engine.spec
        self.sampler, self.noise = Sampler(engine.preset.sampler), PhiloxNoise(seed, str(engine.device))
        self.timeline = Timeline(engine.preset)
        self.decoder = engine.parts.vae.new_state()
        height, width = self.spec.latent_size(size)
        self.grid = (height // self.spec.patch[0], width // self.spec.patch[1])
        self.tokens = self.grid[0] * self.grid[1]
        self.full = max(scheduled.context for scheduled in passes_until_full(engine.preset))
        self.frames: tuple[int, ...] = ()
        self.positions: list[int] = []
        self.angles = Angles(torch.empty(0), torch.empty(0))
        self.past: list[Tensor] = []  # last clean latents and their pixels, for presets that rebuild
        self.pixels: Tensor | None = None
        # A layer's number is the same in every copy, so that all layers share what is compiled for one.
        self.layers = [shallow_copy(block) for block in self.transformer.blocks]
        self.caches = [self.new_cache() for _ in self.layers]
        self.compiled, self.all_layers = compiled, all_layers
        with torch.no_grad():
            context = self.transformer.embed_text(rows[None])
        self.text = [TextContext((pair,), None) for pair in context.text]
        if all_layers is not None:
            kept = [tensor for cache in self.caches for tensor in (cache.keys, cache.values)]
            for tensor in (*kept, *(part for pair in context.text for part in pair)):
                torch._dynamo.mark_static_address(tensor)

    def new_cache(self) -> LayerCache:
        spec, like = self.spec, self.rows
        shape = (1, self.full * self.tokens, spec.num_heads, spec.head_dim)
        rope = torch.promote_types(like.dtype, torch.float32)
        return LayerCache(like.new_zeros(shape), like.new_zeros(shape), self.angles, rope)

    @torch.no_grad()
    def step(self, decode: bool = True) -> BlockOutput:
        """Compute the next block as the engine does. Only the decoder is timed."""
        timeline = self.timeline
        if timeline.rebuild_due():
            self.rebuild(timeline.rebuild_pass())
        span = timeline.admit()
        sampler = self.sampler.of_block(span.index)
        latents, solver = self.draw(span, 0), sampler.begin()
        for step, timestep in enumerate(sampler.timesteps):
            velocity = self.forward(timeline.joint_pass([(span.frames, timestep)], frozenset()), latents)
            latents = solver.advance(latents, velocity, step, partial(self.draw, span, step + 1))
        if self.engine.preset.context.commit:
            self.commit(timeline.commit_pass(span.frames), latents)
        timeline.forget(self.frames)
        pixels = frames = None
        timings = {}
        if decode or self.engine.preset.context.needs_pixels:
            synchronize(str(self.engine.device))
            begun = time.perf_counter()
            pixels = self.engine.parts.vae.decode(latents, self.decoder)
            frames = to_frames(pixels) if decode else None
            synchronize(str(self.engine.device))
            timings["decode"] = time.perf_counter() - begun
        self.past = [*self.past, latents][-self.full :]
        self.pixels = pixels
        return BlockOutput(latents, frames, timings)

    def rebuild(self, run: Pass) -> None:
        """Recompute the context from the last clean latents; re-encode the first of them if the preset requires it."""
        policy, vae = self.engine.preset.context, self.engine.parts.vae
        latents = torch.cat(self.past)[-len(run.frames) :]
        if policy.reencode_head and run.frames[0] > 0 and self.pixels is not None:
            frames = (len(run.frames) - 1) * self.spec.vae_stride[0] + 1
            head = vae.encode(self.pixels[-frames:][:1], vae.new_state())
            latents = torch.cat((head, latents[1:]))
        self.frames = ()
        self.forward(run, latents)
        if policy.restart_decoder:
            self.decoder = vae.new_state()
            vae.decode(latents, self.decoder)

    def forward(self, run: Pass, latents: Tensor) -> Tensor:
        """Run one pass of the network and compute all its embeddings."""
        (group,) = run.groups
        self.make_room(group.context)
        positions = [group.position_of(frame) for frame in run.frames]
        if positions != self.positions:
            self.positions = positions
            self.angles = rope_angles(positions, *self.grid, self.spec.head_dim, self.engine.device)
        model = self.transformer
        model.text_embedding(self.rows[None])
        x = model.embed_latents(latents[None])
        timesteps = torch.tensor([run.timesteps], dtype=torch.float32, device=self.engine.device)
        e, modulation = model.time_embedding(timesteps, self.rest(len(run.frames)))
        for layer_cache in self.caches:
            layer_cache.angles = self.angles
            layer_cache.start = group.context.index(run.frames[0]) * self.tokens
            layer_cache.used = len(group.context) * self.tokens
        # What is compiled serves only the full window: each other size would be compiled again.
        is_full = len(group.context) == self.full
        forward = self.all_layers if is_full and self.all_layers is not None else run_layers
        layer_forward = self.compiled if is_full else run_layer
        x = forward(layer_forward, self.layers, x, modulation, self.text, self.caches)
        velocity: Tensor = model.unpatchify(model.head(x, e, latents.dtype), *latents.shape[-2:])
        return velocity[0]

    def commit(self, run: Pass, latents: Tensor) -> None:
        """Write the keys and values of clean latents into the caches."""
        self.forward(run, latents)

    def make_room(self, context: tuple[int, ...]) -> None:
        """Roll the caches so that the frames of `context` are at their front, in order."""
        if context == self.frames:
            return
        remaining = [slot for slot, frame in enumerate(self.frames) if frame in context]
        if remaining != list(range(len(remaining))):
            for cache in self.caches:
                cache.roll([slice(slot * self.tokens, (slot + 1) * self.tokens) for slot in remaining])
        self.frames = context

    def rest(self, frames: int) -> Tensor | None:
        """Action embedding of the first action for each frame; None for a model without actions."""
        if self.spec.action_dim is None:
            return None
        actions = F.one_hot(torch.zeros(1, frames, dtype=torch.long), self.spec.action_dim)
        embedded: Tensor = self.transformer.action_embedding(actions.to(self.engine.device, self.engine.dtype))
        return embedded

    def draw(self, span: Span, draw: int) -> Tensor:
        shape = (self.spec.out_channels, *self.spec.latent_size(self.size))
        noise = self.noise.draw(span.index, span.frames, draw, shape).to(self.engine.device, self.engine.dtype)
        rests = self.spec.action_dim is not None  # where there are actions, all are the first one
        return noise if draw or rests else noise * self.sampler.spec.noise_scale

    @property
    def cache_bytes(self) -> int:
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self.caches)

    def close(self) -> None:
        self.caches, self.past, self.pixels = [], [], None


def shallow_copy(block: nn.Module) -> nn.Module:
    """Copy a layer, sharing its weights, with layer index 0."""
    copied = block.__class__.__new__(block.__class__)
    copied.__dict__.update(block.__dict__)
    copied.__dict__["layer"] = 0
    return copied


@cache
def compiled_layer() -> LayerForward:
    """`run_layer` through `torch.compile`, for one shape."""
    return torch.compile(run_layer, dynamic=False)


@cache
def compiled_layers() -> LayersForward:
    """`run_layers` through `torch.compile(mode="reduce-overhead")`, for one shape: on a GPU one CUDA graph a pass."""
    compiled = torch.compile(run_layers, dynamic=False, mode="reduce-overhead")

    def run(*arguments: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments).clone()  # the next replay overwrites it

    return run
