"""`Rope`: the rotary position embedding of a model, as its pages and graphs use it.

A token's angles are those of its frame, its row and its column, in float64 on the host. The kernel rotates interleaved
pairs over the whole width of a head; other forms run through `rope_append`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.qk_norm_rope_append.reference import rotated


@dataclass(frozen=True, eq=False)
class Rope:
    """Frequencies of the pairs of each axis, float64 on the host, and the channels that make a pair.

    time [a], rows [b], columns [c]: angle at position 1; they may be learned. The first 2 * (a + b + c) channels of a
    head are rotated, the rest are not. half_split: pairs are (j, j + a + b + c), not (2j, 2j + 1).
    """

    time: Tensor
    rows: Tensor
    columns: Tensor
    half_split: bool = False

    @property
    def pairs(self) -> tuple[int, int, int]:
        """Pairs that rotate with the frame, the row and the column."""
        return len(self.time), len(self.rows), len(self.columns)

    def places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions of the rows and of the columns of a token grid, float64: counted from 0."""
        return torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)

    def axis_angles(self, positions: Sequence[int], height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Angles of each pair by frame, row and column: float64 [F, a], [height, b], [width, c]."""
        rows, columns = self.places(height, width)
        frames = torch.tensor(positions, dtype=torch.float64)
        return torch.outer(frames, self.time), torch.outer(rows, self.rows), torch.outer(columns, self.columns)

    def rotate_time(self, keys: Tensor, cos_sin: Tensor) -> Tensor:
        """Rotate keys [..., head_dim] by cosines and sines [a, 2] of a distance in time; rows and columns stay."""
        own, pairs = len(cos_sin), sum(self.pairs)
        if not self.half_split:
            return torch.cat((turned(keys[..., : 2 * own], cos_sin, False), keys[..., 2 * own :]), dim=-1)
        one, between, other, rest = keys.split([own, pairs - own, own, keys.shape[-1] - pairs - own], dim=-1)
        first, second = turned(torch.cat((one, other), dim=-1), cos_sin, True).chunk(2, dim=-1)
        return torch.cat((first, between, second, rest), dim=-1)


def turned(x: Tensor, cos_sin: Tensor, half_split: bool) -> Tensor:
    """x [..., 2 * P] rotated by cosines and sines [P, 2], the same for every token."""
    return rotated(x[None, None], cos_sin[None, None], half_split)[0, 0]
