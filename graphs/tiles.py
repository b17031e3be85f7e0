"""Equal tiles of a token grid, as numbers."""

from __future__ import annotations

Grid = tuple[int, int]  # rows and columns


def tiles_of(grid: Grid, count: int) -> Grid:
    """(rows, columns) of `count` equal tiles of a token grid; as many rows as possible.

    ValueError where the grid has none.
    """
    for rows in range(count, 0, -1):
        if count % rows == 0 and grid[0] % rows == 0 and grid[1] % (count // rows) == 0:
            return rows, count // rows
    raise ValueError(f"a grid of {grid[0]} x {grid[1]} tokens has no {count} equal tiles")


def nested_tiles(grid: Grid, outer: int, inner: int) -> tuple[Grid, Grid]:
    """`outer` equal tiles of a token grid, and `inner` equal tiles of each of these; ValueError as `tiles_of`."""
    first = tiles_of(grid, outer)
    return first, tiles_of((grid[0] // first[0], grid[1] // first[1]), inner)


def shares(count: int, ranks: int) -> list[int]:
    """Parts of `count` things, in numbers as equal as can be; the first ranks have one more."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]
