"""The programs of an exported engine, as modules over plain tensors, with the shapes and names of what they take.

`prompt`: rows of the text encoder to cross-attention keys and values. `step`: one denoising pass, to the velocity.
`commit`: a pass over clean latents, to the keys and values of its frames; over more frames it is a recache. `steps`:
all steps of a block, to clean latents. `decode_first`, `decode_next`: one latent frame to pictures, with the decoder's
state as inputs and outputs. `encode_first`, `encode_next`: pictures of one latent frame to latents, likewise.

Where groups of a pass see other frames or follow other texts, `step` and `commit` take what each frame sees and its
text, and `commit` is a step that returns the keys and values of its frames beside the velocity.

The past is one tensor of keys and one of values per layer, [past, tokens of a frame, heads, channels], with the frames
of the pass behind it; so no program scatters. Keys are stored rotated at their own position. Where positions move with
the window, only the sink's distance to it changes, and who runs the programs rotates the sink's keys by the difference.
The model itself is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.attention import attention
from ..kernels.rope import Angles, rotate
from ..kernels.spec import FP8
from ..models.transformer import TextContext, Transformer
from ..runtime.sampler import Sampler
from .kv_precision import dequantised, quantised

FRAMES, PAST, TEXTS = "frames", "past", "texts"  # dimensions that differ from pass to pass
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

    past: rotated keys, and values, of each layer in turn. scales: of each of them, where they are int8; then those of
    the pass are attended to as they will be stored. own: angles of the pass's tokens. mask: which tokens each sees of
    the past and of the pass [T, K]; None for all.
    """

    def __init__(
        self, past: Sequence[Tensor], scales: Sequence[Tensor], own: Angles, half_split: bool,
        mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.past, self.scales, self.own, self.half_split, self.mask = past, scales, own, half_split, mask
        self.new: list[Tensor] = []
        self.new_scales: list[Tensor] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past_k, past_v = self.past[2 * layer : 2 * layer + 2]
        q, k = (rotate(part, self.own, self.own.cos.dtype, self.half_split) for part in (q, k))
        new_k, new_v = (part[0].unflatten(0, (-1, past_k.shape[1])) for part in (k, v))
        if self.scales:
            scale_k, scale_v = self.scales[2 * layer : 2 * layer + 2]
            past_k, past_v = dequantised(past_k, scale_k), dequantised(past_v, scale_v)
            stored = [quantised(part) for part in (new_k, new_v)]
            self.new += [part for part, _ in stored]
            self.new_scales += [scale for _, scale in stored]
            new_k, new_v = (dequantised(*pair) for pair in stored)
        else:
            self.new += [new_k, new_v]
        keys, values = (
            torch.cat(parts).flatten(0, 1)[None] for parts in ((past_k, new_k), (past_v, new_v))
        )
        return attention(q, keys, values, self.mask)


@dataclass(frozen=True)
class TextsByFrame:
    """Cross-attention (`TextKeyValues`) of a pass in which each frame follows one of several texts.

    text: keys and values [texts, rows, k, c] of each layer in turn. mask [texts, rows], vector [texts, d]: as of
    `TextContext`, of models that have them. of: number of each frame's text [F]. tokens: of a frame.
    """

    text: Sequence[Tensor]
    mask: Tensor | None
    vector: Tensor | None
    of: Tensor
    tokens: int

    def attend(self, layer: int, q: Tensor) -> Tensor:
        keys, values = (part[self.of] for part in self.text[2 * layer : 2 * layer + 2])
        mask = None if self.mask is None else self.mask[self.of][:, None, None].expand(-1, 1, self.tokens, -1)
        queries = q[0].unflatten(0, (-1, self.tokens))
        return attention(queries, keys, values, mask).flatten(0, 1)[None]

    def pooled(self, frames: int) -> Tensor:
        assert self.vector is not None
        return self.vector[self.of][None]


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
        past: Sequence[Tensor], actions: Tensor | None, scales: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Return the velocity, and the keys and values of the pass's frames by layer, then their scales."""
        window = WindowAttention(past, scales, self.angles(rope), self.model.rope.half_split)
        context = TextContext(tuple(zip(text[::2], text[1::2], strict=True)), None)
        velocity: Tensor = self.model.forward(latents, timesteps, context, window, actions)
        return velocity, window.new + window.new_scales

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
        actions: Tensor | None = None, scales: Sequence[Tensor] = (),
    ) -> Tensor:  # fmt: skip
        return self.run(latents, timesteps, rope, text, past, actions, scales)[0]


class Commit(NetworkPass):
    """A pass over clean latents: returns keys and values [F, tokens, heads, channels] of each layer in turn."""

    def forward(
        self, latents: Tensor, timesteps: Tensor, rope: list[Tensor], text: list[Tensor], past: list[Tensor],
        actions: Tensor | None = None, scales: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(self.run(latents, timesteps, rope, text, past, actions, scales)[1])


class GroupedStep(NetworkPass):
    """One pass whose frames see other frames each, and follow several texts: returns the velocity [1, F, C, H, W].

    text: [texts, rows, k, c] of each layer in turn. text_of: number of each frame's [F]. sees_past [F, past], sees_own
    [F, F]: frames that each frame sees.
    """

    commits: ClassVar[bool] = False

    def forward(
        self, latents: Tensor, timesteps: Tensor, rope: list[Tensor], text: list[Tensor], past: list[Tensor],
        text_of: Tensor, sees_past: Tensor, sees_own: Tensor, text_mask: Tensor | None = None,
        text_vector: Tensor | None = None, actions: Tensor | None = None, scales: Sequence[Tensor] = (),
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        sees = torch.cat((sees_past, sees_own), 1)[:, None, :, None]
        mask = sees.expand(-1, self.tokens, -1, self.tokens).flatten(2).flatten(0, 1)
        window = WindowAttention(past, scales, self.angles(rope), self.model.rope.half_split, mask)
        context = TextsByFrame(text, text_mask, text_vector, text_of, self.tokens)
        velocity: Tensor = self.model.forward(latents, timesteps, context, window, actions)
        return (velocity, *window.new, *window.new_scales) if self.commits else velocity


class GroupedCommit(GroupedStep):
    """The same pass; returns keys and values [F, tokens, heads, channels] of each layer in turn, too."""

    commits: ClassVar[bool] = True


class Steps(NetworkPass):
    """All steps of a block: noise [draws, F, C, H, W] to clean latents [1, F, C, H, W]."""

    levels: Tensor

    def __init__(self, model: Transformer, size: tuple[int, int], sampler: Sampler) -> None:
        super().__init__(model, size)
        self.matrix = solver_matrix(sampler)
        self.register_buffer("levels", torch.tensor(sampler.timesteps, dtype=torch.float32))

    def forward(
        self, noise: Tensor, rope: list[Tensor], text: list[Tensor], past: list[Tensor],
        actions: Tensor | None = None, scales: Sequence[Tensor] = (),
    ) -> Tensor:  # fmt: skip
        seen, latents = list(noise.split(1)), noise[:1]
        for row, level in zip(self.matrix, self.levels, strict=True):
            timesteps = level[None, None].expand(1, noise.shape[1])
            velocity, _ = self.run(latents, timesteps, rope, text, past, actions, scales)
            seen.append(velocity)
            terms = [weight * part for weight, part in zip(row, seen, strict=False) if weight]
            latents = torch.stack(terms).sum(0)
        return latents


class Prompt(nn.Module):
    """Rows of a text [1, text_rows, text_dim] to what `text_parts` lists, by model."""

    def __init__(self, *models: Transformer) -> None:
        super().__init__()
        self.models = models
        self.parts = nn.ModuleList(models)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for model in self.models for part in text_parts(model.embed_text(rows)).values())


def text_parts(context: TextContext) -> dict[str, Tensor]:
    """Keys and values of each layer, by name, and the mask [B, rows] and the vector of models that have them."""
    flat = [part for layer in context.text for part in layer]
    parts = dict(zip(by_layer("text", len(context.text)), flat, strict=True))
    if context.mask is not None:
        parts["text_mask"] = context.mask[:, 0, 0]
    if context.vector is not None:
        parts["text_vector"] = context.vector
    return parts


def check_model(model: Transformer) -> None:
    """UsageError for a model with layers in FP8."""
    if any(parameter.dtype == FP8 for parameter in model.parameters()):
        raise UsageError(f"model {model.spec.name} has layers in FP8, which no program has; export one without them")


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
    limits: Mapping[str, tuple[int, int, int]], kv_dtype: str = "float32", grouped: bool = False,
    packed: Callable[[Transformer], Transformer] = lambda model: model,
) -> list[Program]:  # fmt: skip
    """Programs of the transformer. frames: of each denoising pass; None where passes have different numbers.

    packed: makes the model of passes, with layers in low precision; prompts are of the model itself.
    limits: least, usual and largest number of frames of a pass, of its past and of texts. kv_dtype: of the past,
    `float32` or `int8`. grouped: groups of a pass see other frames, or follow other texts.
    UsageError for unrolled steps of a model that cannot have them.
    """
    spec = model.spec
    rows = torch.zeros(1, spec.text_rows, spec.text_dim)
    parts = text_parts(model.embed_text(rows))
    own_text = {name: part for name, part in parts.items() if name in ("text_mask", "text_vector")}
    grouped, conditioned = grouped or bool(own_text), sampler.spec.condition(0) is not None
    if grouped:
        limits = {TEXTS: (1, 1, 1), **limits}
    if unroll and (grouped or conditioned):
        raise UsageError(f"unroll is True, but the steps of model {spec.name} take more than their noise; leave it out")
    height, width = spec.latent_size(size)
    channels, layers = spec.head_dim, spec.num_layers
    pairs, tokens = len(model.rope.time), spec.tokens_per_frame(size)
    names = {
        "rope": ("rope_cos", "rope_sin"), "text": by_layer("text", layers), "past": by_layer("past", layers),
        "scales": by_layer("past_scale", layers),
    }  # fmt: skip
    kept = by_layer("new", layers) + (by_layer("new_scale", layers) if kv_dtype == "int8" else ())
    network = packed(model)
    step, commit = (GroupedStep(network, size), GroupedCommit(network, size)) if grouped else (
        Step(network, size), Commit(network, size))  # fmt: skip

    def describe(name: str, module: nn.Module, block: int | None, results: tuple[str, ...]) -> Program:
        count = TRACED_FRAMES if block is None else block
        own: dict[int, dict[int, str]] = {axis: {} if block is not None else {axis: FRAMES} for axis in (0, 1)}
        texts = TRACED_FRAMES if grouped else 1
        latents = torch.zeros(1, count, spec.in_channels, height, width)
        timesteps = torch.zeros(1, count, 2) if conditioned else torch.zeros(1, count)
        inputs: dict[str, Any] = {"latents": latents, "timesteps": timesteps}
        if isinstance(module, Steps):
            draws = len(module.matrix[0]) - 1
            inputs = {"noise": latents.repeat(draws, 1, 1, 1, 1)}
        inputs |= {
            "rope": zeros(2, count, pairs),
            "text": [torch.zeros(texts, *parts[name].shape[1:]) for name in names["text"]],
            "past": zeros(2 * layers, TRACED_PAST, tokens, spec.kv_heads, channels),
        }
        if grouped:
            past, own_frames = (torch.ones(count, seen, dtype=torch.bool) for seen in (TRACED_PAST, count))
            inputs |= {"text_of": torch.zeros(count, dtype=torch.int64), "sees_past": past, "sees_own": own_frames}
            inputs |= {name: part.expand(texts, -1).clone() for name, part in own_text.items()}
        if spec.action_dim is not None:
            inputs["actions"] = torch.zeros(1, count, spec.action_dim)
        if kv_dtype == "int8":
            inputs["past"] = [part.to(torch.int8) for part in inputs["past"]]
            inputs["scales"] = zeros(2 * layers, TRACED_PAST, spec.kv_heads)
        dynamic = {key: own[1] for key in ("latents", "timesteps", "noise", "actions")} | {"rope": own[0], "text": {}}
        dynamic |= {"past": {0: PAST}, "scales": {0: PAST}}
        if grouped:
            dynamic |= {key: {0: TEXTS} for key in ("text", *own_text)}
            dynamic |= {"text_of": own[0], "sees_past": {0: FRAMES, 1: PAST}, "sees_own": {0: FRAMES, 1: FRAMES}}
        flat = tuple(part for key in inputs for part in names.get(key, (key,)))
        return Program(name, module, inputs, {key: dynamic[key] for key in inputs}, flat, results, limits)

    programs = [
        Program("prompt", Prompt(model), {"rows": rows}, {"rows": {}}, ("rows",), tuple(parts)),
        describe("step", step, None if grouped else frames, ("velocity",)),
        describe("commit", commit, None, ("velocity", *kept) if grouped else kept),
    ]  # fmt: skip
    if unroll:
        programs.append(describe("steps", Steps(network, size, sampler), frames, ("clean",)))
    return programs


def with_memory(
    programs: Sequence[Program], plain: Transformer, memory: Transformer, size: tuple[int, int],
    packed: Callable[[Transformer], Transformer] = lambda model: model,
) -> list[Program]:  # fmt: skip
    """Run `commit` on memory weights, whose cross keys and values `prompt` returns too, as `memory_text_...`.

    Each program takes the inputs that it names, so a runner needs no change.
    """
    made, texts = [], next(program.results for program in programs if program.name == "prompt")
    for program in programs:
        if program.name == "prompt":
            results = (*texts, *(f"memory_{name}" for name in texts))
            program = replace(program, module=Prompt(plain, memory), results=results)
        elif isinstance(program.module, Commit | GroupedCommit):
            names = tuple(f"memory_{name}" if name in texts else name for name in program.names)
            program = replace(program, module=type(program.module)(packed(memory), size), names=names)
        made.append(program)
    return made


def zeros(count: int, *shape: int) -> list[Tensor]:
    """Distinct tensors: a tracer takes one tensor given twice for one input."""
    return [torch.zeros(shape) for _ in range(count)]


def by_layer(name: str, layers: int) -> tuple[str, ...]:
    """Names of keys and values of each layer in turn: `past_k_0`, `past_v_0`, `past_k_1`, ..."""
    return tuple(f"{name}_{part}_{layer}" for layer in range(layers) for part in "kv")
