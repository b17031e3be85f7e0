"""Layouts of one world over several ranks: which fit a model, and the bytes that they send.

Integers only, for the engine before weights are loaded and for the planner before there is anything. Sizes are those of
a model and of the token grid of its pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import UsageError, nearest, quoted
from ..graphs.tiles import nested_tiles

HEADS, TOKENS, BRANCHES, LAYERS = "ulysses", "pass-q", "guidance", "layers"
JOINT = f"{HEADS}+{TOKENS}"
LAYOUTS = (HEADS, TOKENS, JOINT, BRANCHES, f"{BRANCHES}+{HEADS}", f"{BRANCHES}+{TOKENS}", LAYERS)
AUTO = "auto"
MOST_RANKS = 64


@dataclass(frozen=True)
class RankGrid:
    """Ranks of one world: branches of guidance x parts of tokens x parts of heads, heads fastest; or of layers."""

    heads: int = 1
    tokens: int = 1
    branches: int = 1
    layers: int = 1

    @property
    def tiles(self) -> int:
        """Ranks of one pass."""
        return self.heads * self.tokens

    @property
    def ranks(self) -> int:
        return self.branches * self.tiles * self.layers

    @property
    def layout(self) -> str:
        """Name of the layout, one of `LAYOUTS`."""
        parts = ((BRANCHES, self.branches), (HEADS, self.heads), (TOKENS, self.tokens), (LAYERS, self.layers))
        return "+".join(name for name, size in parts if size > 1)


@dataclass(frozen=True)
class Divided:
    """Counts that ranks divide: heads of queries, heads of keys and values, and a frame's tokens (rows, columns).

    branches: of guidance that can run beside each other; even: they take equally long. layers: of the network.
    """

    heads: int
    kv_heads: int
    grid: tuple[int, int]
    branches: int = 1
    even: bool = True
    layers: int = 1

    def against(self, grid: RankGrid) -> str | None:
        """Why ranks cannot be divided like that; None where they can."""
        rows, columns = self.grid
        if grid.layers > self.layers:
            return f"there are {self.layers} layers for {grid.layers} ranks"
        if grid.branches not in (1, self.branches):
            return f"guidance has {self.branches} branches that run beside each other"
        if self.heads % grid.heads or self.kv_heads % grid.heads:
            heads = f"{self.heads} heads" + (f" and {self.kv_heads} of keys" if self.kv_heads != self.heads else "")
            return f"{grid.heads} ranks do not divide {heads}"
        try:
            nested_tiles(self.grid, grid.tokens, grid.heads)
        except ValueError:
            return f"a frame of {rows} x {columns} tokens has no {grid.tiles} equal tiles"
        return None

    def grids(self, layout: str, ranks: int) -> Iterator[RankGrid]:
        """Grids of `ranks` ranks that a layout may have, the preferred one first, whether they fit or not."""
        parts = layout.split("+")
        branches = self.branches if BRANCHES in parts else 1
        tiles, rest = divmod(ranks, branches)
        if rest or (BRANCHES in parts and branches == 1):
            return
        if layout == JOINT:
            yield from (
                RankGrid(heads, tiles // heads, branches)
                for heads in range(tiles // 2, 1, -1) if tiles % heads == 0
            )  # fmt: skip
        elif HEADS in parts and (tiles > 1 or branches == 1):
            yield RankGrid(tiles, 1, branches)
        elif TOKENS in parts and (tiles > 1 or branches == 1):
            yield RankGrid(1, tiles, branches)
        elif layout == BRANCHES and tiles == 1:
            yield RankGrid(1, 1, branches)
        elif layout == LAYERS:
            yield RankGrid(layers=ranks)

    def grid_of(self, layout: str, ranks: int) -> RankGrid | None:
        """The grid of a layout on `ranks` ranks; None where it does not fit."""
        return next((grid for grid in self.grids(layout, ranks) if self.against(grid) is None), None)

    def reason_against(self, layout: str, ranks: int) -> str | None:
        """Why `ranks` ranks cannot have a layout; None where they can."""
        if self.grid_of(layout, ranks) is not None:
            return None
        reasons = [self.against(grid) for grid in self.grids(layout, ranks)]
        if reasons:
            return reasons[0]
        if BRANCHES in layout.split("+"):
            return f"guidance has {self.branches} branches that run beside each other"
        return f"{ranks} is no product of two numbers above 1"

    @property
    def preferred(self) -> tuple[str, ...]:
        """Layouts that `auto` takes, the first that fits: those that send less before those that send more.

        `layers` is not among them: its ranks run one after another.
        """
        by_branch = [layout for layout in LAYOUTS if BRANCHES in layout.split("+")]
        within = [HEADS, JOINT, TOKENS]
        return tuple([*by_branch, *within] if self.even and self.branches > 1 else within)

    def layouts(self, ranks: int) -> tuple[str, ...]:
        """Layouts that `ranks` ranks can have, the preferred ones first."""
        every = dict.fromkeys((*self.preferred, *LAYOUTS))
        return tuple(layout for layout in every if self.reason_against(layout, ranks) is None)

    def counts(self, layouts: Iterable[str] = LAYOUTS, most: int = MOST_RANKS) -> tuple[int, ...]:
        """Numbers of ranks from 2 on that one of the layouts fits."""
        return tuple(
            ranks for ranks in range(2, most + 1)
            if any(self.reason_against(layout, ranks) is None for layout in layouts)
        )  # fmt: skip


def choose_layout(divided: Divided, ranks: int, parallel: str = AUTO) -> RankGrid:
    """The grid of the layout that `parallel` names, or of the preferred one.

    UsageError, with the nearest that works, where it does not fit.
    """
    if parallel != AUTO and parallel not in LAYOUTS:
        raise UsageError(
            f"parallel is {quoted(parallel)}{nearest(parallel, (AUTO, *LAYOUTS))}; expected {AUTO}, "
            f"{', '.join(LAYOUTS)}"
        )
    wanted = divided.preferred if parallel == AUTO else (parallel,)
    grids = [grid for layout in wanted if (grid := divided.grid_of(layout, ranks)) is not None]
    if grids:
        return grids[0]
    reasons = [divided.reason_against(layout, ranks) for layout in wanted]
    against = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    advice = []
    if others := [layout for layout in divided.layouts(ranks) if layout not in wanted]:
        advice.append(f"give parallel={others[0]}, which fits {ranks}")
    if counts := divided.counts(wanted):
        near = sorted(counts, key=lambda count: (abs(count - ranks), count))[0]
        advice.append(f"give gpus={near}, the nearest that works with {' or '.join(wanted)}")
    advice = advice or ["give gpus=1"]
    raise UsageError(f"gpus is {ranks} with parallel={parallel}, but {against}; {', or '.join(advice)}")


def check_size(divided: Divided, grid: RankGrid) -> None:
    """UsageError for pictures that the ranks of a world cannot divide."""
    if (reason := divided.against(grid)) is not None:
        raise UsageError(f"size does not fit {grid.ranks} ranks with parallel={grid.layout}: {reason}; give another")


@dataclass(frozen=True)
class PassShape:
    """Sizes of one pass that decide what it sends.

    tokens: of all its frames. sinks: True where queries are rotated once more for the sink. velocity: entries of its
    result. batch: sessions, or branches of guidance, in the pass.
    """

    tokens: int
    sinks: bool
    velocity: int
    batch: int = 1


def bytes_sent(
    grid: RankGrid, shape: PassShape, divided: Divided, head_dim: int, layers: int, item: int, last_reads: bool = True,
    place: int = 0,
) -> int:  # fmt: skip
    """Bytes that one rank sends to all others of one pass.

    item: bytes of a number. last_reads: False where nothing reads the result of the last layer's attention. place: of
    the rank among those that hold layers.
    """
    if grid.layers > 1:
        tokens = shape.tokens * divided.heads * head_dim if place < grid.layers - 1 else 0
        return (tokens + (grid.layers - 1) * shape.velocity) * shape.batch * item
    tile, heads = shape.batch * shape.tokens // grid.tiles, divided.heads // grid.heads  # tokens and heads of a rank
    region, kv_heads = tile * grid.heads, divided.kv_heads // grid.heads
    entry, wide = head_dim * item, max(item, 4)
    there = (grid.heads - 1) * tile * (heads + 2 * kv_heads) * entry
    back = (grid.heads - 1) * tile * heads * entry
    queries = (grid.tokens - 1) * region * heads * entry * (1 + shape.sinks)
    partial = (grid.tokens - 1) * region * heads * (head_dim + 1) * wide
    velocity = (grid.tiles - 1) * shape.batch * shape.velocity // grid.tiles * item
    read = layers if last_reads else layers - 1
    return layers * there + read * (back + queries + partial) + velocity


def collectives(grid: RankGrid, layers: int, sinks: bool) -> int:
    """Collectives of one pass, one after another: two or three a layer and dimension of the grid, or one between two
    ranks that hold layers; and one for the velocity.
    """
    if grid.layers > 1:
        return grid.layers
    each = 2 * (grid.heads > 1) + (2 + sinks) * (grid.tokens > 1)
    return layers * each + (grid.tiles > 1)
