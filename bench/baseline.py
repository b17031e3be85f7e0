"""The plain loop that the executors are held against, with the same weights, in the structure of the public reference.

One contiguous cache of the window's size per layer, rolled by copying; text, time and patch embedding in every pass,
cross-attention keys once a prompt; torch's own attention. Left out is what only slows the public code down: reads of
device values by the host, and rotation in float64. Optionally each layer runs through `torch.compile`. Its block loop
is its own: it checks the block schedule that the engine and the planners share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs.passes import Pass
from ..kernels.attention import attention
from ..kernels.rope import Angles, rope_angles, rotate
from ..models.wan.transformer import TextContext
from ..runtime.engine import Engine
from ..runtime.execution.decode_pipeline import to_frames
from ..runtime.inputs import Pixels
from ..runtime.noise import PhiloxNoise
from ..runtime.sampler import Sampler, scheduled_blocks
from ..schemes.block_schedule import ScheduledPass
from ..schemes.presets import Preset
from ..schemes.timeline import Span, Timeline
from .machine import synchronize
from .work import blocks_until_full

LayerForward = Callable[..., Tensor]


def why_not(preset: Preset) -> str | None:
    """Why the plain loop cannot run a preset; None where it can."""
    if preset.window_blocks > 1 or any(len(scheduled.run.groups) > 1 for scheduled in passes_until_full(preset)):
        return "it has passes over frames at several noise levels"
    if preset.context.positions != "absolute":
        return "positions move with its window"
    if preset.sampler.guidance_scale != 1:
        return "it uses guidance"
    return None


def passes_until_full(preset: Preset) -> list[ScheduledPass]:
    """The passes of a stream's blocks until its window is full, and of the one after."""
    blocks = islice(scheduled_blocks(preset), blocks_until_full(preset) + 2)
    return [scheduled for block in blocks for scheduled in block.passes]


@dataclass
class LayerCache:
    """Keys and values [1, capacity*P, n, c] of one layer; `used` tokens are held, the pass writes at `start`."""

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

    def roll(self, kept: list[slice]) -> None:
        """Move what stays to the front, by copies."""
        for store in (self.keys, self.values):
            held = torch.cat([store[:, rows] for rows in kept], dim=1) if kept else store[:, :0]
            store[:, : held.shape[1]] = held


def run_layer(block: nn.Module, x: Tensor, modulation: Tensor, text: TextContext, cache: LayerCache) -> Tensor:
    out: Tensor = block(x, modulation, text, cache)
    return out


@dataclass(frozen=True)
class Made:
    """A finished block: latents [F, C, H, W], frames uint8 [T, H, W, 3] or None, and seconds of stages and passes.

    Only what is known: stages that were timed, and passes where they are run one by one.
    """

    latents: Tensor
    frames: Pixels | None
    timings: dict[str, float]
    passes: tuple[float, ...] = ()


class PlainLoop:
    """A stream of one prompt over an engine's weights; `step` makes its next block."""

    def __init__(self, engine: Engine, rows: Tensor, seed: int, size: tuple[int, int], compiled: LayerForward) -> None:
        self.engine, self.size, self.rows = engine, size, rows
        self.transformer, self.spec = engine.parts.transformer, engine.spec
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
        self.compiled = compiled
        with torch.no_grad():
            context = self.transformer.embed_text(rows[None])
        self.text = [TextContext((pair,), None) for pair in context.text]

    def new_cache(self) -> LayerCache:
        spec, like = self.spec, self.rows
        shape = (1, self.full * self.tokens, spec.num_heads, spec.head_dim)
        rope = torch.promote_types(like.dtype, torch.float32)
        return LayerCache(like.new_zeros(shape), like.new_zeros(shape), self.angles, rope)

    @torch.no_grad()
    def step(self, decode: bool = True) -> Made:
        """The next block, as the engine makes it; of its timings only the decoder's is taken."""
        timeline, solver = self.timeline, self.sampler.begin()
        if timeline.rebuild_due():
            self.rebuild(timeline.rebuild_pass())
        span = timeline.admit()
        latents = self.draw(span, 0)
        for step, timestep in enumerate(self.sampler.timesteps):
            velocity = self.forward(timeline.joint_pass([(span.frames, timestep)], frozenset()), latents)
            latents = solver.advance(latents, velocity, step, partial(self.draw, span, step + 1))
        if self.engine.preset.context.commit:
            self.forward(timeline.commit_pass(span.frames), latents)
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
        return Made(latents, frames, timings)

    def rebuild(self, run: Pass) -> None:
        """Make the context anew from the last clean latents, the first of them encoded again if the preset says so."""
        policy, vae = self.engine.preset.context, self.engine.parts.vae
        latents = torch.cat(self.past)[-len(run.frames) :]
        if policy.reencode_head and run.frames[0] > 0 and self.pixels is not None:
            kept = (len(run.frames) - 1) * self.spec.vae_stride[0] + 1
            head = vae.encode(self.pixels[-kept:][:1], vae.new_state())
            latents = torch.cat((head, latents[1:]))
        self.frames = ()
        self.forward(run, latents)
        if policy.restart_decoder:
            self.decoder = vae.new_state()
            vae.decode(latents, self.decoder)

    def forward(self, run: Pass, latents: Tensor) -> Tensor:
        """One pass of the network, all its embeddings made anew."""
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
        # What is compiled is compiled for the full window alone: every other size would be compiled anew.
        layer_forward = self.compiled if len(group.context) == self.full else run_layer
        for layer, text, held in zip(self.layers, self.text, self.caches, strict=True):
            held.angles = self.angles
            held.start = group.context.index(run.frames[0]) * self.tokens
            held.used = len(group.context) * self.tokens
            x = layer_forward(layer, x, modulation, text, held)
        velocity: Tensor = model.unpatchify(model.head(x, e), *latents.shape[-2:])
        return velocity[0]

    def make_room(self, context: tuple[int, ...]) -> None:
        """Roll the caches so that `context` stands in order at their front."""
        if context == self.frames:
            return
        kept = [place for place, frame in enumerate(self.frames) if frame in context]
        if kept != list(range(len(kept))):
            for cache in self.caches:
                cache.roll([slice(place * self.tokens, (place + 1) * self.tokens) for place in kept])
        self.frames = context

    def rest(self, frames: int) -> Tensor | None:
        """What resting adds to the timesteps of a model that follows actions."""
        if self.spec.action_dim is None:
            return None
        told = torch.zeros(1, frames, dtype=torch.long, device=self.engine.device)
        added: Tensor = self.transformer.action_embedding(F.one_hot(told, self.spec.action_dim).to(self.engine.dtype))
        return added

    def draw(self, span: Span, draw: int) -> Tensor:
        shape = (self.spec.out_channels, *self.spec.latent_size(self.size))
        return self.noise.draw(span.index, span.frames, draw, shape).to(self.engine.device, self.engine.dtype)

    @property
    def cache_bytes(self) -> int:
        return sum(cache.keys.nbytes + cache.values.nbytes for cache in self.caches)

    def close(self) -> None:
        self.caches, self.past, self.pixels = [], [], None


def shallow_copy(block: nn.Module) -> nn.Module:
    """A layer with the same weights that counts as the first."""
    copied = block.__class__.__new__(block.__class__)
    copied.__dict__.update(block.__dict__)
    copied.__dict__["layer"] = 0
    return copied


@cache
def compiled_layer() -> LayerForward:
    """One layer through `torch.compile`, for one shape."""
    return torch.compile(run_layer, dynamic=False)
