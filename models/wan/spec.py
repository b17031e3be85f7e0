"""Sizes of the Wan transformers, complete and without defaults: no other file has a number of a model.

Source: Wan 2.1 (arXiv 2503.20314) and the published configurations of Wan 2.1 and 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import UsageError


@dataclass(frozen=True)
class ModelSpec:
    """Every size of a causal Wan transformer."""

    name: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int
    out_channels: int
    freq_dim: int
    text_dim: int
    text_len: int
    patch: tuple[int, int]  # height, width; the temporal patch of the family is 1
    eps: float
    image_dim: int | None  # width of the image encoder's features, None without image cross-attention
    image_tokens: int | None  # rows of the learned position embedding of image features, None without one
    vae_stride: tuple[int, int]  # time, space
    fps: int
    default_size: tuple[int, int]  # width, height in pixels
    grid: tuple[int, int] | None  # rows and columns of a learned position embedding, None without one
    actions: tuple[str, ...]  # names of the actions of a latent frame; none for models that follow only text

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise UsageError(f"dim {self.dim} must be an even multiple of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def action_dim(self) -> int | None:
        """Entries of a frame's action vector, one per action; None for a model without actions."""
        return len(self.actions) or None

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the latent (height, width) of a picture (width, height) in pixels.

        Raises UsageError that names the nearest valid sizes.
        """
        steps = (self.vae_stride[1] * self.patch[1], self.vae_stride[1] * self.patch[0])
        if any(value < step or value % step for value, step in zip(size, steps, strict=True)):
            below = [max(value // step, 1) * step for value, step in zip(size, steps, strict=True)]
            above = [max(-(-value // step), 1) * step for value, step in zip(size, steps, strict=True)]
            if self.grid is not None and (above[0] > self.grid[1] * steps[0] or above[1] > self.grid[0] * steps[1]):
                above = below
            near = " or ".join(dict.fromkeys(f"{width}x{height}" for width, height in (below, above)))
            raise UsageError(
                f"size {size[0]}x{size[1]} is not possible: width must be a multiple of {steps[0]} and height "
                f"of {steps[1]}; nearest: {near}"
            )
        height, width = size[1] // self.vae_stride[1], size[0] // self.vae_stride[1]
        if self.grid is not None and (height > self.grid[0] * self.patch[0] or width > self.grid[1] * self.patch[1]):
            most = f"{self.grid[1] * steps[0]}x{self.grid[0] * steps[1]}"
            raise UsageError(f"size {size[0]}x{size[1]} is too large for {self.name}; expected at most {most}")
        return height, width

    def tokens_per_frame(self, size: tuple[int, int]) -> int:
        height, width = self.latent_size(size)
        return (height // self.patch[0]) * (width // self.patch[1])


FAMILY: dict[str, Any] = {
    "freq_dim": 256, "text_len": 512, "patch": (2, 2), "eps": 1e-6, "actions": (), "grid": None,
}  # fmt: skip
WAN21: dict[str, Any] = FAMILY | {
    "text_dim": 4096, "vae_stride": (4, 8), "fps": 16, "default_size": (832, 480), "out_channels": 16,
}  # fmt: skip
T2V: dict[str, Any] = {"in_channels": 16, "image_dim": None, "image_tokens": None}

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(name="wan-1.3b", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **T2V, **WAN21),
        ModelSpec(name="wan-14b", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **T2V, **WAN21),
        ModelSpec(
            name="wan-14b-i2v", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_channels=36,
            image_dim=1280, image_tokens=None, **WAN21,
        ),
        ModelSpec(
            name="wan-5b", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48,
            text_dim=4096, image_dim=None, image_tokens=None, vae_stride=(4, 16), fps=24,
            default_size=(1280, 704), **FAMILY,
        ),
        ModelSpec(
            name="wan-tiny", dim=256, ffn_dim=512, num_heads=2, num_layers=2, **T2V,
            **WAN21 | {"text_dim": 64, "default_size": (128, 128)},
        ),
        ModelSpec(
            name="wan-tiny-5b", dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_channels=48, out_channels=48,
            text_dim=64, image_dim=None, image_tokens=None, vae_stride=(4, 16), fps=24,
            default_size=(256, 256), **FAMILY,
        ),
        ModelSpec(
            name="tinyworld", dim=256, ffn_dim=768, num_heads=4, num_layers=4, in_channels=20, out_channels=20,
            freq_dim=256, text_dim=64, text_len=8, patch=(1, 1), eps=1e-6, image_dim=None, image_tokens=None,
            vae_stride=(4, 8), fps=8, default_size=(64, 64), grid=(8, 8),
            actions=("stay", "up", "down", "left", "right"),
        ),
    )
}  # fmt: skip
