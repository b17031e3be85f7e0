"""Costs of a model computed from its sizes: parameters, bytes and FLOPs (a multiply and an add are 2).

Integers in, integers out; nothing is loaded or measured. Tests compare each figure with the real modules, caches and
passes. P is tokens per latent frame, T = frames * P the tokens of a pass, d the model's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ...graphs.passes import Pass
from ...graphs.rewrites.lowp import PrecisionMap
from ...models.decoder import DecoderSpec
from ...models.spec import ModelSpec

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
SCALED = ("fp8", "int8")  # pages of these dtypes have a float32 scale for each head's keys and values
ROTATION = 24  # peak bytes for each entry while queries and keys are rotated in float64


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


# The transformer


def cross_key_parameters(spec: ModelSpec) -> int:
    """Parameters of one layer's projections to cross-attention keys and values."""
    sources = 1 if spec.image_dim is None else 2
    return sources * (2 * linear(spec.dim, spec.kv_dim) + spec.kv_dim)


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
    layer = 6 * dim + 4 * linear(dim, dim) + 2 * linear(dim, spec.kv_dim) + 2 * dim + spec.kv_dim + 2 * dim
    layer += linear(dim, spec.ffn_dim) + linear(spec.ffn_dim, dim)
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
    entries = spec.num_layers * (4 * dim * dim + 2 * dim * spec.kv_dim + 2 * dim * spec.ffn_dim)
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
    return 2 * spec.text_len * (spec.text_dim * dim + dim * dim + spec.num_layers * 2 * dim * spec.kv_dim)


def page_bytes(spec: ModelSpec, tokens: int, kind: str) -> int:
    """Bytes of one page: keys and values of one latent frame in all layers. kind: dtype of the page."""
    scales = 4 * spec.kv_heads if kind in SCALED else 0
    return 2 * spec.num_layers * (tokens * spec.kv_dim * ITEMSIZE[kind] + scales)


def cross_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one prompt: its cross-attention keys and values, and the rows of the text encoder."""
    return ITEMSIZE[dtype] * spec.text_len * (2 * spec.num_layers * spec.kv_dim + spec.text_dim)


def latent_bytes(spec: ModelSpec, size: tuple[int, int], dtype: str) -> int:
    """Bytes of one latent frame."""
    return ITEMSIZE[dtype] * spec.out_channels * math.prod(spec.latent_size(size))


def token_layers(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Yield name, input width and output width of each linear layer that a pass runs on every token."""
    dim, ffn = spec.dim, spec.ffn_dim
    sides = {f"self_attn.{part}": (dim, spec.kv_dim if part in "kv" else dim) for part in "qkvo"}
    sides |= {f"cross_attn.{part}": (dim, dim) for part in "qo"}
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
    return ITEMSIZE[dtype] * spec.num_layers * (linear(spec.dim, spec.dim) + 2 * linear(spec.dim, spec.kv_dim))


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


# Decoders


def decoder_state_bytes(spec: DecoderSpec, latent: tuple[int, int], dtype: str) -> int:
    """Bytes of a stream's decoder state after two latent frames of (height, width)."""
    return ITEMSIZE[dtype] * spec.state_entries(latent)


def decode_traffic(spec: DecoderSpec, latent: tuple[int, int], dtype: str) -> int:
    """Least memory traffic of decoding a latent frame in bytes: weights read, state read and written."""
    return ITEMSIZE[dtype] * spec.decoding_parameters + 2 * decoder_state_bytes(spec, latent, dtype)
