"""The tensors behind the pages: keys and values of every frame that any session holds, by layer and page.

One allocation, which stays where it is unless the store may grow. Which page belongs to whom is for `PagePool` to
say. Pages may be kept in another dtype than the model's; then there is a small buffer in the model's, for one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.kv_pages import LIMITS, kv_pages
from ...kernels.qk_norm_rope_append import rope_cos_sin
from ...kernels.rope import axis_angles
from ...models.wan.spec import ModelSpec
from ..streams import Transfer, to_device
from .pages import PagePool

FP8 = torch.float8_e4m3fn
KV_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": FP8, "int8": torch.int8}


@dataclass(frozen=True)
class PageForm:
    """Sizes and dtypes of a page: grid of tokens (rows, columns), the model's dtype and that of the pages."""

    spec: ModelSpec
    grid: tuple[int, int]
    model: torch.dtype
    kept: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, heads, head dim."""
        return self.grid[0] * self.grid[1], self.spec.num_heads, self.spec.head_dim

    @property
    def scaled(self) -> bool:
        """Whether a page has a scale for each head."""
        return self.kept in LIMITS

    @property
    def staged(self) -> bool:
        """Whether keys and values are made in another dtype than they are kept in."""
        return self.kept != self.model

    @property
    def read_in_place(self) -> bool:
        """Whether attention reads pages as they are kept."""
        return self.kept in (self.model, FP8)

    @property
    def nbytes(self) -> int:
        """Of a page: keys and values of one latent frame in all layers, and their scales."""
        scales = self.spec.num_heads * torch.float32.itemsize if self.scaled else 0
        return 2 * self.spec.num_layers * (self.slot_bytes(self.kept) // 2 + scales)

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one latent frame in one layer."""
        return 2 * self.shape[0] * self.spec.dim * dtype.itemsize


class PagedStore:
    """kv: per layer [2, pages, page_tokens, heads, head_dim], keys then values; `pool` hands their pages out.

    scales: per layer float32 [2, pages, heads], or None. staging: [2, slots, ...] in the model's dtype, or None.
    rope_rows and rope_columns: rotations of the token grid, the same for every frame. users: caches that are open.
    """

    def __init__(self, form: PageForm, pages: int, slots: int, device: torch.device, grows: bool) -> None:
        self.form, self.device, self.grows = form, device, grows
        self.users = 0
        self.pool = PagePool(pages)
        self.transfer = Transfer(device)
        self.kv, self.scales = self._allocate(pages)
        self.staging = self._stage(slots) if form.staged else None
        _, self.rope_rows, self.rope_columns = self.turns([0])

    @property
    def nbytes(self) -> int:
        staging = [] if self.staging is None else [self.staging]
        return sum(tensor.nbytes for tensor in (*self.kv, *(self.scales or ()), *staging))

    def make_room(self, count: int) -> None:
        """Have `count` free pages, if the store may grow: it doubles at least, and its tensors move."""
        if self.grows and (missing := count - len(self.pool.free)) > 0:
            self.transfer.join()
            old, old_scales, held = self.kv, self.scales, self.pool.size
            more = max(missing, held)
            self.kv, self.scales = self._allocate(held + more)
            self.pool.grow(more)
            for new, before in zip((*self.kv, *(self.scales or ())), (*old, *(old_scales or ())), strict=True):
                new[:, :held] = before

    def slots(self, count: int) -> Tensor:
        """The staging buffer, of `count` slots at least; it moves when it has to grow."""
        assert self.staging is not None
        if self.staging.shape[1] < count:
            self.staging = self._stage(count)
        return self.staging

    def read(self, pages: list[int], host: bool = False) -> tuple[Tensor, Tensor | None]:
        """A copy of pages as they are kept, [layers, 2, n, page_tokens, heads, head_dim], and of their scales if any.

        On the host it is pinned, and may be under way still.
        """
        kv = self._copied(self.kv, pages, host)
        return kv, None if self.scales is None else self._copied(self.scales, pages, host)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy on the host, pinned where that helps, complete once `transfer` has been waited for."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        with self.transfer.beside():
            out.copy_(tensor, non_blocking=True)
        self.transfer.join()
        return out

    def write(self, pages: list[int], kv: Tensor, scales: Tensor | None) -> None:
        """Put into pages what `read` gave; ValueError for pages of another shape or dtype."""
        shape = (len(self.kv), 2, len(pages), *self.form.shape)
        if tuple(kv.shape) != shape or kv.dtype != self.form.kept or (scales is None) == self.form.scaled:
            raise ValueError(f"pages are {kv.dtype} {list(kv.shape)}; expected {self.form.kept} {list(shape)}")
        given = (*kv, *(scales if scales is not None else ()))
        for layer, part in zip((*self.kv, *(self.scales or ())), given, strict=True):
            raw(layer)[:, pages] = raw(part).to(self.device, non_blocking=True)

    def restored(self, pages: list[int], dtype: torch.dtype) -> Tensor:
        """A copy of pages in a float dtype, [layers, 2, n, page_tokens, heads, head_dim]."""
        out = torch.empty(len(self.kv), 2, len(pages), *self.form.shape, dtype=dtype, device=self.device)
        here, there = self.ints(pages), self.ints(list(range(len(pages))))
        for layer, target in enumerate(out):
            scale = None if self.scales is None else self.scales[layer]
            kv_pages(self.kv[layer], here, target, there, source_scale=scale)
        return out

    def replace(self, pages: list[int], kv: Tensor) -> None:
        """Put floats [layers, 2, n, page_tokens, heads, head_dim] into pages, in the dtype they are kept in."""
        here, there = self.ints(pages), self.ints(list(range(len(pages))))
        for layer, source in enumerate(kv):
            scale = None if self.scales is None else self.scales[layer]
            kv_pages(source, there, self.kv[layer], here, target_scale=scale)

    def turns(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations of frames at temporal positions, of rows and of columns, [n, pairs, 2] each."""
        angles = axis_angles(places, *self.form.grid, self.form.spec.head_dim)
        dtype = torch.float64 if self.form.model == torch.float64 else torch.float32
        time, row, column = (to_device(rope_cos_sin(axis, dtype), self.device) for axis in angles)
        return time, row, column

    def ints(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """int32, on the store's device."""
        return to_device(torch.tensor(values, dtype=torch.int32), self.device)

    def _copied(self, layers: list[Tensor], pages: list[int], host: bool) -> Tensor:
        shape = (len(layers), 2, len(pages), *layers[0].shape[2:])
        pinned = host and self.device.type == "cuda"
        out = torch.empty(shape, dtype=layers[0].dtype, device="cpu" if host else self.device, pin_memory=pinned)
        for layer, part in zip(layers, out, strict=True):
            raw(part).copy_(raw(layer)[:, pages], non_blocking=True)
        return out

    def _allocate(self, pages: int) -> tuple[list[Tensor], list[Tensor] | None]:
        form, layers = self.form, self.form.spec.num_layers
        kv = torch.zeros(layers, 2, pages, *form.shape, dtype=form.kept, device=self.device).unbind()
        if not form.scaled:
            return list(kv), None
        return list(kv), list(torch.zeros(layers, 2, pages, form.shape[1], device=self.device).unbind())

    def _stage(self, slots: int) -> Tensor:
        return torch.zeros(2, slots, *self.form.shape, dtype=self.form.model, device=self.device)


def raw(tensor: Tensor) -> Tensor:
    """The same memory as integers where torch cannot index the dtype."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
