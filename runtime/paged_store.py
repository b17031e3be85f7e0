"""The tensors behind the pages: keys and values of every frame that any session holds, by layer and page.

One allocation, which stays where it is unless the store may grow. Which page belongs to whom is for `PagePool` to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.qk_norm_rope_append import turns_of
from ..kernels.rope import axis_angles
from ..models.wan.spec import ModelSpec
from .pages import PagePool


class PagedStore:
    """kv: per layer [2, pages, page_tokens, heads, head_dim], keys then values; `pool` hands their pages out.

    row_turns and column_turns: rotations of the token grid, the same for every frame.
    """

    def __init__(
        self, spec: ModelSpec, grid: tuple[int, int], pages: int, dtype: torch.dtype, device: torch.device, grows: bool
    ) -> None:
        self.spec, self.grid, self.dtype, self.device, self.grows = spec, grid, dtype, device, grows
        self.pool = PagePool(pages)
        self.kv = self._allocate(pages)
        _, self.row_turns, self.column_turns = self.turns([0])

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.spec, self.grid, self.dtype)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kv)

    def make_room(self, count: int) -> None:
        """Have `count` free pages, if the store may grow: it doubles at least, and its tensors move."""
        if self.grows and (missing := count - len(self.pool.free)) > 0:
            old, held = self.kv, self.pool.size
            self.pool.grow(max(missing, held))
            self.kv = self._allocate(self.pool.size)
            for new, before in zip(self.kv, old, strict=True):
                new[:, :held] = before

    def read(self, pages: list[int]) -> Tensor:
        """A copy of pages, [layers, 2, n, page_tokens, heads, head_dim]."""
        return torch.stack([layer[:, pages] for layer in self.kv])

    def write(self, pages: list[int], kv: Tensor) -> None:
        """Put into pages what `read` gave; ValueError for pages of another shape or dtype."""
        shape = (len(self.kv), 2, len(pages), *self.kv[0].shape[2:])
        if tuple(kv.shape) != shape or kv.dtype != self.dtype:
            raise ValueError(f"pages are {kv.dtype} {list(kv.shape)}; expected {self.dtype} {list(shape)}")
        for layer, part in zip(self.kv, kv, strict=True):
            layer[:, pages] = part.to(self.device)

    def turns(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations of frames at temporal positions, of rows and of columns, [n, pairs, 2] each."""
        time, row, column = axis_angles(places, *self.grid, self.spec.head_dim)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        time, row, column = (turns_of(axis, dtype).to(self.device) for axis in (time, row, column))
        return time, row, column

    def _allocate(self, pages: int) -> list[Tensor]:
        tokens = self.grid[0] * self.grid[1]
        shape = (self.spec.num_layers, 2, pages, tokens, self.spec.num_heads, self.spec.head_dim)
        return list(torch.zeros(shape, dtype=self.dtype, device=self.device).unbind())


def page_bytes(spec: ModelSpec, grid: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of one latent frame in all layers."""
    return 2 * spec.num_layers * grid[0] * grid[1] * spec.dim * dtype.itemsize
