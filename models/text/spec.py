"""Sizes of the UMT5 encoders: the one Wan was trained with, and the small random one that stands in for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextSpec:
    """vocabulary: rows of the token table; heads are head_dim wide each; buckets: of relative distance."""

    vocabulary: int
    dim: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    buckets: int


UMT5_XXL = TextSpec(
    vocabulary=256384, dim=4096, head_dim=64, ffn_dim=10240, num_layers=24, num_heads=64, buckets=32
)  # fmt: skip


def tiny_text(dim: int) -> TextSpec:
    """The small encoder whose rows are `dim` wide; it reads bytes."""
    return TextSpec(vocabulary=259, dim=dim, head_dim=16, ffn_dim=64, num_layers=2, num_heads=4, buckets=32)
