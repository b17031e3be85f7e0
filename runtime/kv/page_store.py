"""Page tensors: keys and values of the cached frames of all sessions, by layer and page.

The tensors are allocated once and do not move, unless the store grows. `PageSpace` says which pages are in use. Pages
can have another dtype than the model; then keys and values pass through a staging buffer of one layer in the model's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...graphs.paged_attention import PagedAttention
from ...graphs.shards import ALONE, Shard
from ...graphs.staged_attention import StagedAttention
from ...graphs.tables import PassTables
from ...kernels.dense_attention.run import Run, run_of
from ...kernels.kv_pages import LIMITS, kv_pages
from ...kernels.qk_norm_rope_append import rope_cos_sin
from ...models.rope import Rope
from ...models.spec import ModelSpec
from ...models.transformer import KeyValues
from ..plans import GroupPages, PassLayout
from ..streams import Transfer, to_device
from .page_layout import parts_of, rotates_for_sink, through_slots
from .table_slots import TableSlots

FP8 = torch.float8_e4m3fn
KV_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": FP8, "int8": torch.int8}


@dataclass(frozen=True)
class PageForm:
    """Sizes and dtypes of a rank's part of a page. grid: (rows, columns) of tokens of a whole frame."""

    spec: ModelSpec
    grid: tuple[int, int]
    model_dtype: torch.dtype
    kv_dtype: torch.dtype
    shard: Shard = ALONE

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens, heads of keys and values, head dim) of one frame on one rank."""
        tokens, heads = self.grid[0] * self.grid[1], self.spec.kv_heads
        return tokens // self.shard.tokens.size, heads // self.shard.heads.size, self.spec.head_dim

    @property
    def layers(self) -> int:
        """Layers on one rank."""
        return len(self.shard.stage.layers(self.spec.num_layers))

    @property
    def whole(self) -> PageForm:
        """The page of all ranks, as sessions are saved."""
        return replace(self, shard=ALONE)

    @property
    def scaled(self) -> bool:
        """True if a page has a scale for each head."""
        return self.kv_dtype in LIMITS

    @property
    def staged(self) -> bool:
        """True if pages have another dtype than the model, so that a pass writes through the staging buffer."""
        return self.kv_dtype != self.model_dtype

    @property
    def read_in_place(self) -> bool:
        """True if attention reads the pages directly, not a restored copy in the staging buffer."""
        return self.kv_dtype in (self.model_dtype, FP8)

    @property
    def nbytes(self) -> int:
        """Bytes of a page: keys and values of one latent frame in all layers of a rank, and their scales."""
        scales = self.shape[1] * torch.float32.itemsize if self.scaled else 0
        return 2 * self.layers * (self.slot_bytes(self.kv_dtype) // 2 + scales)

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one latent frame in one layer."""
        return 2 * math.prod(self.shape) * dtype.itemsize


WIDTH_STEP = 16  # pages
MAX_TABLES = 8  # layouts whose tables are kept: the branches of a few sessions


@dataclass(frozen=True)
class StoredTables:
    """Tables of one pass. written, seen: as of `StagedAttention`. slots: of the staging buffer; 0 without one.

    run: as of `PagedAttention`.
    """

    parts: list[PassTables]
    written: tuple[Tensor, Tensor] | None
    seen: tuple[Tensor, Tensor] | None
    slots: int
    run: Run | None

    @property
    def tensors(self) -> list[Tensor]:
        return [*(tensor for part in self.parts for tensor in part.tensors), *(self.written or ()), *(self.seen or ())]

    def moved(self, tensors: Sequence[Tensor]) -> StoredTables:
        """The same with other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        parts = [part.moved(rest) for part in self.parts]
        written, seen = (None if pair is None else (next(rest), next(rest)) for pair in (self.written, self.seen))
        return StoredTables(parts, written, seen, self.slots, self.run)


class PagedStore:
    """Owns the page tensors of one picture size.

    kv: per layer [2, pages, page_tokens, heads, head_dim], keys then values. scales: per layer float32
    [2, pages, heads], or None. staging: [2, slots, page_tokens, heads, head_dim] in the model's dtype, or None; it has
    `session_slots` for each session of the largest batch so far.
    rope_rows, rope_columns: cosines and sines of the token grid, [n, pairs, 2].
    """

    def __init__(
        self, form: PageForm, rope: Rope, pages: int, slots: int, device: torch.device, sessions: int = 1
    ) -> None:
        self.form, self.rope, self.device, self.session_slots = form, rope, device, slots
        self.transfer = Transfer(device)
        self.kv, self.scales = self._allocate(pages)
        self.staging = self._stage(sessions * slots) if form.staged else None
        self.tables: dict[Hashable, StoredTables] = {}
        self.slots_of_tables = TableSlots(device, MAX_TABLES)
        self.rope_rows, self.rope_columns = self._rope_of_tokens()

    @property
    def nbytes(self) -> int:
        staging = [] if self.staging is None else [self.staging]
        return sum(tensor.nbytes for tensor in (*self.kv, *(self.scales or ()), *staging))

    def grow(self, pages: int) -> None:
        """Grow to `pages` pages; the tensors move."""
        self.transfer.join()
        old, old_scales, size = self.kv, self.scales, self.kv[0].shape[1]
        self.kv, self.scales = self._allocate(pages)
        for new, before in zip((*self.kv, *(self.scales or ())), (*old, *(old_scales or ())), strict=True):
            new[:, :size] = before

    def attention(self, layout: PassLayout, sessions: int = 1) -> KeyValues:
        """The attention of one pass of one or several sessions, whose frames are listed by page.

        The staging buffer has room for all that they can see later on, so that it does not move as windows fill.
        """
        tables, half_split = self._tables(layout, sessions), self.rope.half_split
        if not self.form.staged:
            return PagedAttention(
                tables.parts, self.kv, self.rope_rows, self.rope_columns, half_split=half_split, run=tables.run
            )
        assert tables.written is not None
        return StagedAttention(
            tables.parts, self.kv, self.scales, self.slots(tables.slots), written=tables.written, seen=tables.seen,
            rope_rows=self.rope_rows, rope_columns=self.rope_columns, half_split=half_split,
        )  # fmt: skip

    def _tables(self, layout: PassLayout, sessions: int) -> StoredTables:
        """Tables of a pass; those of the last passes are kept, since the steps of a block have the same."""
        key = layout.rotates_sink, layout.width, layout.rows, sessions
        if key not in self.tables:
            if len(self.tables) >= MAX_TABLES:
                del self.tables[next(iter(self.tables))]
            self.tables[key] = self._made(layout, sessions)
        return self.tables[key]

    def _made(self, layout: PassLayout, sessions: int) -> StoredTables:
        """Make the tables of a pass on the host and copy them to the device together."""
        rows, written, seen, slots = layout.rows, None, None, 0
        if self.form.staged:
            own = [page for row in rows for page in row.pages]
            through = through_slots(rows, self.form.read_in_place)
            rows, slots = tuple(through.rows), max(through.slots, sessions * self.session_slots)
            written = host_ints(list(range(len(own)))), host_ints(own)
            if through.seen is not None:
                count = through.slots if self.device.type == "cpu" else slots  # all, so that a graph reads them as is
                pages = through.seen + [0] * (count - through.slots)  # page 0 into slots that nothing reads
                seen = host_ints(pages), host_ints(list(range(count)))
        divided = [lists_of_rank(row, self.form.shard) for row in rows]
        width = padded_width(max(layout.width, *(len(row.listed) for row in divided)))
        parts = [self._part(layout.rotates_sink, part, width) for part in parts_of(divided)]
        host = StoredTables(parts, written, seen, slots, full_run(layout))
        return host.moved(self.slots_of_tables.put(host.tensors))

    def _part(self, rotates_sink: bool, rows: list[GroupPages], width: int) -> PassTables:
        ints, sinks = host_ints, rotates_for_sink(rotates_sink, rows)
        lists = [[(*pages, *(0,) * (width - len(pages))) for pages, _ in row.lists] for row in rows]
        counts = [[len(pages) for pages, _ in row.lists] for row in rows]
        early = [[count for _, count in row.lists] for row in rows]

        def by_list(values: Sequence[Sequence[Any]]) -> Tensor:
            return ints(values) if rows[0].head_lists else ints(values)[:, 0]

        return PassTables(
            pages=ints([row.pages for row in rows]),
            page_table=by_list(lists),
            page_count=by_list(counts),
            rope_time=torch.stack([self._angles(row.positions)[0] for row in rows]),
            rope_sink=torch.stack([self._angles(row.sink_positions)[0] for row in rows]) if sinks else None,
            sink_count=by_list(early) if sinks else None,
        )

    def slots(self, count: int) -> Tensor:
        """Return the staging buffer with at least `count` slots; it moves if it grows."""
        assert self.staging is not None
        if self.staging.shape[1] < count:
            self.staging = self._stage(count)
        return self.staging

    def read(self, pages: list[int], host: bool = False) -> tuple[Tensor, Tensor | None]:
        """Copy pages [layers, 2, n, page_tokens, heads, head_dim], in the dtype of the pages, and their scales.

        host: copy to host memory, pinned on a GPU. The copy is complete after `transfer.wait()`.
        """
        kv = self._copied(self.kv, pages, host)
        return kv, None if self.scales is None else self._copied(self.scales, pages, host)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy to host memory, pinned on a GPU. The copy is complete after `transfer.wait()`."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        with self.transfer.beside():
            out.copy_(tensor, non_blocking=True)
        self.transfer.join()
        return out

    def write(self, pages: list[int], kv: Tensor, scales: Tensor | None) -> None:
        """Write pages that `read` copied; ValueError for another shape or dtype."""
        shape = (len(self.kv), 2, len(pages), *self.form.shape)
        if tuple(kv.shape) != shape or kv.dtype != self.form.kv_dtype or (scales is None) == self.form.scaled:
            raise ValueError(f"pages are {kv.dtype} {list(kv.shape)}; expected {self.form.kv_dtype} {list(shape)}")
        given = (*kv, *(scales if scales is not None else ()))
        for layer, part in zip((*self.kv, *(self.scales or ())), given, strict=True):
            raw(layer)[:, pages] = raw(part).to(self.device, non_blocking=True)

    def restored(self, pages: list[int], dtype: torch.dtype) -> Tensor:
        """Copy pages [layers, 2, n, page_tokens, heads, head_dim] into float `dtype`, with scales applied."""
        out = torch.empty(len(self.kv), 2, len(pages), *self.form.shape, dtype=dtype, device=self.device)
        here, there = self.ints(pages), self.ints(list(range(len(pages))))
        for layer, target in enumerate(out):
            scale = None if self.scales is None else self.scales[layer]
            kv_pages(self.kv[layer], here, target, there, source_scale=scale)
        return out

    def replace(self, pages: list[int], kv: Tensor) -> None:
        """Write floats [layers, 2, n, page_tokens, heads, head_dim] into pages, quantised to their dtype."""
        here, there = self.ints(pages), self.ints(list(range(len(pages))))
        for layer, source in enumerate(kv):
            scale = None if self.scales is None else self.scales[layer]
            kv_pages(source, there, self.kv[layer], here, target_scale=scale)

    def rope_cos_sin(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines [n, pairs, 2] of temporal `positions`, of grid rows and of grid columns."""
        time, row, column = (to_device(axis, self.device) for axis in self._angles(positions))
        return time, row, column

    def _angles(self, positions: Sequence[int]) -> list[Tensor]:
        """`rope_cos_sin` on the host."""
        dtype = torch.float64 if self.form.model_dtype == torch.float64 else torch.float32
        return [rope_cos_sin(axis, dtype) for axis in self.rope.axis_angles(positions, *self.form.grid)]

    def _rope_of_tokens(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the grid's rows and columns, of those that the rank has tokens of."""
        _, rows, columns = self.rope_cos_sin([0])
        if self.form.shard.tokens.size == 1:
            return rows, columns
        regions = self.form.shard.regions(self.form.grid)
        row, column = regions.place
        return rows.chunk(regions.rows)[row].contiguous(), columns.chunk(regions.columns)[column].contiguous()

    def ints(self, values: Sequence[Any]) -> Tensor:
        """An int32 tensor on the store's device."""
        return to_device(host_ints(values), self.device)

    def _copied(self, layers: list[Tensor], pages: list[int], host: bool) -> Tensor:
        shape = (len(layers), 2, len(pages), *layers[0].shape[2:])
        pinned = host and self.device.type == "cuda"
        out = torch.empty(shape, dtype=layers[0].dtype, device="cpu" if host else self.device, pin_memory=pinned)
        for layer, part in zip(layers, out, strict=True):
            raw(part).copy_(raw(layer)[:, pages], non_blocking=True)
        return out

    def _allocate(self, pages: int) -> tuple[list[Tensor], list[Tensor] | None]:
        form, layers = self.form, self.form.layers
        kv = torch.zeros(layers, 2, pages, *form.shape, dtype=form.kv_dtype, device=self.device).unbind()
        if not form.scaled:
            return list(kv), None
        return list(kv), list(torch.zeros(layers, 2, pages, form.shape[1], device=self.device).unbind())

    def _stage(self, slots: int) -> Tensor:
        return torch.zeros(2, slots, *self.form.shape, dtype=self.form.model_dtype, device=self.device)


def full_run(layout: PassLayout) -> Run | None:
    """Pages that a pass of one group reads, where they are one run and all that its session will hold in the end.

    None for any other pass, and where queries are rotated for a sink. The run of a window that still grows changes with
    each block, so that a program which holds its addresses would be of use once.
    """
    row, *others = layout.rows
    if others or row.head_lists or layout.rotates_sink or row.sinks or len(row.listed) != layout.width:
        return None
    return run_of(row.listed)


def lists_of_rank(row: GroupPages, shard: Shard) -> GroupPages:
    """The lists of pages that a rank's heads read, of those of all groups of heads."""
    axis = shard.heads
    if not row.head_lists or axis.size == 1:
        return row
    each, rest = divmod(len(row.head_lists), axis.size)
    if each and not rest:
        return replace(row, head_lists=row.head_lists[axis.place * each : (axis.place + 1) * each])
    listed, sinks = row.head_lists[axis.place * len(row.head_lists) // axis.size]
    return replace(row, listed=listed, sinks=sinks, head_lists=())


def host_ints(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def padded_width(listed: int) -> int:
    """Columns of a page table whose rows list up to `listed` pages: a growing window seldom needs a wider one."""
    return -(-listed // WIDTH_STEP) * WIDTH_STEP


def raw(tensor: Tensor) -> Tensor:
    """View of the same memory as uint8 for FP8, which torch cannot index."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
