"""denoise-step: from the head's tokens to the latents of the next level in one kernel, noise drawn on the way.

Precondition: a pass hands on latents that are a linear combination of latents it was given, of an unpatchified
velocity (or two, guided), of frame noise, and of what a multistep solver remembers, all in one dtype. The combination
is found by following additions and scalings, so any solver of that kind will do.
Claim: equal to rounding; sums are in float32 or better without rounding between, coefficients in float32 (float64
for float64 latents).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx

from ..edit import Editor, aten, fake, shape
from ..effects import is_scratch, written
from ..match import Match, Pattern
from ..types import PassGraph, Role
from .base import literal, ops

ROWS, FRAMES, HEIGHT, WIDTH, PATCH_H, PATCH_W, CHANNELS = 2, 3, 5, 7, 11, 13, 17
NOISE = ops.frame_noise.default
EXACT = 1e-12  # how far weights that are meant to be equal may be apart
Terms = dict[fx.Node, float]  # what a value is a sum of: each node times a number


def unpatchify(tokens: Tensor) -> Tensor:
    """[R, F*h*w, ph*pw*C], channels fastest, to [R, F, C, H, W]."""
    x = tokens.unflatten(-1, (PATCH_H, PATCH_W, CHANNELS)).unflatten(1, (FRAMES, HEIGHT, WIDTH))
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


@cache
def pattern(dtype: torch.dtype) -> Pattern:
    width = PATCH_H * PATCH_W * CHANNELS
    return Pattern.of(unpatchify, {"tokens": (ROWS, FRAMES * HEIGHT * WIDTH, width)}, dtype)


@dataclass(frozen=True)
class Step:
    """A solver step of one block's frames.

    latents: what x0 is taken from. velocities: parts of the velocity, and their weights, of sum 1. noise: the call
    that draws it. history: other terms. outputs: places, among the pass's results, of the next latents, of x0 and of
    a third; rows: the kernel's coefficients.
    """

    latents: fx.Node
    velocities: dict[fx.Node, float]
    noise: fx.Node | None
    history: tuple[fx.Node, ...]
    outputs: tuple[int, int | None, int | None]
    rows: list[list[float]]


def denoise_step(graph: PassGraph) -> int:
    """Put `inferix::denoise_step` in the place of each solver step of a pass."""
    results = graph.results
    if not results or not fake(results[0]).dtype.is_floating_point:
        return 0
    edit, places = Editor(graph.graph), 0
    for match in pattern(fake(results[0]).dtype).matches(graph.graph):
        for step in steps(graph, results, match.results[0]) if shows_patch(match) else []:
            fuse(graph, edit, match, step)
            places += 1
    return places


def shows_patch(match: Match) -> bool:
    """Return True if shapes show the patch, as they do unless a picture is one patch high or wide."""
    tokens, (channels, *places) = shape(match.given["tokens"]), shape(match.results[0])[2:]
    return len(places) == 4 or len(tokens) != 3 or tokens[-1] == channels


def steps(graph: PassGraph, results: tuple[fx.Node, ...], velocity: fx.Node) -> list[Step]:
    """The steps that use an unpatchified velocity, one for each block in flight."""
    blocks: dict[frozenset[fx.Node], dict[int, Terms]] = {}
    for place, result in enumerate(results):
        terms = terms_of(graph, result, velocity)
        used = frozenset(node for node in terms or () if whole_of(node) is velocity)
        if terms is not None and used:
            blocks.setdefault(used, {})[place] = terms
    steps = (arranged(graph, outputs, velocity) for outputs in blocks.values())
    return [step for step in steps if step is not None]


def whole_of(node: fx.Node) -> fx.Node:
    """The node of which this one is some rows or frames."""
    while node.target is aten.view.default or (node.target is aten.slice.Tensor and node.args[1] in (0, 1)):
        node = node.all_input_nodes[0]
    return node


def terms_of(graph: PassGraph, value: object, velocity: fx.Node) -> Terms | None:
    """A value as a sum of parts of the velocity, of what the pass was given, and of noise; None if it is none."""
    if not isinstance(value, fx.Node):
        return None
    whole, target, args = whole_of(value), value.target, value.args
    if whole is velocity:
        return {value: 1.0}
    if whole.op == "placeholder":
        return {value: 1.0} if graph.inputs[whole.name].role == Role.INPUT else None
    if is_scratch(whole):
        return {whole: 1.0} if whole is value and noise_call(whole) is not None else None
    if target in (aten._to_copy.default, aten.clone.default):
        return terms_of(graph, args[0], velocity)
    if target in (aten.zeros_like.default, aten.zeros.default):
        return {}
    if target in (aten.add.Tensor, aten.sub.Tensor):
        sign = number_of(graph, value.kwargs.get("alpha", 1))
        one, other = (terms_of(graph, arg, velocity) for arg in args[:2])
        if one is None or other is None or sign is None:
            return None
        other = scaled(other, sign if target is aten.add.Tensor else -sign)
        return {node: one.get(node, 0.0) + other.get(node, 0.0) for node in one | other}
    if target in (aten.mul.Tensor, aten.div.Tensor):
        scaled_part, factor = args[:2]
        by = number_of(graph, factor)
        if by is None and target is aten.mul.Tensor:
            scaled_part, by = factor, number_of(graph, scaled_part)
        terms = None if by is None else terms_of(graph, scaled_part, velocity)
        return None if terms is None or by is None else scaled(terms, by if target is aten.mul.Tensor else 1 / by)
    return None


def number_of(graph: PassGraph, value: object) -> float | None:
    """A number, or a scalar tensor made of written numbers alone."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node) or shape(value) != ():
        return None
    if value.op == "placeholder":
        data = graph.inputs[value.name].data
        return data[0] if data else None
    numbers = [number_of(graph, arg) for arg in value.args]
    if value.target is aten.rsub.Scalar and numbers[0] is not None and numbers[1] is not None:
        return numbers[1] - numbers[0]
    return numbers[0] if value.target is aten._to_copy.default else None


def noise_call(scratch: fx.Node) -> fx.Node | None:
    """The call that fills scratch with frame noise."""
    return next((user for user in scratch.users if user.target is NOISE and scratch in written(user)), None)


def scaled(terms: Terms, by: float) -> Terms:
    return {node: weight * by for node, weight in terms.items()}


def arranged(graph: PassGraph, outputs: dict[int, Terms], velocity: fx.Node) -> Step | None:
    """Which of the terms are what, and the kernel's numbers; None for a step that it has no form for."""
    nodes = list(dict.fromkeys(node for terms in outputs.values() for node in terms))
    parts = [node for node in nodes if whole_of(node) is velocity]
    drawn = [node for node in nodes if is_scratch(node)]
    given = [node for node in nodes if node not in parts and node not in drawn]
    totals = {place: sum(terms.get(part, 0.0) for part in parts) for place, terms in outputs.items()}
    if not given or len(drawn) > 1 or len(outputs) > 3 or 0.0 in totals.values():
        return None
    place = next(iter(outputs))
    weights = {part: outputs[place].get(part, 0.0) / totals[place] for part in parts}
    for place, terms in outputs.items():
        if any(abs(terms.get(part, 0.0) / totals[place] - weights[part]) > EXACT for part in parts):
            return None
    clean = {place: node for place, terms in outputs.items() for node in given if is_clean(terms, node, parts)}
    named = [
        node for node in given if graph.inputs[whole_of(node).name].name in {graph.outputs[at].name for at in outputs}
    ]
    latents = next(iter([*clean.values(), *named, *given]))
    involved = [*given, *parts, *(graph.results[place] for place in outputs)]
    if any((fake(node).dtype, shape(node)) != (fake(latents).dtype, shape(latents)) for node in involved):
        return None
    history = tuple(node for node in given if node is not latents)
    # Of several outputs one may be x0 itself; the next latents come first.
    rest = [place for place in outputs if len(outputs) == 1 or place not in clean]
    x0 = next((place for place in outputs if place not in rest), None)
    if len(rest) > 2 or len(clean) > 1:
        return None
    first = rest[0] if x0 is None else x0
    entering = outputs[first].get(latents, 0.0)
    sigma = -totals[first] / entering if entering else 1.0  # x0 = latents - sigma * velocity
    rows = [[sigma, 0.0, 0.0] + [0.0] * len(history)]
    for place in rest:
        terms, by_clean = outputs[place], -totals[place] / sigma
        noise = terms.get(drawn[0], 0.0) if drawn else 0.0
        rows.append([terms.get(latents, 0.0) - by_clean, by_clean, noise, *(terms.get(node, 0.0) for node in history)])
    third = rest[1] if len(rest) > 1 else None
    return Step(latents, weights, noise_call(drawn[0]) if drawn else None, history, (rest[0], x0, third), rows)


def is_clean(terms: Terms, latents: fx.Node, parts: list[fx.Node]) -> bool:
    """Return True for a sum of latents and some of the velocity, and nothing else."""
    return terms.get(latents) == 1.0 and set(terms) <= {latents, *parts}


def fuse(graph: PassGraph, edit: Editor, match: Match, step: Step) -> None:
    """Emit the kernel at the end of the graph, and hand on what it writes."""
    output = graph.graph.output_node()
    rows, frames, channels, *places = shape(match.results[0])
    patch_height, patch_width = places[1::2] if len(places) == 4 else (1, 1)  # axes of one entry are left out
    with edit.before(output):
        x = edit.dense(step.latents)
        size, like = shape(x), fake(x)
        if step.noise is not None:
            listed, key, _, draw, stream = step.noise.args
            listed = edit.dense(listed)  # type: ignore[arg-type]
        else:
            listed = literal(graph, [0] * (size[0] * size[1]), size[:2], torch.int32, like.device)
            key, draw, stream = literal(graph, [0] * size[0], size[:1], torch.int64, like.device), 0, 0
        kind = torch.promote_types(like.dtype, torch.float32)
        numbers = [number for row in step.rows for number in row]
        by = literal(graph, numbers, (len(step.rows), len(step.rows[0])), kind, like.device)
        history = edit.call(aten.stack.default, [*step.history]) if step.history else None
        tokens = match.given["tokens"]
        each = shape(tokens)[-1] if len(shape(tokens)) == 3 else patch_height * patch_width * channels
        by_frame = edit.view(edit.dense(tokens), (rows, frames, fake(tokens).numel() // (rows * frames * each), each))
        outs = [None if place is None else edit.like(x) for place in step.outputs]
        edit.call(
            ops.denoise_step.default, velocity_of(edit, by_frame, step.velocities), x, listed, key, by, history,
            *outs, patch_height, patch_width, draw, stream,
        )  # fmt: skip
    results = list(output.args[0])  # type: ignore[arg-type]
    for place, out in zip(step.outputs, outs, strict=True):
        if place is not None:
            results[place] = out
    output.args = (tuple(results),)


def velocity_of(edit: Editor, by_frame: fx.Node, velocities: Mapping[fx.Node, float]) -> fx.Node:
    """The head's tokens [R, T, k] of parts of the velocity, from [R, F, P, k]; summed with weights if there are two."""
    parts = []
    for node in velocities:
        selected = by_frame
        for part in reversed(list(slices_of(node))):
            selected = edit.call(aten.slice.Tensor, selected, *part.args[1:])
        rows, frames, tokens, each = shape(selected)
        parts.append(edit.view(edit.dense(selected), (rows, frames * tokens, each)))
    weights = list(velocities.values())
    total = parts[0] if len(parts) == 1 else edit.call(aten.mul.Tensor, parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = edit.call(aten.add.Tensor, total, edit.call(aten.mul.Tensor, part, weight))
    return total


def slices_of(node: fx.Node) -> Iterator[fx.Node]:
    """The slices that a part of the velocity was taken by, the last first."""
    while node.target in (aten.view.default, aten.slice.Tensor):
        if node.target is aten.slice.Tensor:
            yield node
        node = node.all_input_nodes[0]
