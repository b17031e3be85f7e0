"""Costs of a model computed from its sizes: parameters, bytes and FLOPs (a multiply and an add are 2).

Integers in, integers out; nothing is loaded or measured. Tests compare each figure with the real modules, caches and
passes. P is tokens per latent frame, T = frames * P the tokens of a pass, d the model's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from ...graphs.passes import Pass
from ...graphs.rewrites.lowp import PrecisionMap
from ...models.text.spec import TextSpec
from ...models.wan.spec import ModelSpec
from ...models.wan.taehv import TinySpec
from ...models.wan.vae import VaeSpec

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
SCALED = ("fp8", "int8")  # pages of these dtypes have a float32 scale for each head's keys and values
ROTATION = 24  # peak bytes for each entry while queries and keys are rotated in float64

DecoderSpec = VaeSpec | TinySpec


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


# The transformer


def cross_key_parameters(spec: ModelSpec) -> int:
    """Parameters of one layer's projections to cross-attention keys and values."""
    sources = 1 if spec.image_dim is None else 2
    return sources * (2 * linear(spec.dim, spec.dim) + spec.dim)


def prompt_parameters(spec: ModelSpec) -> int:
    """Parameters that are applied once for each prompt, and not read by passes."""
    dim, width = spec.dim, spec.image_dim
    total = linear(spec.text_dim, dim) + linear(dim, dim) + spec.num_layers * cross_key_parameters(spec)
    if width is not None:
        total += 2 * width + linear(width, width) + linear(width, dim) + 2 * dim + (spec.image_tokens or 0) * width
    return total


def pass_parameters(spec: ModelSpec) -> int:
    """Parameters that every pass reads."""
    dim, area = spec.dim, math.prod(spec.patch)
    total = linear(area * spec.in_channels, dim) + 2 * dim + linear(dim, area * spec.out_channels)
    total += linear(spec.freq_dim, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    if spec.action_dim is not None:
        total += linear(spec.action_dim, dim) + linear(dim, dim)
    if spec.grid is not None:
        total += math.prod(spec.grid) * dim
    layer = 6 * dim + 6 * linear(dim, dim) + 3 * dim + 2 * dim + linear(dim, spec.ffn_dim) + linear(spec.ffn_dim, dim)
    return total + spec.num_layers * layer


def transformer_parameters(spec: ModelSpec) -> int:
    return prompt_parameters(spec) + pass_parameters(spec)


class Flops(NamedTuple):
    """FLOPs of a pass: linear layers, self-attention and cross-attention."""

    linear: int
    attention: int
    cross: int

    @property
    def total(self) -> int:
        return sum(self)


def pass_flops(spec: ModelSpec, tokens: int, run: Pass) -> Flops:
    """FLOPs of one pass. tokens: of one latent frame."""
    dim, area, frames = spec.dim, math.prod(spec.patch), len(run.frames)
    entries = spec.num_layers * (6 * dim * dim + 2 * dim * spec.ffn_dim)
    entries += area * (spec.in_channels + spec.out_channels) * dim
    per_frame = spec.freq_dim * dim + 7 * dim * dim
    if spec.action_dim is not None:
        per_frame += spec.action_dim * dim + dim * dim
    seen = sum(
        len(group.frames) * sum(map(len, lists)) // len(lists)
        for group in run.groups
        for lists in [group.head_contexts or (group.context,)]
    )
    return Flops(
        linear=2 * frames * (tokens * entries + per_frame),
        attention=spec.num_layers * 4 * seen * tokens**2 * dim,
        cross=spec.num_layers * 4 * frames * tokens * spec.text_len * dim,
    )


def prompt_flops(spec: ModelSpec) -> int:
    """FLOPs of a prompt's cross-attention keys and values, from the text encoder's rows."""
    dim = spec.dim
    return 2 * spec.text_len * (spec.text_dim * dim + dim * dim + spec.num_layers * 2 * dim * dim)


def page_bytes(spec: ModelSpec, tokens: int, kind: str) -> int:
    """Bytes of one page: keys and values of one latent frame in all layers. kind: dtype of the page."""
    scales = 4 * spec.num_heads if kind in SCALED else 0
    return 2 * spec.num_layers * (tokens * spec.dim * ITEMSIZE[kind] + scales)


def cross_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one prompt: its cross-attention keys and values, and the rows of the text encoder."""
    return ITEMSIZE[dtype] * spec.text_len * (2 * spec.num_layers * spec.dim + spec.text_dim)


def latent_bytes(spec: ModelSpec, size: tuple[int, int], dtype: str) -> int:
    """Bytes of one latent frame."""
    return ITEMSIZE[dtype] * spec.out_channels * math.prod(spec.latent_size(size))


def token_layers(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Yield name, input width and output width of each linear layer that a pass runs on every token."""
    dim, ffn = spec.dim, spec.ffn_dim
    sides = {f"self_attn.{part}": (dim, dim) for part in "qkvo"} | {f"cross_attn.{part}": (dim, dim) for part in "qo"}
    sides |= {"ffn.up": (dim, ffn), "ffn.down": (ffn, dim)}
    for layer in range(spec.num_layers):
        for name, size in sides.items():
            yield f"blocks.{layer}.{name}", *size
    yield "head.linear", dim, math.prod(spec.patch) * spec.out_channels


def packing_saves(spec: ModelSpec, dtype: str, precision: PrecisionMap) -> int:
    """Bytes saved by packing layers to one byte an entry and a float32 scale for each output channel."""
    sizes = [(inputs, outputs) for name, inputs, outputs in token_layers(spec) if precision.has(name)]
    return sum((ITEMSIZE[dtype] - 1) * inputs * outputs - 4 * outputs for inputs, outputs in sizes)


def pass_traffic(
    spec: ModelSpec, tokens: int, run: Pass, dtype: str, kind: str, precision: PrecisionMap | None = None
) -> int:
    """Least memory traffic of a pass in bytes: weights, cross keys and context pages read once, its pages written."""
    seen = set[int]().union(*(group.context for group in run.groups))
    pages = (len(seen) + len(run.frames)) * page_bytes(spec, tokens, kind)
    saved = packing_saves(spec, dtype, precision) if precision is not None else 0
    return ITEMSIZE[dtype] * pass_parameters(spec) - saved + cross_bytes(spec, dtype) + pages


def merged_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the merged query, key and value projections; the separate weights become views of them."""
    return ITEMSIZE[dtype] * spec.num_layers * 3 * linear(spec.dim, spec.dim)


def table_bytes(spec: ModelSpec, frames: int, steps: int, commit: bool, dtype: str) -> int:
    """Bytes of the modulation tables of a whole-block graph: each layer and the head at each timestep."""
    layers, head = 6 * spec.num_layers * (steps + commit), 2 * steps
    return ITEMSIZE[dtype] * frames * spec.dim * (layers + head)


def arena_bytes(spec: ModelSpec, tokens: int, frames: int, dtype: str) -> int:
    """Upper bound of a program's arena in bytes.

    It has the wide tensor of the feed-forward and two of the model's width, or queries, keys, values and two more; two
    more for gaps between buffers; and the float32 temporaries of a solver step.
    """
    item, dim = ITEMSIZE[dtype], spec.dim
    wide = item * (max(spec.ffn_dim + 2 * dim, 5 * dim) + 2 * dim)
    latents = 4 * 8 * spec.out_channels * math.prod(spec.patch)
    return frames * (tokens * (wide + latents) + item * 14 * dim)


def pass_scratch(spec: ModelSpec, tokens: int, frames: int, dtype: str) -> int:
    """Upper bound of the bytes of a pass of `frames`, besides weights, pages and its input.

    The peak is in the feed-forward, with two wide tensors and four of the model's width, or in the rotation, with six.
    """
    item, dim = ITEMSIZE[dtype], spec.dim
    wide = item * (2 * spec.ffn_dim + 4 * dim)
    rotating = item * 6 * dim + ROTATION * dim
    modulation = frames * item * 14 * dim
    angles = frames * tokens * 8 * 2 * spec.head_dim
    return frames * tokens * max(wide, rotating) + modulation + angles


# The text encoder


def text_parameters(spec: TextSpec) -> int:
    """Parameters of a text encoder; its layers have no bias."""
    inner = spec.num_heads * spec.head_dim
    layer = 4 * spec.dim * inner + 3 * spec.dim * spec.ffn_dim + 2 * spec.dim + spec.buckets * spec.num_heads
    return spec.vocabulary * spec.dim + spec.num_layers * layer + spec.dim


# VAEs


class Place(NamedTuple):
    """Resolution of a convolution: spatial scale relative to the latents, and output frames for each latent frame.

    first: output frames for the first latent frame of a stream.
    """

    scale: int
    frames: int
    first: int = 1


@dataclass(frozen=True)
class Conv:
    """Sizes of a convolution.

    norm: width of the norm before it. past: input frames that a stream caches. doubles: True if its input was upsampled
    by 2 just before. beside: entries per latent position of the residual branch that are live meanwhile.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int, int]
    place: Place
    past: int = 0
    norm: int = 0
    bias: bool = True
    doubles: bool = False
    beside: int = 0

    @property
    def parameters(self) -> int:
        return math.prod(self.kernel) * self.inputs * self.outputs + self.outputs * self.bias + self.norm

    def flops(self, frames: int) -> int:
        """FLOPs for each latent position and `frames` output frames."""
        return 2 * math.prod(self.kernel) * self.inputs * self.outputs * self.place.scale**2 * frames


CUBE, PLANE, LINE, POINT = (3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)


def residual_convs(inputs: int, outputs: int, place: Place) -> Iterator[Conv]:
    yield Conv(inputs, outputs, CUBE, place, past=2, norm=inputs)
    yield Conv(outputs, outputs, CUBE, place, past=2, norm=outputs)
    if inputs != outputs:
        yield Conv(inputs, outputs, POINT, place)


def middle_convs(width: int, place: Place) -> Iterator[Conv]:
    yield from residual_convs(width, width, place)
    yield Conv(width, 3 * width, POINT, place, norm=width)
    yield Conv(width, width, POINT, place)
    yield from residual_convs(width, width, place)


def decoder_convs(spec: VaeSpec) -> Iterator[Conv]:
    """Yield the convolutions of a VAE's decoder, in execution order."""
    place, width = Place(scale=1, frames=1), spec.decoder_widths[0]
    yield Conv(spec.z_dim, spec.z_dim, POINT, place)
    yield Conv(spec.z_dim, width, CUBE, place, past=2)
    yield from middle_convs(width, place)
    for out, temporal in zip(spec.decoder_widths, [*reversed(spec.temporal_down), None], strict=True):
        beside = width * place.frames * place.scale**2
        first, *rest = (residual_convs(inputs, out, place) for inputs in (width, *[out] * spec.num_res_blocks))
        yield next(first)
        yield from (replace(conv, beside=beside) for conv in chain(first, *rest))
        width = out if spec.shortcuts or temporal is None else out // 2
        if temporal:
            yield Conv(out, 2 * out, LINE, place._replace(first=0), past=2, beside=beside)
        if temporal is not None:
            place = Place(2 * place.scale, place.frames * (2 if temporal else 1))
            yield Conv(out, width, PLANE, place, doubles=True, beside=beside)
    yield Conv(width, spec.picture_channels, CUBE, place, past=2, norm=width)


def encoder_convs(spec: VaeSpec) -> Iterator[Conv]:
    """Yield the convolutions of a VAE's encoder, in execution order."""
    place, width = Place(2 ** len(spec.temporal_down), spec.temporal_stride), spec.base_channels
    yield Conv(spec.picture_channels, width, CUBE, place, past=2)
    for out, temporal in zip(spec.widths, [*spec.temporal_down, None], strict=True):
        for inputs in (width, *[out] * (spec.num_res_blocks - 1)):
            yield from residual_convs(inputs, out, place)
        width = out
        if temporal is not None:
            place = place._replace(scale=place.scale // 2)
            yield Conv(out, out, PLANE, place)
        if temporal:
            place = place._replace(frames=place.frames // 2)
            yield Conv(out, out, LINE, place._replace(first=0), past=1)
    yield from middle_convs(width, place)
    yield Conv(width, 2 * spec.z_dim, CUBE, place, past=2, norm=width)
    yield Conv(2 * spec.z_dim, 2 * spec.z_dim, POINT, place)


def tiny_convs(spec: TinySpec) -> Iterator[Conv]:
    """Yield the convolutions of the tiny decoder; the first latent frame of a stream costs as much as any other."""
    place = Place(scale=1, frames=1)
    yield Conv(spec.z_dim, spec.widths[0], PLANE, place)
    for width, following, factor in zip(spec.widths, spec.widths[1:], spec.time, strict=False):
        for _ in range(3):
            yield Conv(2 * width, width, PLANE, place, past=1)
            yield from (Conv(width, width, PLANE, place) for _ in range(2))
        place = Place(2 * place.scale, place.frames, place.first)
        yield Conv(width, width * factor, POINT, place, bias=False)
        place = Place(place.scale, place.frames * factor, place.first * factor)
        yield Conv(width, following, PLANE, place, bias=False)
    yield Conv(spec.widths[-1], 3 * spec.patch**2, PLANE, place)


def convs(spec: DecoderSpec) -> list[Conv]:
    """Convolutions of a decoder, in execution order."""
    return list(tiny_convs(spec) if isinstance(spec, TinySpec) else decoder_convs(spec))


def decoder_parameters(spec: DecoderSpec) -> int:
    """Parameters loaded for a decoder, with the encoder of a VAE."""
    encoder = [] if isinstance(spec, TinySpec) else list(encoder_convs(spec))
    return sum(conv.parameters for conv in (*convs(spec), *encoder))


def decoder_state_bytes(spec: DecoderSpec, latent: tuple[int, int], dtype: str) -> int:
    """Bytes of a stream's decoder state after two latent frames of (height, width)."""
    # A memory block of the tiny decoder reads its input joined with its cache, so half its input channels are cached.
    half = 2 if isinstance(spec, TinySpec) else 1
    entries = sum(conv.past * conv.inputs // half * conv.place.scale**2 for conv in convs(spec))
    return ITEMSIZE[dtype] * math.prod(latent) * entries


def decode_flops(spec: DecoderSpec, latent: tuple[int, int], first: bool = False) -> int:
    """FLOPs of decoding one latent frame of (height, width), the first of a stream or a later one."""
    area = math.prod(latent)
    total = sum(conv.flops(conv.place.first if first else conv.place.frames) for conv in convs(spec)) * area
    return total if isinstance(spec, TinySpec) else total + 4 * area**2 * spec.decoder_widths[0]


def decode_traffic(spec: DecoderSpec, latent: tuple[int, int], dtype: str) -> int:
    """Least memory traffic of decoding a latent frame in bytes: weights read, state read and written."""
    weights = ITEMSIZE[dtype] * sum(conv.parameters for conv in convs(spec))
    return weights + 2 * decoder_state_bytes(spec, latent, dtype)


def encode_flops(spec: VaeSpec, latent: tuple[int, int]) -> int:
    """FLOPs of encoding one picture, the first of a stream, to latents of (height, width)."""
    area = math.prod(latent)
    return sum(conv.flops(conv.place.first) for conv in encoder_convs(spec)) * area + 4 * area**2 * spec.widths[-1]


def decode_scratch(spec: DecoderSpec, latent: tuple[int, int], frames: int, dtype: str) -> int:
    """Upper bound of the bytes of decoding `frames` latent frames at once, besides weights, state and latents."""
    item, area = ITEMSIZE[dtype], math.prod(latent)
    pictures = item * frames * spec.temporal_stride * 3 * spec.spatial_stride**2
    if isinstance(spec, TinySpec):
        # The upsampled input and the output of each stage stay live until the stages after it are done.
        grown = (conv for conv in convs(spec) if not conv.bias)
        live = item * sum((conv.inputs + conv.outputs) * conv.place.scale**2 for conv in grown)
    else:
        live = max(live_bytes(conv, item) for conv in convs(spec))
    return area * (max(live + pictures, 3 * pictures) + 2 * item * frames * spec.z_dim)


def live_bytes(conv: Conv, item: int) -> int:
    """Peak live bytes for each latent position around one convolution.

    2 x input + input concatenated with its cached frames + new cache + output; after upsampling, the upsampled input
    and a copy of it in float32 or better.
    """
    frames, positions = conv.place.frames, conv.place.scale**2
    if conv.doubles:
        doubled = conv.inputs * frames * positions
        return item * (conv.beside + doubled // 4) + doubled * (max(item, 4) + item)
    joined = conv.inputs * (frames + 2 * conv.past) if conv.past else 0
    return item * (conv.beside + positions * (frames * (2 * conv.inputs + conv.outputs) + joined))
