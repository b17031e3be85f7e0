"""Costs of MAGI-1's transformers, from their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...graphs.passes import Pass
from ..costs import ITEMSIZE, ROTATION, Flops, TransformerCosts, frames_seen
from .spec import MagiSpec

WIDE = 4  # bytes of an entry of the parts that compute in float32, at least


@dataclass(frozen=True)
class MagiCosts(TransformerCosts):
    spec: MagiSpec

    @property
    def queries(self) -> int:
        """Width of the queries of self-attention, and of those of cross-attention."""
        return self.spec.num_heads * self.spec.head_dim

    @property
    def patch_entries(self) -> int:
        """Entries of a patch: rows and columns times the repeated channels."""
        return math.prod(self.spec.patch) * self.spec.in_channels * self.spec.copies

    @property
    def prompt_parameters(self) -> int:
        spec = self.spec
        caption = spec.text_len * spec.text_dim + (spec.text_dim + 1) * (spec.dim + spec.cond_dim)
        return caption + spec.num_layers * (2 * spec.dim * spec.kv_dim + 2 * spec.head_dim)

    @property
    def pass_parameters(self) -> int:
        spec = self.spec
        total = 2 * self.patch_entries * spec.dim + spec.bands + 2 * spec.dim
        total += (spec.freq_dim + 1) * spec.cond_dim + (spec.cond_dim + 1) * spec.cond_dim
        layer = sum(inputs * outputs for _, inputs, outputs in self.layer_sizes())
        layer += 2 * spec.dim * (spec.cond_dim + 1) + 8 * spec.dim + 6 * spec.head_dim
        scales = sum(inputs + 1 for _, inputs, _ in self.layer_sizes()) + 2
        return total + spec.num_layers * layer + self.quantised_layers * scales

    @property
    def quantised_layers(self) -> int:
        """Layers in FP8: all but the first and the last of an FP8 model."""
        return max(0, self.spec.num_layers - 2) if self.spec.fp8 else 0

    @property
    def narrow_parameters(self) -> int:
        return self.quantised_layers * sum(inputs * outputs for _, inputs, outputs in self.layer_sizes())

    @property
    def prompt_flops(self) -> int:
        spec = self.spec
        rows = spec.text_len * (spec.text_dim * spec.dim + spec.num_layers * 2 * spec.dim * spec.kv_dim)
        return 2 * (rows + spec.text_dim * spec.cond_dim)

    def pass_flops(self, tokens: int, run: Pass) -> Flops:
        spec, frames = self.spec, len(run.frames)
        entries = spec.num_layers * sum(inputs * outputs for _, inputs, outputs in self.layer_sizes())
        entries += 2 * self.patch_entries * spec.dim
        embedded = 1 if run.condition is None else 2
        per_frame = embedded * spec.cond_dim * (spec.freq_dim + spec.cond_dim)
        per_frame += spec.num_layers * 2 * spec.dim * spec.cond_dim
        return Flops(
            linear=2 * frames * (tokens * entries + per_frame),
            attention=spec.num_layers * 4 * frames_seen(run) * tokens**2 * self.queries,
            cross=spec.num_layers * 4 * frames * tokens * spec.text_len * self.queries,
        )

    def cross_bytes(self, dtype: str) -> int:
        spec = self.spec
        return ITEMSIZE[dtype] * (2 * spec.text_len * spec.num_layers * spec.kv_dim + spec.text_rows * spec.text_dim)

    def layer_sizes(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, input width and output width of the linear layers of one layer."""
        spec = self.spec
        projections = {"q": self.queries, "qx": self.queries, "k": spec.kv_dim, "v": spec.kv_dim}
        for name, width in projections.items():
            yield f"self_attention.linear_qkv.{name}", spec.dim, width
        yield "self_attention.linear_proj", 2 * self.queries, spec.dim
        yield "mlp.linear_fc1", spec.dim, spec.ffn_dim * (2 if spec.gated else 1)
        yield "mlp.linear_fc2", spec.ffn_dim, spec.dim

    def token_layers(self) -> Iterator[tuple[str, int, int]]:
        for layer in range(self.spec.num_layers):
            for name, *size in self.layer_sizes():
                yield f"videodit_blocks.layers.{layer}.{name}", size[0], size[1]
        yield "final_linear.linear", self.spec.dim, self.patch_entries

    def layer_item(self, layer: str, dtype: str) -> int:
        """One byte in the quantised layers, which stand between the first and the last."""
        plain = (f"videodit_blocks.layers.{number}." for number in (0, self.spec.num_layers - 1))
        return ITEMSIZE[dtype] if not self.quantised_layers or layer.startswith((*plain, "final")) else 1

    def merged_bytes(self, dtype: str) -> int:
        return ITEMSIZE[dtype] * self.spec.num_layers * self.spec.dim * 2 * (self.queries + self.spec.kv_dim)

    def table_bytes(self, frames: int, steps: int, commit: bool, dtype: str) -> int:
        return 0  # no block of it is one graph

    def wide_bytes(self, dtype: str) -> int:
        """Embeddings, the head, and norms. Output projections are multiplied as they are."""
        spec = self.spec
        if ITEMSIZE[dtype] >= WIDE:
            return 0
        layers = spec.num_layers * (4 * spec.dim + 8 * spec.head_dim)
        caption = (spec.text_dim + 1) * (spec.dim + spec.cond_dim)
        time = (spec.freq_dim + spec.cond_dim + 2) * spec.cond_dim
        return WIDE * (layers + caption + time + 2 * (self.patch_entries + 1) * spec.dim)

    def arena_bytes(self, tokens: int, frames: int, dtype: str) -> int:
        return self.pass_scratch(tokens, frames, dtype)

    def pass_scratch(self, tokens: int, frames: int, dtype: str) -> int:
        """Upper bound of the bytes of a pass of `frames`, besides weights, pages and its input.

        The peak is in the feed-forward or in the rotation, with float32 copies of the gated update; the weight of the
        output projection is converted to float32.
        """
        spec, item = self.spec, ITEMSIZE[dtype]
        wide = max(item, WIDE)
        up = spec.ffn_dim * (4 if spec.gated else 2)
        attention = item * (6 * self.queries + 2 * spec.kv_dim) + ROTATION * self.queries
        per_token = max(item * up, attention) + (5 * wide + 3 * item) * spec.dim
        weights = wide * 2 * self.queries * spec.dim
        return frames * tokens * per_token + frames * wide * 4 * spec.dim * spec.num_layers + weights
