"""A tile of a picture: one of equal rectangles of its token grid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The rectangle at (row, column) of `rows` x `columns` equal ones."""

    row: int
    rows: int
    column: int
    columns: int

    def origin(self, within: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """First row and column of the tile, of `size`, where its picture lies in the middle of a grid `within`."""
        top = (within[0] - size[0] * self.rows) // 2 + size[0] * self.row
        left = (within[1] - size[1] * self.columns) // 2 + size[1] * self.column
        return top, left


WHOLE = Tile(0, 1, 0, 1)
