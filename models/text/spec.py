"""Sizes of the UMT5 encoders: the one Wan was trained with, and a small random one for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextSpec:
    """Sizes of a UMT5 encoder. vocabulary: rows of the token table. buckets: of the relative position bias."""

    vocabulary: int
    dim: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    buckets: int

    @property
    def parameters(self) -> int:
        """Parameters of the encoder; its layers have no bias."""
        inner = self.num_heads * self.head_dim
        layer = 4 * self.dim * inner + 3 * self.dim * self.ffn_dim + 2 * self.dim + self.buckets * self.num_heads
        return self.vocabulary * self.dim + self.num_layers * layer + self.dim


UMT5_XXL = TextSpec(
    vocabulary=256384, dim=4096, head_dim=64, ffn_dim=10240, num_layers=24, num_heads=64, buckets=32
)  # fmt: skip


def tiny_text(dim: int) -> TextSpec:
    """Return the sizes of the small byte-level encoder with rows `dim` wide."""
    return TextSpec(vocabulary=259, dim=dim, head_dim=16, ffn_dim=64, num_layers=2, num_heads=4, buckets=32)
