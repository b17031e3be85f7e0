"""The programs of an exported engine, as modules over plain tensors, with the shapes and names of what they take.

`prompt`: rows of the text encoder to cross-attention keys and values. `step`: one denoising pass, to the velocity.
`commit`: a pass over clean latents, to the keys and values of its frames; over more frames it is a recache. `steps`:
all steps of a block, to clean latents. `decode_first`, `decode_next`: one latent frame to pictures, with the decoder's
state as inputs and outputs. `encode_first`, `encode_next`: pictures of one latent frame to latents, likewise.

The past is one tensor of keys and one of values per layer, [past, tokens of a frame, heads, channels], with the frames
of the pass behind it; so no program scatters. Keys are stored rotated at their own position. Where positions move with
the window, only the sink's distance to it changes, and who runs the programs rotates the sink's keys by the difference.
The model itself is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.attention import attention
from ..kernels.rope import Angles, rotate
from ..models.decoder import Decoder, StreamState
from ..models.transformer import TextContext, Transformer
from ..runtime.sampler import Sampler

FRAMES, PAST = "frames", "past"  # dimensions that differ from pass to pass
TRACED_PAST, TRACED_FRAMES = 3, 2  # sizes to trace with: neither 0 nor 1, which a tracer takes for constants


@dataclass(frozen=True)
class Program:
    """A module to export.

    inputs: a tensor, or a list of tensors, by argument. dynamic: the axes of each argument's tensors that have a name.
    names and results: of each tensor, in order. limits: least, usual and largest size of each named axis.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    dynamic: dict[str, dict[int, str]]
    names: tuple[str, ...]
    results: tuple[str, ...]
    limits: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


class WindowAttention:
    """Attention (`KeyValues`) over a past in plain tensors and the frames of the pass behind it; collects the latter.

    past: rotated keys, and values, of each layer in turn. own: angles of the pass's tokens.
    """

    def __init__(self, past: Sequence[Tensor], own: Angles, half_split: bool) -> None:
        self.past, self.own, self.half_split = past, own, half_split
        self.new: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = self.past[2 * layer : 2 * layer + 2]
        q, k = (rotate(part, self.own, self.own.cos.dtype, self.half_split) for part in (q, k))
        new_k, new_v = (part[0].unflatten(0, (-1, past_k.shape[1])) for part in (k, v))
        self.new += [new_k, new_v]
        keys, values = (
            torch.cat(parts).flatten(0, 1)[None] for parts in ((past_k, new_k), (past_v, new_v))
        )
        return attention(q, keys, values)


class NetworkPass(nn.Module):
    """A pass of the transformer over the latents of some frames."""

    space_cos: Tensor
    space_sin: Tensor

    def __init__(self, model: Transformer, size: tuple[int, int]) -> None:
        super().__init__()
        spec = model.spec
        height, width = spec.latent_size(size)
        rows, columns = height // spec.patch[0], width // spec.patch[1]
        self.model, self.tokens = model, rows * columns
        _, by_row, by_column = model.rope.axis_angles([0], rows, columns)
        pairs = (by_row[:, None].expand(rows, columns, -1), by_column[None].expand(rows, columns, -1))
        space = torch.cat(pairs, dim=-1).flatten(0, 1)
        self.register_buffer("space_cos", space.cos().float())
        self.register_buffer("space_sin", space.sin().float())

    def run(
        self, latents: Tensor, timesteps: Tensor, rope: Sequence[Tensor], text: Sequence[Tensor],
        past: Sequence[Tensor], actions: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Return the velocity, and the keys and values of the pass's frames by layer."""
        window = WindowAttention(past, self.angles(rope), self.model.rope.half_split)
        context = TextContext(tuple(zip(text[::2], text[1::2], strict=True)), None)
        velocity: Tensor = self.model.forward(latents, timesteps, context, window, actions)
        return velocity, window.new

    def angles(self, rope: Sequence[Tensor]) -> Angles:
        """Angles of each token from cosines and sines of each frame's position [frames, pairs of time].

        Sizes are read from `shape`: `len` would fix them in an exported program.
        """
        cos, sin = (
            torch.cat((time[:, None].expand(-1, self.tokens, -1), space.expand(time.shape[0], -1, -1)), 2).flatten(0, 1)
            for time, space in zip(rope, (self.space_cos, self.space_sin), strict=True)
        )
        return Angles(cos, sin)


class Step(NetworkPass):
    """One denoising pass: returns the velocity [1, F, C, H, W]."""

    def forward(
        self, latents: Tensor, timesteps: Tensor, rope: list[Tensor], text: list[Tensor], past: list[Tensor],
        actions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return self.run(latents, timesteps, rope, text, past, actions)[0]


class Commit(NetworkPass):
    """A pass over clean latents: returns keys and values [F, tokens, heads, channels] of each layer in turn."""

    def forward(
        self, latents: Tensor, timesteps: Tensor, rope: list[Tensor], text: list[Tensor], past: list[Tensor],
        actions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(self.run(latents, timesteps, rope, text, past, actions)[1])


class Steps(NetworkPass):
    """All steps of a block: noise [draws, F, C, H, W] to clean latents [1, F, C, H, W]."""

    levels: Tensor

    def __init__(self, model: Transformer, size: tuple[int, int], sampler: Sampler) -> None:
        super().__init__(model, size)
        self.matrix = solver_matrix(sampler)
        self.register_buffer("levels", torch.tensor(sampler.timesteps, dtype=torch.float32))

    def forward(
        self, noise: Tensor, rope: list[Tensor], text: list[Tensor], past: list[Tensor],
        actions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        seen, latents = list(noise.split(1)), noise[:1]
        for row, level in zip(self.matrix, self.levels, strict=True):
            timesteps = level[None, None].expand(1, noise.shape[1])
            velocity, _ = self.run(latents, timesteps, rope, text, past, actions)
            seen.append(velocity)
            terms = [weight * part for weight, part in zip(row, seen, strict=False) if weight]
            latents = torch.stack(terms).sum(0)
        return latents


class Prompt(nn.Module):
    """Rows of the text encoder [1, text_len, text_dim] to cross keys and values of each layer in turn."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for layer in self.model.embed_text(rows).text for part in layer)


class DecodeFrame(nn.Module):
    """One latent frame [1, z, h, w] to pictures [T, 3, H, W] in [-1, 1], then the state of each slot.

    first: the frame begins a stream and there is no state.
    """

    def __init__(self, vae: Decoder, slots: Sequence[int], first: bool) -> None:
        super().__init__()
        self.vae, self.slots, self.first = vae, tuple(slots), first

    def forward(self, latents: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        stream = StreamState(dict(zip(self.slots, state, strict=False)), 0 if self.first else 1)
        pixels = self.vae.decode(latents, stream)
        return pixels, *(stream.history[slot] for slot in self.slots if slot in stream.history)


class EncodeFrame(nn.Module):
    """Pictures [T, 3, H, W] in [-1, 1] of one latent frame to its latents [1, z, h, w], then the state of each slot.

    first: the frame begins a stream and there is no state.
    """

    def __init__(self, vae: Decoder, slots: Sequence[int], first: bool) -> None:
        super().__init__()
        self.vae, self.slots, self.first = vae, tuple(slots), first

    def forward(self, pixels: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        stream = StreamState(dict(zip(self.slots, state, strict=False)), 0 if self.first else 1)
        latents = self.vae.encode(pixels, stream)
        return latents, *(stream.history[slot] for slot in self.slots if slot in stream.history)


@dataclass(frozen=True)
class EncoderPrograms:
    """Programs of an encoder, the shape of each slot of its state, zero at first, and slots that the first returns."""

    programs: tuple[Program, ...]
    shapes: tuple[tuple[int, ...], ...]
    first_state: tuple[int, ...]


@dataclass(frozen=True)
class DecoderPrograms:
    """Programs of a decoder, the shape of each slot of its state, zero at first, and how a stream begins.

    first: the program of a stream's first frame. first_state: slots that it returns; it takes none if it is
    `decode_first`. first_pictures: how many of its last pictures are kept. pictures: of each later frame.
    """

    programs: tuple[Program, ...]
    shapes: tuple[tuple[int, ...], ...]
    first: str
    first_state: tuple[int, ...]
    first_pictures: int
    pictures: int


def check_model(model: Transformer) -> None:
    """UsageError for a model with fewer heads of keys than of queries, or with a rotary embedding of half-splits."""
    spec = model.spec
    if spec.kv_heads != spec.num_heads or model.rope.half_split:
        raise UsageError(
            f"model {spec.name} has {spec.kv_heads} heads of keys for {spec.num_heads} of queries, and half_split "
            f"{model.rope.half_split}; expected as many, and False, for an export"
        )


def solver_matrix(sampler: Sampler) -> list[list[float]]:
    """Weights of each step: the latents after step i are the sum of row i times [noise draws, velocities so far].

    A solver is linear in them, so its own code on unit vectors gives the weights. There is one draw for a solver that
    adds no noise, else one for each step.
    """
    count = len(sampler.timesteps)
    draws = count if sampler.spec.solver == "renoise" else 1
    units = torch.eye(draws + count, dtype=torch.float64)
    solver, latents, rows = sampler.begin(), units[0], []
    for step in range(count):
        latents = solver.advance(latents, units[draws + step], step, partial(units.__getitem__, step + 1))
        rows.append(latents[: draws + step + 1].tolist())
    return rows


def pass_programs(
    model: Transformer, size: tuple[int, int], sampler: Sampler, frames: int | None, unroll: bool,
    limits: Mapping[str, tuple[int, int, int]],
) -> list[Program]:  # fmt: skip
    """Programs of the transformer. frames: of each denoising pass; None where passes have different numbers.

    limits: least, usual and largest number of frames of a pass and of its past.
    """
    spec = model.spec
    height, width = spec.latent_size(size)
    heads, channels, layers = spec.num_heads, spec.head_dim, spec.num_layers
    pairs, tokens = len(model.rope.time), spec.tokens_per_frame(size)
    names = {
        "rope": ("rope_cos", "rope_sin"), "text": by_layer("text", layers), "past": by_layer("past", layers),
    }  # fmt: skip

    def describe(name: str, module: nn.Module, block: int | None, results: tuple[str, ...]) -> Program:
        count = TRACED_FRAMES if block is None else block
        own: dict[int, dict[int, str]] = {axis: {} if block is not None else {axis: FRAMES} for axis in (0, 1)}
        latents = torch.zeros(1, count, spec.in_channels, height, width)
        inputs: dict[str, Any] = {"latents": latents, "timesteps": torch.zeros(1, count)}
        if isinstance(module, Steps):
            draws = len(module.matrix[0]) - 1
            inputs = {"noise": latents.repeat(draws, 1, 1, 1, 1)}
        inputs |= {
            "rope": zeros(2, count, pairs),
            "text": zeros(2 * layers, 1, spec.text_len, heads, channels),
            "past": zeros(2 * layers, TRACED_PAST, tokens, spec.kv_heads, channels),
        }
        if spec.action_dim is not None:
            inputs["actions"] = torch.zeros(1, count, spec.action_dim)
        dynamic = {key: own[1] for key in ("latents", "timesteps", "noise", "actions")} | {"rope": own[0], "text": {}}
        dynamic["past"] = {0: PAST}
        flat = tuple(part for key in inputs for part in names.get(key, (key,)))
        return Program(name, module, inputs, {key: dynamic[key] for key in inputs}, flat, results, limits)

    programs = [
        Program("prompt", Prompt(model), {"rows": torch.zeros(1, spec.text_len, spec.text_dim)}, {"rows": {}},
                ("rows",), names["text"]),
        describe("step", Step(model, size), frames, ("velocity",)),
        describe("commit", Commit(model, size), None, by_layer("new", layers)),
    ]  # fmt: skip
    if unroll:
        programs.append(describe("steps", Steps(model, size, sampler), frames, ("clean",)))
    return programs


def zeros(count: int, *shape: int) -> list[Tensor]:
    """Distinct tensors: a tracer takes one tensor given twice for one input."""
    return [torch.zeros(shape) for _ in range(count)]


def by_layer(name: str, layers: int) -> tuple[str, ...]:
    """Names of keys and values of each layer in turn: `past_k_0`, `past_v_0`, `past_k_1`, ..."""
    return tuple(f"{name}_{part}_{layer}" for layer in range(layers) for part in "kv")


def decoder_programs(vae: Decoder, channels: int, height: int, width: int, zero_start: bool) -> DecoderPrograms:
    """Programs of a decoder over latents [1, channels, height, width], its slots read off a stream of two frames.

    One program serves every frame where the first differs only in how many of its pictures are kept.
    """
    blank = torch.zeros(1, channels, height, width)
    state = vae.new_state()
    kept = len(vae.decode(blank, state))
    at_first = sorted(state.history)
    pictures = len(vae.decode(blank, state))
    slots = sorted(state.history)
    shapes = tuple(tuple(state.history[slot].shape) for slot in slots)
    indices = tuple(slots.index(slot) for slot in at_first)

    def describe(name: str, first: bool, given: list[Tensor], results: Sequence[int]) -> Program:
        names = ("latents", *(f"state_{index}" for index in range(len(given))))
        returned = ("pixels", *(f"next_{index}" for index in results))
        inputs = {"latents": blank, "state": given}
        return Program(name, DecodeFrame(vae, slots, first), inputs, {key: {} for key in inputs}, names, returned)

    following = describe("decode_next", False, [torch.zeros(shape) for shape in shapes], range(len(slots)))
    if zero_start or begins_as_it_goes_on(vae, blank.shape, shapes, slots):
        every = tuple(range(len(slots)))
        return DecoderPrograms((following,), shapes, "decode_next", every, kept, pictures)
    first = describe("decode_first", True, [], indices)
    return DecoderPrograms((first, following), shapes, "decode_first", indices, kept, pictures)


def encoder_programs(vae: Decoder, size: tuple[int, int], first: int, later: int) -> EncoderPrograms:
    """Programs of an encoder, its slots read off a stream of two frames. first, later: pictures of a latent frame."""
    width, height = size
    blanks = [torch.zeros(count, 3, height, width) for count in (first, later)]
    state, seen = vae.new_state(), list[list[int]]()
    for blank in blanks:
        vae.encode(blank, state)
        seen.append(sorted(state.history))
    at_first, slots = seen
    shapes = tuple(tuple(state.history[slot].shape) for slot in slots)
    indices = tuple(slots.index(slot) for slot in at_first)

    def describe(name: str, blank: Tensor, given: list[Tensor], results: Sequence[int]) -> Program:
        names = ("pixels", *(f"state_{index}" for index in range(len(given))))
        returned = ("latents", *(f"next_{index}" for index in results))
        inputs = {"pixels": blank, "state": given}
        return Program(name, EncodeFrame(vae, slots, not given), inputs, {key: {} for key in inputs}, names, returned)

    following = describe("encode_next", blanks[1], [torch.zeros(shape) for shape in shapes], range(len(slots)))
    return EncoderPrograms((describe("encode_first", blanks[0], [], indices), following), shapes, indices)


def begins_as_it_goes_on(
    vae: Decoder, shape: Sequence[int], shapes: Sequence[tuple[int, ...]], slots: Sequence[int]
) -> bool:
    """True if a stream's first pictures are the last that any later frame gives over a state of zeros."""
    latents = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    first = StreamState()
    later = StreamState({slot: torch.zeros(size) for slot, size in zip(slots, shapes, strict=True)}, 1)
    begun, gone_on = vae.decode(latents, first), vae.decode(latents, later)
    same = all(torch.equal(first.history[slot], later.history[slot]) for slot in first.history)
    return same and first.history.keys() == later.history.keys() and torch.equal(begun, gone_on[-len(begun) :])
