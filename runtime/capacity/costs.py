"""Costs of a model computed from its sizes: parameters, bytes and FLOPs (a multiply and an add are 2).

Integers in, integers out; nothing is loaded or measured. Tests compare each figure with the real modules, caches and
passes. What depends on the form of a transformer is counted by its family (`models.costs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...graphs.passes import Pass
from ...graphs.rewrites.lowp import PrecisionMap
from ...models.costs import ITEMSIZE, Flops, TransformerCosts
from ...models.decoder import DecoderSpec
from ...models.registry import family_of
from ...models.spec import ModelSpec
from ...schemes.presets import Preset

SCALED = ("fp8", "int8")  # pages of these dtypes have a float32 scale for each head's keys and values


# The transformer


def costs_of(spec: ModelSpec) -> TransformerCosts:
    return family_of(spec).costs(spec)


def prompt_parameters(spec: ModelSpec) -> int:
    """Parameters that are applied once for each prompt, and not read by passes."""
    return costs_of(spec).prompt_parameters


def pass_parameters(spec: ModelSpec) -> int:
    """Parameters that every pass reads."""
    return costs_of(spec).pass_parameters


def transformer_parameters(spec: ModelSpec) -> int:
    return prompt_parameters(spec) + frame_parameters(spec) + pass_parameters(spec)


def transformer_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of a transformer's weights."""
    return ITEMSIZE[dtype] * transformer_parameters(spec) - narrow_saves(spec, dtype)


def pass_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the weights that every pass reads."""
    return ITEMSIZE[dtype] * pass_parameters(spec) - narrow_saves(spec, dtype)


def narrow_saves(spec: ModelSpec, dtype: str) -> int:
    """Bytes that weights which are stored in one byte each take less than in a dtype."""
    return (ITEMSIZE[dtype] - 1) * costs_of(spec).narrow_parameters


def frame_parameters(spec: ModelSpec) -> int:
    """Parameters of the layers that read only what a frame is given beside its latents, such as a camera."""
    return costs_of(spec).frame_parameters


def frame_flops(spec: ModelSpec, tokens: int, frames: int) -> int:
    """FLOPs of those layers over some frames: of a block where their results are kept, else of each pass."""
    return costs_of(spec).frame_flops(tokens, frames)


def frame_bytes(spec: ModelSpec, tokens: int, frames: int, dtype: str) -> int:
    """Bytes of their results, which a block can keep."""
    return costs_of(spec).frame_bytes(tokens, frames, dtype)


def channel_bytes(spec: ModelSpec, size: tuple[int, int], frames: int, dtype: str) -> int:
    """Bytes of the channels that frames are given beside their latents."""
    return ITEMSIZE[dtype] * frames * spec.frame_channels * math.prod(spec.latent_size(size))


def pass_flops(spec: ModelSpec, tokens: int, run: Pass) -> Flops:
    """FLOPs of one pass. tokens: of one latent frame."""
    return costs_of(spec).pass_flops(tokens, run)


def prompt_flops(spec: ModelSpec) -> int:
    """FLOPs of a prompt's cross-attention keys and values, from the text encoder's rows."""
    return costs_of(spec).prompt_flops


def page_bytes(spec: ModelSpec, tokens: int, kind: str) -> int:
    """Bytes of one page: keys and values of one latent frame in all layers. kind: dtype of the page."""
    scales = 4 * spec.kv_heads if kind in SCALED else 0
    return 2 * spec.num_layers * (tokens * spec.kv_dim * ITEMSIZE[kind] + scales)


def cross_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of one prompt: its cross-attention keys and values, and the rows of the text encoder."""
    return costs_of(spec).cross_bytes(dtype)


def latent_bytes(spec: ModelSpec, size: tuple[int, int], dtype: str) -> int:
    """Bytes of one latent frame."""
    return ITEMSIZE[dtype] * spec.out_channels * math.prod(spec.latent_size(size))


def latent_kind(preset: Preset, dtype: str) -> str:
    """Dtype of latents between steps, of a model in `dtype`."""
    return "float32" if preset.sampler.wide_latents and ITEMSIZE[dtype] < ITEMSIZE["float32"] else dtype


def token_layers(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """Yield name, input width and output width of each linear layer that a pass runs on every token."""
    return costs_of(spec).token_layers()


def layer_item(spec: ModelSpec, layer: str, dtype: str) -> int:
    """Bytes of an entry of the weights of one of `token_layers`, by its name."""
    return costs_of(spec).layer_item(layer, dtype)


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
    return pass_bytes(spec, dtype) - saved + cross_bytes(spec, dtype) + pages


def merged_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the merged query, key and value projections; the separate weights become views of them."""
    return costs_of(spec).merged_bytes(dtype)


def table_bytes(spec: ModelSpec, frames: int, steps: int, commit: bool, dtype: str) -> int:
    """Bytes of the modulation tables of a whole-block graph: each layer and the head at each timestep."""
    return costs_of(spec).table_bytes(frames, steps, commit, dtype)


def wide_bytes(spec: ModelSpec, dtype: str) -> int:
    """Upper bound of the float32 copies of weights that graphs keep, for layers that compute in float32."""
    return costs_of(spec).wide_bytes(dtype)


def arena_bytes(spec: ModelSpec, tokens: int, frames: int, dtype: str) -> int:
    """Upper bound of a program's arena in bytes."""
    return costs_of(spec).arena_bytes(tokens, frames, dtype)


def pass_scratch(spec: ModelSpec, tokens: int, frames: int, dtype: str) -> int:
    """Upper bound of the bytes of a pass of `frames`, besides weights, pages and its input."""
    return costs_of(spec).pass_scratch(tokens, frames, dtype)


# Decoders


def decoder_state_bytes(spec: DecoderSpec, latent: tuple[int, int], dtype: str) -> int:
    """Bytes of a stream's decoder state after two latent frames of (height, width)."""
    return ITEMSIZE[dtype] * spec.state_entries(latent)


def decode_traffic(spec: DecoderSpec, latent: tuple[int, int], dtype: str) -> int:
    """Least memory traffic of decoding a latent frame in bytes: weights read, state read and written."""
    return ITEMSIZE[dtype] * spec.decoding_parameters + 2 * decoder_state_bytes(spec, latent, dtype)
