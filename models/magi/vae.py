"""MAGI-1's autoencoder: vision transformers over tiles of pictures. Modules have the names of the published tensors.

Tiles are half a second long and do not overlap in time, so a stream needs no state; overlapping sides are blended.
Shapes: B batch, N tokens of a tile and the class token, d width, n heads, c head width, z latent channels.
Source: MAGI-1 (arXiv 2505.13211); github.com/SandAI-org/MAGI-1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoder import Decoder, StreamState
from .vae_spec import SCALE, VitVaeSpec

STD_EPS, NORM_EPS = 1e-5, 1e-5


def standardised(x: Tensor) -> Tensor:
    """Zero mean and unit deviation over the channels of a head."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + STD_EPS)


class Attention(nn.Module):
    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.qkv, self.proj = nn.Linear(spec.dim, 3 * spec.dim), nn.Linear(spec.dim, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            standardised(part).transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(spec.dim, spec.ffn_dim), nn.Linear(spec.ffn_dim, spec.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """The attention has no norm before it; its queries, keys and values are normalised instead."""

    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(spec), FeedForward(spec)
        self.norm2 = nn.LayerNorm(spec.dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Layers over the tokens of a tile [B, T*H*W, d], with a class token and a learned position embedding."""

    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + spec.grid[0] * spec.grid[1] * spec.grid[2], spec.dim))
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = nn.LayerNorm(spec.dim, NORM_EPS)

    def layers(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [B, T*H*W, d] of a tile of `grid` after all layers."""
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]

    def positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Position embedding of a tile, resized where its grid is another."""
        if grid == self.grid:
            return self.pos_embed
        places = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        resized = F.interpolate(places, size=grid, mode="trilinear", align_corners=False)
        return torch.cat((self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)


class PatchEmbedding(nn.Module):
    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, spec.dim, spec.patch, spec.patch)


class Encoder(VisionTransformer):
    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__(spec)
        self.patch_embed = PatchEmbedding(spec)
        self.last_layer = nn.Linear(spec.dim, 2 * spec.z_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance [1, 2z, T, H, W] of the pictures of a tile [1, 3, 4T, 8H, 8W]."""
        x = self.patch_embed.proj(pixels)
        t, h, w = x.shape[2:]
        x = self.last_layer(self.layers(x.flatten(2).transpose(1, 2), (t, h, w)))
        return x.transpose(1, 2).unflatten(2, (t, h, w))


class TileDecoder(VisionTransformer):
    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__(spec)
        self.patch = spec.patch
        self.proj_in = nn.Linear(spec.z_dim, spec.dim)
        self.last_layer = nn.Conv3d(spec.channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures [1, 3, 4T, 8H, 8W] of the latents of a tile [1, z, T, H, W]; one of a single latent frame."""
        t, h, w = latents.shape[2:]
        x = self.layers(self.proj_in(latents.flatten(2).transpose(1, 2)), (t, h, w))
        x = x.unflatten(2, (*self.patch, -1)).unflatten(1, (t, h, w))  # [1, T, H, W, 4, 8, 8, channels]
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        pixels = self.last_layer(x)
        return pixels[:, :, :1] if t == 1 else pixels


class VitVae(Decoder):
    """Encodes and decodes tile by tile; the state only counts frames."""

    spec: VitVaeSpec
    name = "VitVae"

    def __init__(self, spec: VitVaeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.decoder = Encoder(spec), TileDecoder(spec)

    def encode(self, pixels: Tensor, state: StreamState) -> Tensor:
        """Encode pixels [T, 3, H, W] in [-1, 1], T a multiple of 4, to latents [F, z, H/8, W/8]: the posterior's mode.

        ValueError for another number of pictures.
        """
        spec, stride = self.spec, self.spec.spatial_stride
        if len(pixels) == 0 or len(pixels) % spec.temporal_stride:
            raise ValueError(f"{len(pixels)} frames cannot be encoded: expected a multiple of {spec.temporal_stride}")
        latents = []
        for part in pixels.transpose(0, 1)[None].split(spec.tile_frames * spec.temporal_stride, dim=2):
            rows = [
                [
                    self.encoder(part[..., stride * top : stride * bottom, stride * left : stride * right])
                    for left, right in spec.tiles(part.shape[4] // stride, 2)
                ]
                for top, bottom in spec.tiles(part.shape[3] // stride, 1)
            ]
            latents.append(blended(rows, spec, 1, in_place=True)[0, : spec.z_dim].transpose(0, 1))
        state.frames += sum(map(len, latents))
        return torch.cat(latents) * SCALE

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        """Decode latents [F, z, h, w] to pixels [T, 3, 8h, 8w] in [-1, 1].

        Tiles are counted from the first of these frames; one that has a single latent frame becomes a single picture.
        """
        spec, pixels = self.spec, []
        latents = latents.to(self.decoder.proj_in.weight.dtype)
        for part in (latents / SCALE).transpose(0, 1)[None].split(spec.tile_frames, dim=2):
            rows = [
                [self.decoder(part[..., top:bottom, left:right]) for left, right in spec.tiles(part.shape[4], 2)]
                for top, bottom in spec.tiles(part.shape[3], 1)
            ]
            pixels.append(blended(rows, spec, spec.spatial_stride, in_place=False)[0].transpose(0, 1))
        state.frames += len(latents)
        return torch.cat(pixels).clamp(-1, 1)


def blended(rows: list[list[Tensor]], spec: VitVaeSpec, scale: int, in_place: bool) -> Tensor:
    """Join tiles [1, C, T, h, w], whose sides overlap. scale: pixels of a latent pixel.

    in_place: a tile is blended with neighbours that were blended before.
    """
    tall, broad = (scale * (spec.grid[axis] - spec.tile_stride(axis)) for axis in (1, 2))
    height, width = (scale * spec.tile_stride(axis) for axis in (1, 2))
    result = [list(row) for row in rows]
    near = result if in_place else rows
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                tile = blend(near[i - 1][j], tile, tall, 3)
            if j > 0:
                tile = blend(near[i][j - 1], tile, broad, 4)
            result[i][j] = tile
    return torch.cat(
        [torch.cat([tile[..., :height, :width] for tile in row], dim=4) for row in result], dim=3
    )


def blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the end of one tile to the start of the next along a dim, linearly over `extent`."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    share = torch.arange(extent, dtype=tile.dtype, device=tile.device) / extent
    share = share.view(-1, *[1] * (tile.ndim - dim - 1))
    end, start = before.narrow(dim, before.shape[dim] - extent, extent), tile.narrow(dim, 0, extent)
    rest = tile.narrow(dim, extent, tile.shape[dim] - extent)
    return torch.cat((end * (1 - share) + start * share, rest), dim=dim)


