"""Sizes and costs of MAGI-1's autoencoder: the published one, and a tiny one for tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..decoder import DecoderSpec

SCALE = 0.18215  # factor of the latents
PICTURES = 12  # of a tile, half a second


@dataclass(frozen=True)
class VitVaeSpec(DecoderSpec):
    """Sizes of two vision transformers, from pictures to latents and back, which run over overlapping tiles.

    patch: pictures, pixel rows and pixel columns of a latent pixel. grid: latent frames, rows and columns of the
    learned position embedding, resized for other tiles; its rows and columns are those of a tile.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]

    @property
    def temporal_stride(self) -> int:
        return self.patch[0]

    @property
    def spatial_stride(self) -> int:
        return self.patch[1]

    @property
    def encodes(self) -> bool:
        return True

    @property
    def tile_frames(self) -> int:
        """Latent frames of a tile, which is decoded at once; tiles do not overlap in time."""
        return PICTURES // self.temporal_stride

    @property
    def channels(self) -> int:
        """Channels of a pixel before the last convolution."""
        return self.dim // math.prod(self.patch)

    def tiles(self, length: int, axis: int) -> list[tuple[int, int]]:
        """(start, stop) of tiles along an axis of latents, 1 for rows, 2 for columns; a quarter of each overlaps."""
        tile = self.grid[axis]
        return [(start, min(start + tile, length)) for start in range(0, length, self.tile_stride(axis))]

    def tile_stride(self, axis: int) -> int:
        return self.grid[axis] * 3 // 4

    def tile_tokens(self, latent: tuple[int, int]) -> Iterator[int]:
        """Tokens of each tile of one latent frame, without the class token."""
        for top, bottom in self.tiles(latent[0], 1):
            for left, right in self.tiles(latent[1], 2):
                yield (bottom - top) * (right - left)

    @property
    def parameters(self) -> int:
        head = self.dim * 2 * self.z_dim + 2 * self.z_dim
        return self.decoding_parameters + self.body + self.patch_entries + self.dim + head

    @property
    def decoding_parameters(self) -> int:
        return self.body + self.z_dim * self.dim + self.dim + 3 * (27 * self.channels + 1)

    @property
    def body(self) -> int:
        """Parameters of the layers, the last norm, the class token and the position embedding of one of the two."""
        dim, ffn = self.dim, self.ffn_dim
        layer = dim * 3 * dim + 3 * dim + dim * dim + dim + 2 * dim + 2 * dim * ffn + ffn + dim
        return self.num_layers * layer + 2 * dim + dim + (1 + math.prod(self.grid)) * dim

    @property
    def patch_entries(self) -> int:
        return 3 * math.prod(self.patch) * self.dim

    def encoding_parts(self, pictures: int) -> range:
        return range(PICTURES, pictures, PICTURES)

    def state_entries(self, latent: tuple[int, int]) -> int:
        return 0

    def decode_flops(self, latent: tuple[int, int], first: bool = False) -> int:
        pixels = sum(self.tile_tokens(latent)) * math.prod(self.patch)
        last = 2 * 27 * self.channels * 3 * pixels
        return self.layer_flops(latent) + 2 * sum(self.tile_tokens(latent)) * self.z_dim * self.dim + last

    def encode_flops(self, latent: tuple[int, int]) -> int:
        """FLOPs of encoding the pictures of one latent frame."""
        per_token = self.patch_entries + 2 * self.z_dim * self.dim
        return self.layer_flops(latent) + 2 * sum(self.tile_tokens(latent)) * per_token

    def layer_flops(self, latent: tuple[int, int]) -> int:
        """FLOPs of the layers for one latent frame of full tiles; the class token is left out."""
        entries = self.num_layers * (4 * self.dim * self.dim + 2 * self.dim * self.ffn_dim)
        total = 0
        for tokens in self.tile_tokens(latent):
            total += 2 * tokens * entries + self.num_layers * 4 * tokens * tokens * self.tile_frames * self.dim
        return total

    def scratch_bytes(self, latent: tuple[int, int], frames: int, item: int, on_gpu: bool = False) -> int:
        tokens = self.tile_frames * max(self.tile_tokens(latent)) + 1
        tile = tokens * (8 * self.dim + 2 * self.ffn_dim + 4 * math.prod(self.patch) * (self.channels + 3))
        pictures = frames * math.prod(latent) * math.prod(self.patch) * 3
        return item * (tile + 4 * pictures)


VIT_VAE = VitVaeSpec(
    z_dim=16, dim=1024, num_layers=24, num_heads=16, ffn_dim=4096, patch=(4, 8, 8), grid=(4, 32, 32)
)  # fmt: skip
TINY_VIT_VAE = VitVaeSpec(
    z_dim=16, dim=256, num_layers=1, num_heads=4, ffn_dim=256, patch=(4, 8, 8), grid=(4, 8, 8)
)  # fmt: skip
