"""A pass divided over ranks: each rank runs the network on a tile of every frame, and attention exchanges tokens.

Layouts differ in the part of the cache that a rank has. `ulysses`: all tokens of some heads; queries, keys and values
go to the ranks of their heads in one all-to-all, and results return in another. `pass-q`: the tile's tokens of all
heads; queries go to all ranks, and partial results return to be merged by their log-sum-exp.

The eager runtime and the tracer call the same functions, so both run the same ops. Keys and values never travel twice.
Source: DeepSpeed-Ulysses (arXiv 2309.14509); Context Parallelism (arXiv 2411.01783) for pass-Q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.block_attention import block_attention, merge_partials
from ..kernels.collectives import all_gather, all_to_all
from .paged_attention import PagedAttention, append
from .staged_attention import StagedAttention
from .tables import PassTables

OnPages = PagedAttention | StagedAttention


@dataclass(frozen=True)
class Shard:
    """A rank's part of every pass.

    layout: `ulysses` or `pass-q`. group: number of its `RankGroup`; ranks: its size.
    """

    layout: str = "ulysses"
    ranks: int = 1
    rank: int = 0
    group: int = 0

    @property
    def head_shards(self) -> int:
        return self.ranks if self.layout == "ulysses" else 1

    @property
    def token_shards(self) -> int:
        return self.ranks if self.layout == "pass-q" else 1

    def tiles(self, grid: tuple[int, int]) -> Tiles:
        return Tiles(*tiles_of(grid, self.ranks), self.rank)


ALONE = Shard()


@dataclass(frozen=True)
class Tiles:
    """A token grid cut into rows x columns equal tiles, one for each rank, row by row. rank: whose tile this is."""

    rows: int
    columns: int
    rank: int

    @property
    def place(self) -> tuple[int, int]:
        """Row and column of the rank's tile."""
        return divmod(self.rank, self.columns)

    def origin(self, grid: tuple[int, int], positions: tuple[int, int] | None) -> tuple[int, int] | None:
        """Row and column of the tile's first token in a grid of `positions`, whose middle the picture takes."""
        if positions is None:
            return None
        (row, column), height, width = self.place, grid[0] // self.rows, grid[1] // self.columns
        return (positions[0] - grid[0]) // 2 + row * height, (positions[1] - grid[1]) // 2 + column * width

    def cut(self, x: Tensor) -> Tensor:
        """The rank's tile of latents [..., H, W]."""
        (row, column), height, width = self.place, x.shape[-2] // self.rows, x.shape[-1] // self.columns
        return x[..., row * height : (row + 1) * height, column * width : (column + 1) * width]

    def joined(self, parts: Tensor) -> Tensor:
        """Latents [..., H, W] from all tiles [ranks, ..., h, w]."""
        whole = parts.unflatten(0, (self.rows, self.columns)).movedim((0, 1), (-4, -2))  # [..., rows, h, columns, w]
        return whole.flatten(-2).flatten(-3, -2)

    def tokens(self, parts: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, F*H*W, ...] in the order of the picture from those of all tiles [ranks, B, F*h*w, ...]."""
        height, width = grid[0] // self.rows, grid[1] // self.columns
        tiled = parts.unflatten(2, (-1, height, width)).unflatten(0, (self.rows, self.columns))
        return tiled.movedim((0, 1), (2, 4)).flatten(1, 5)  # [B, F, rows, h, columns, w, ...]

    def split(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of all tiles [ranks, B, F*h*w, ...] from tokens [B, F*H*W, ...] in the order of the picture."""
        height, width = grid[0] // self.rows, grid[1] // self.columns
        tiled = x.unflatten(1, (-1, self.rows, height, self.columns, width))
        return tiled.movedim((2, 4), (0, 1)).flatten(3, 5).flatten(0, 1)


def tiles_of(grid: tuple[int, int], ranks: int) -> tuple[int, int]:
    """(rows, columns) of tiles that `ranks` ranks divide a token grid into; as many rows as possible.

    ValueError where the grid cannot be divided into equal tiles.
    """
    for rows in range(ranks, 0, -1):
        if ranks % rows == 0 and grid[0] % rows == 0 and grid[1] % (ranks // rows) == 0:
            return rows, ranks // rows
    raise ValueError(f"a grid of {grid[0]} x {grid[1]} tokens has no {ranks} equal tiles")


@dataclass(frozen=True)
class HeadShards:
    """`KeyValues` of one rank: tokens of its tile in, attention over its heads of all tokens between two exchanges.

    inner: over the pages of the rank's heads. grid: (rows, columns) of tokens of a whole frame.
    """

    inner: OnPages
    shard: Shard
    grid: tuple[int, int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Exchange, attend over the rank's heads, exchange back; tokens of the tile, q [B, t, n, c], k, v [B, t, k, c].

        Queries travel before their rotation: where the sink needs them rotated twice, they travel once.
        """
        ranks, tiles = self.shard.ranks, self.shard.tiles(self.grid)
        packed = torch.cat([part.unflatten(2, (ranks, -1)) for part in (q, k, v)], dim=3)
        received = all_to_all(packed.movedim(2, 0), group=self.shard.group)  # [ranks, B, t, heads, c]
        own = tiles.tokens(received, self.grid)
        heads, kv_heads = q.shape[2] // ranks, k.shape[2] // ranks
        out = self.inner.attend(layer, *own.split([heads, kv_heads, kv_heads], dim=2))
        returned = all_to_all(tiles.split(out, self.grid), group=self.shard.group)  # [ranks, B, t, heads, c]
        return returned.movedim(0, 2).flatten(2, 3)


@dataclass(frozen=True)
class TokenShards:
    """`KeyValues` of one rank: all queries attend to the rank's tokens of each page, and partial results are merged.

    inner: over pages of the tile's tokens, with the tile's rows and columns of the rotation. Every rank lists the same
    pages, so a page table is that of one rank.
    """

    inner: PagedAttention
    shard: Shard

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append the tile's keys and values; attend with the queries of all tiles; merge. q [B, t, n, c]."""
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
        ranks = self.shard.ranks
        with_lse = torch.cat((partial.to(wide), lse.transpose(1, 2)[..., None]), dim=3)
        by_rank = with_lse.unflatten(1, (ranks, -1)).movedim(1, 0)
        outs, lses = all_to_all(by_rank, group=self.shard.group).split([q.shape[3], 1], dim=4)
        return merge_partials(outs, lses[..., 0].transpose(2, 3)).to(rotated.dtype)

    def gathered(self, q: Tensor) -> Tensor:
        """Queries [R, ranks * t, n, c] of all tiles, rank by rank."""
        every = all_gather(q, ranks=self.shard.ranks, group=self.shard.group)
        return every.movedim(0, 1).flatten(1, 2)


def run_on_tile(
    forward: Callable[..., Tensor],
    shard: Shard,
    grid: tuple[int, int],
    positions: tuple[int, int] | None,
    latents: Tensor,
    attention: OnPages,
) -> Tensor:
    """The velocity [B, F, C, H, W] of latents [B, F, C, H, W], computed by all ranks of a shard.

    forward: the network on the rank's tile, of (latents, attention, origin) as a model's forward takes them. grid:
    (rows, columns) of tokens of a whole frame; positions: those of a learned position embedding, or None.
    """
    tiles = shard.tiles(grid)
    kv: HeadShards | TokenShards
    if shard.layout == "ulysses":
        kv = HeadShards(attention, shard, grid)
    else:
        assert isinstance(attention, PagedAttention)
        kv = TokenShards(attention, shard)
    velocity = forward(tiles.cut(latents), kv, tiles.origin(grid, positions))
    return tiles.joined(all_gather(velocity, ranks=shard.ranks, group=shard.group))
