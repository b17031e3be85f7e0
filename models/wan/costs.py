"""Costs of the transformers of the Wan family, from their sizes. P is tokens per latent frame, d the model's width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...graphs.passes import Pass
from ..costs import ITEMSIZE, ROTATION, Flops, TransformerCosts, frames_seen
from ..spec import ModelSpec


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def cross_key_parameters(spec: ModelSpec) -> int:
    """Parameters of one layer's projections to cross-attention keys and values."""
    sources = 1 if spec.image_dim is None else 2
    return sources * (2 * linear(spec.dim, spec.kv_dim) + spec.kv_dim)


@dataclass(frozen=True)
class WanCosts(TransformerCosts):
    spec: ModelSpec

    @property
    def prompt_parameters(self) -> int:
        spec = self.spec
        dim, width = spec.dim, spec.image_dim
        total = linear(spec.text_dim, dim) + linear(dim, dim) + spec.num_layers * cross_key_parameters(spec)
        if width is not None:
            total += 2 * width + linear(width, width) + linear(width, dim) + 2 * dim + (spec.image_tokens or 0) * width
        return total

    @property
    def pass_parameters(self) -> int:
        spec = self.spec
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

    @property
    def camera_inputs(self) -> int:
        """Entries of a token's rays."""
        spec = self.spec
        return (spec.frame_channels - spec.condition_channels) * math.prod(spec.patch)

    @property
    def frame_parameters(self) -> int:
        dim = self.spec.dim
        if self.spec.camera_channels is None:
            return 0
        return linear(self.camera_inputs, dim) + (2 + 4 * self.spec.num_layers) * linear(dim, dim)

    def frame_flops(self, tokens: int, frames: int) -> int:
        dim = self.spec.dim
        if self.spec.camera_channels is None:
            return 0
        return 2 * frames * tokens * (self.camera_inputs * dim + (2 + 4 * self.spec.num_layers) * dim * dim)

    def frame_bytes(self, tokens: int, frames: int, dtype: str) -> int:
        if self.spec.camera_channels is None:
            return 0
        return ITEMSIZE[dtype] * frames * tokens * self.spec.dim * 2 * self.spec.num_layers

    @property
    def prompt_flops(self) -> int:
        spec = self.spec
        dim = spec.dim
        return 2 * spec.text_len * (spec.text_dim * dim + dim * dim + spec.num_layers * 2 * dim * spec.kv_dim)

    def pass_flops(self, tokens: int, run: Pass) -> Flops:
        spec = self.spec
        dim, area, frames = spec.dim, math.prod(spec.patch), len(run.frames)
        entries = spec.num_layers * (4 * dim * dim + 2 * dim * spec.kv_dim + 2 * dim * spec.ffn_dim)
        entries += area * (spec.in_channels + spec.out_channels) * dim
        per_frame = spec.freq_dim * dim + 7 * dim * dim
        if spec.action_dim is not None:
            per_frame += spec.action_dim * dim + dim * dim
        return Flops(
            linear=2 * frames * (tokens * entries + per_frame),
            attention=spec.num_layers * 4 * frames_seen(run) * tokens**2 * dim,
            cross=spec.num_layers * 4 * frames * tokens * spec.text_len * dim,
        )

    def cross_bytes(self, dtype: str) -> int:
        spec = self.spec
        return ITEMSIZE[dtype] * spec.text_len * (2 * spec.num_layers * spec.kv_dim + spec.text_dim)

    def token_layers(self) -> Iterator[tuple[str, int, int]]:
        spec = self.spec
        dim, ffn = spec.dim, spec.ffn_dim
        sides = {f"self_attn.{part}": (dim, spec.kv_dim if part in "kv" else dim) for part in "qkvo"}
        sides |= {f"cross_attn.{part}": (dim, dim) for part in "qo"}
        sides |= {"ffn.up": (dim, ffn), "ffn.down": (ffn, dim)}
        for layer in range(spec.num_layers):
            for name, size in sides.items():
                yield f"blocks.{layer}.{name}", *size
        yield "head.linear", dim, math.prod(spec.patch) * spec.out_channels

    def merged_bytes(self, dtype: str) -> int:
        spec = self.spec
        return ITEMSIZE[dtype] * spec.num_layers * (linear(spec.dim, spec.dim) + 2 * linear(spec.dim, spec.kv_dim))

    def table_bytes(self, frames: int, steps: int, commit: bool, dtype: str) -> int:
        spec = self.spec
        layers, head = 6 * spec.num_layers * (steps + commit), 2 * steps
        return ITEMSIZE[dtype] * frames * spec.dim * (layers + head)

    def arena_bytes(self, tokens: int, frames: int, dtype: str) -> int:
        """Upper bound of a program's arena in bytes.

        It has the wide tensor of the feed-forward and two of the model's width, or queries, keys, values and two more;
        two more for gaps between buffers; and the float32 temporaries of a solver step.
        """
        spec = self.spec
        item, dim = ITEMSIZE[dtype], spec.dim
        wide = item * (max(spec.ffn_dim + 2 * dim, 5 * dim) + 2 * dim)
        latents = 4 * 8 * spec.out_channels * math.prod(spec.patch)
        return frames * (tokens * (wide + latents) + item * 14 * dim)

    def pass_scratch(self, tokens: int, frames: int, dtype: str) -> int:
        """Upper bound of the bytes of a pass of `frames`, besides weights, pages and its input.

        The peak is in the feed-forward, with two wide tensors and four of the model's width, or in the rotation, with
        six.
        """
        spec = self.spec
        item, dim = ITEMSIZE[dtype], spec.dim
        wide = item * (2 * spec.ffn_dim + 4 * dim)
        rotating = item * 6 * dim + ROTATION * dim
        modulation = frames * item * 14 * dim
        angles = frames * tokens * 8 * 2 * spec.head_dim
        return frames * tokens * max(wide, rotating) + modulation + angles
