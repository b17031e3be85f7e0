"""A pass divided over ranks: each rank runs the network on a tile of every frame, and attention exchanges tokens.

Ranks of a pass are a grid, tokens x heads. Along `heads`, each rank has the pages of some heads, of all tokens of its
row: queries, keys and values go to the ranks of their heads in one all-to-all, and results return in another (Ulysses).
Along `tokens`, each rank has the pages of some tokens: queries go to all ranks, and partial results return to be merged
by their log-sum-exp (pass-Q). A grid of one row, or of one column, is one of these alone.

The eager runtime and the tracer call the same functions, so both run the same ops. Keys and values never travel twice.
Source: DeepSpeed-Ulysses (arXiv 2309.14509); Context Parallelism (arXiv 2411.01783) for pass-Q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.block_attention import block_attention, merge_partials
from ..kernels.collectives import all_gather, all_to_all
from .paged_attention import PagedAttention, append
from .staged_attention import StagedAttention
from .tables import PassTables
from .tiles import Grid, shares, tiles_of

OnPages = PagedAttention | StagedAttention


@dataclass(frozen=True)
class Axis:
    """One dimension of a grid of ranks. size; place: this rank's; group: number of the `RankGroup` along it."""

    size: int = 1
    place: int = 0
    group: int = 0


NONE = Axis()  # of one rank


@dataclass(frozen=True)
class Stage:
    """Ranks that hold consecutive layers each. size; place: this rank's, in the order of layers.

    before, after: numbers of the groups of two, with the rank whose layers come before and with that of those after.
    group: number of the `RankGroup` of all.
    """

    size: int = 1
    place: int = 0
    before: int = 0
    after: int = 0
    group: int = 0

    def layers(self, count: int) -> range:
        """This rank's layers, of `count` in all."""
        starts = [0, *accumulate(shares(count, self.size))]
        return range(starts[self.place], starts[self.place + 1])


WHOLE = Stage()  # all layers


@dataclass(frozen=True)
class Shard:
    """A rank's part of every pass.

    heads, tokens: of pages that ranks divide. group: number of the `RankGroup` of all ranks of a pass, whose rank is
    tokens.place * heads.size + heads.place. branches: of guidance, each run by ranks of its own. weights: ranks that
    divide the large matrices. columns: all ranks, where they divide the pictures that are decoded.
    stage: of ranks that hold the layers, in place of parts of each.
    every: number of the group of all ranks of the world.
    """

    heads: Axis = NONE
    tokens: Axis = NONE
    group: int = 0
    branches: Axis = NONE
    weights: Axis = NONE
    columns: Axis = NONE
    stage: Stage = WHOLE
    every: int = 0

    @property
    def ranks(self) -> int:
        """Ranks of one pass."""
        return self.heads.size * self.tokens.size

    @property
    def groups(self) -> set[int]:
        """Numbers of all its groups; 0 for none."""
        axes = (self.heads, self.tokens, self.weights, self.columns)
        own = {self.group, self.every, self.stage.before, self.stage.after, self.stage.group}
        return own | {axis.group for axis in axes}

    @property
    def runs_alone(self) -> bool:
        """True if this rank computes whole passes by itself."""
        return self.ranks == self.stage.size == 1

    def regions(self, grid: Grid) -> Tiles:
        """Parts of a frame's tokens whose pages are on different ranks."""
        return Tiles(*tiles_of(grid, self.tokens.size), self.tokens.place)

    def tiles(self, grid: Grid) -> Tiles:
        """Tiles of a region, one for each rank that has pages of its tokens. grid: of a whole frame."""
        return Tiles(*tiles_of(self.regions(grid).part(grid), self.heads.size), self.heads.place)

    def cut(self, x: Tensor, patch: tuple[int, int]) -> Tensor:
        """The rank's part of latents, or of other channels of them, [..., H, W]. patch: (height, width) of a token."""
        grid = x.shape[-2] // patch[0], x.shape[-1] // patch[1]
        return self.tiles(grid).cut(self.regions(grid).cut(x))


ALONE = Shard()


@dataclass(frozen=True)
class Tiles:
    """A token grid cut into rows x columns equal tiles, numbered row by row. number: of this rank's."""

    rows: int
    columns: int
    number: int

    @property
    def place(self) -> tuple[int, int]:
        """Row and column of the rank's tile."""
        return divmod(self.number, self.columns)

    def part(self, grid: Grid) -> Grid:
        """Rows and columns of tokens of a tile."""
        return grid[0] // self.rows, grid[1] // self.columns

    def corner(self, grid: Grid) -> tuple[int, int]:
        """Row and column of the first token of the rank's tile."""
        (row, column), (height, width) = self.place, self.part(grid)
        return row * height, column * width

    def cut(self, x: Tensor) -> Tensor:
        """The rank's tile of latents [..., H, W]."""
        size = x.shape[-2], x.shape[-1]
        (top, left), (height, width) = self.corner(size), self.part(size)
        return x[..., top : top + height, left : left + width]

    def tokens(self, parts: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, F*H*W, ...] in the order of the picture from those of all tiles [tiles, B, F*h*w, ...]."""
        tiled = parts.unflatten(2, (-1, *self.part(grid))).unflatten(0, (self.rows, self.columns))
        return tiled.movedim((0, 1), (2, 4)).flatten(1, 5)  # [B, F, rows, h, columns, w, ...]

    def split(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens of all tiles [tiles, B, F*h*w, ...] from tokens [B, F*H*W, ...] in the order of the picture."""
        height, width = self.part(grid)
        tiled = x.unflatten(1, (-1, self.rows, height, self.columns, width))
        return tiled.movedim((2, 4), (0, 1)).flatten(3, 5).flatten(0, 1)


@dataclass(frozen=True)
class HeadShards:
    """`KeyValues` of one rank: tokens of its tile in, attention over its heads of its region between two exchanges.

    inner: over the pages of the rank's heads. axis: ranks that have the region's pages. tiles: of the region, whose
    (rows, columns) of tokens are `grid`.
    """

    inner: OnPages | TokenShards
    axis: Axis
    tiles: Tiles
    grid: Grid

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Exchange, attend over the rank's heads, exchange back; tokens of the tile, q [B, t, n, c], k, v [B, t, k, c].

        Queries travel before their rotation: where the sink needs them rotated twice, they travel once.
        """
        ranks, tiles, group = self.axis.size, self.tiles, self.axis.group
        packed = torch.cat([part.unflatten(2, (ranks, -1)) for part in (q, k, v)], dim=3)
        received = all_to_all(packed.movedim(2, 0), group=group)  # [ranks, B, t, heads, c]
        own = tiles.tokens(received, self.grid)
        heads, kv_heads = q.shape[2] // ranks, k.shape[2] // ranks
        out = self.inner.attend(layer, *own.split([heads, kv_heads, kv_heads], dim=2))
        returned = all_to_all(tiles.split(out, self.grid), group=group)  # [ranks, B, t, heads, c]
        return returned.movedim(0, 2).flatten(2, 3)


@dataclass(frozen=True)
class TokenShards:
    """`KeyValues` of one rank: all queries attend to the rank's tokens of each page, and partial results are merged.

    inner: over pages of the region's tokens, with the region's rows and columns of the rotation. axis: ranks that have
    the pages of the other regions. Every rank lists the same pages, so a page table is that of one rank.
    """

    inner: PagedAttention
    axis: Axis

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append the region's keys and values; attend with the queries of all regions; merge. q [B, t, n, c]."""
        inner, kv = self.inner, self.inner.kv[layer]
        queries = append(
            inner.parts, q, k, v, inner.rope_rows, inner.rope_columns, kv, None, inner.half_split
        )  # all parts are written before any attends
        out = [
            self.merged(part, rotated, sink, kv).reshape(len(q), -1, *q.shape[2:])
            for part, (rotated, sink) in zip(inner.parts, queries, strict=True)
        ]
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def merged(self, part: PassTables, rotated: Tensor, sink: Tensor | None, kv: Tensor) -> Tensor:
        """Attention of a part's queries [R, t, n, c] over the tokens of all ranks."""
        wide = torch.promote_types(rotated.dtype, torch.float32)
        q, q_sink = self.gathered(rotated), None if sink is None else self.gathered(sink)
        rows, tokens, heads, _ = q.shape
        lse = torch.empty(rows, heads, tokens, dtype=wide, device=q.device)
        partial = block_attention(
            q, kv, part.page_table, part.page_count, q_sink=q_sink, sink_count=part.sink_count, lse=lse
        )
        with_lse = torch.cat((partial.to(wide), lse.transpose(1, 2)[..., None]), dim=3)
        by_rank = with_lse.unflatten(1, (self.axis.size, -1)).movedim(1, 0)
        outs, lses = all_to_all(by_rank, group=self.axis.group).split([q.shape[3], 1], dim=4)
        return merge_partials(outs, lses[..., 0].transpose(2, 3)).to(rotated.dtype)

    def gathered(self, q: Tensor) -> Tensor:
        """Queries [R, ranks * t, n, c] of all regions, rank by rank."""
        every = all_gather(q, ranks=self.axis.size, group=self.axis.group)
        return every.movedim(0, 1).flatten(1, 2)


def run_on_ranks(
    forward: Callable[..., Tensor],
    shard: Shard,
    patch: tuple[int, int],
    positions: tuple[int, int] | None,
    latents: Tensor,
    attention: OnPages,
) -> Tensor:
    """The velocity [B, F, C, H, W] of latents [B, F, C, H, W], computed by all ranks of a shard.

    forward: the network on the rank's tile, of (latents, attention, origin) as a model's forward takes them. patch:
    (height, width) of a token; positions: (rows, columns) of a learned position embedding, or None.
    """
    if shard.stage.size > 1:  # that of the last rank; before it a rank runs its head on what it has
        return all_gather(forward(latents, attention), ranks=shard.stage.size, group=shard.stage.group)[-1]
    if shard.ranks == 1:
        return forward(latents, attention)
    grid = latents.shape[-2] // patch[0], latents.shape[-1] // patch[1]
    regions, tiles = shard.regions(grid), shard.tiles(grid)
    region = regions.part(grid)
    inner: OnPages | TokenShards = attention
    if shard.tokens.size > 1:
        assert isinstance(attention, PagedAttention)
        inner = TokenShards(attention, shard.tokens)
    kv = HeadShards(inner, shard.heads, tiles, region) if shard.heads.size > 1 else inner
    origin = None
    if positions is not None:  # the picture is in the middle of the position grid
        corners = zip(positions, grid, regions.corner(grid), tiles.corner(region), strict=True)
        top, left = ((most - size) // 2 + outer + inside for most, size, outer, inside in corners)
        origin = top, left
    velocity = forward(shard.cut(latents, patch), kv, origin)
    parts = all_gather(patches(velocity, patch), ranks=shard.ranks, group=shard.group)  # [ranks, B, t, ...]
    by_tile = parts.unflatten(0, (shard.tokens.size, shard.heads.size)).movedim(1, 0).flatten(1, 2)
    by_region = tiles.tokens(by_tile, region).unflatten(0, (shard.tokens.size, -1))
    return pictures(regions.tokens(by_region, grid), patch, grid)


def patches(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Tokens [B, F*h*w, ph*pw*C], channels fastest, of [B, F, C, H, W]."""
    tiled = x.unflatten(-1, (-1, patch[1])).unflatten(-3, (-1, patch[0]))  # [B, F, C, h, ph, w, pw]
    return tiled.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)


def pictures(tokens: Tensor, patch: tuple[int, int], grid: Grid) -> Tensor:
    """[B, F, C, H, W] of tokens [B, F*h*w, ph*pw*C]: the end of a network, to which a solver step is fused."""
    x = tokens.unflatten(-1, (*patch, -1)).unflatten(1, (-1, *grid))
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
