"""KV cache of one branch in pages of a shared store; `ContiguousCache` is its plain reference.

Eviction edits the page table and a fork copies it; keys and values are not moved. The pages of a paused session can be
offloaded to host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InferixError
from ...graphs.paged_attention import PagedAttention
from ...graphs.passes import Pass
from ...graphs.staged_attention import StagedAttention
from ...graphs.tables import PassTables
from ...models.transformer import KeyValues
from ...schemes.context import ContextPolicy
from .offload import Offloaded
from .page_layout import GroupPages, fresh_pages, interleaved, layout_pass, parts_of, rotates_for_sink, through_slots
from .page_store import PagedStore
from .pages import PageTable
from .sink_average import average_frame


@dataclass(frozen=True)
class ExportedPages:
    """Copy of the cached frames of a branch.

    frames: in the order of their pages. positions: temporal position at which the keys of each written frame are
    stored. kv: [layers, 2, frames, page_tokens, heads, head_dim] in the dtype of the pages. scales: float32
    [layers, 2, frames, heads], or None. sink: sink averages [layers, 2, sink frames, page_tokens, heads, head_dim],
    or None.
    """

    frames: tuple[int, ...]
    positions: dict[int, int]
    kv: Tensor
    scales: Tensor | None
    sink: Tensor | None


class PagedCache:
    """Keys and values of one branch: a page table over `store`, under a context policy."""

    def __init__(self, store: PagedStore, table: PageTable, policy: ContextPolicy) -> None:
        self.store, self.table, self.policy = store, table, policy
        self.sink: Tensor | None = None  # averages [layers, 2, sink_size, page_tokens, heads, head_dim]
        self.last_offload: Offloaded | None = None
        self.open = True
        store.users += 1

    @property
    def frames(self) -> tuple[int, ...]:
        return self.table.frames if self.offloaded is None else self.offloaded.frames(self.table)

    @property
    def offloaded(self) -> Offloaded | None:
        """The pages in host memory; None while they are in the store."""
        return None if self.last_offload is None or self.last_offload.complete else self.last_offload

    @property
    def nbytes(self) -> int:
        """Bytes of the branch's pages, shared ones included."""
        return len(self.table.pages) * self.store.form.nbytes

    def set_window(self, frames: tuple[int, ...]) -> None:
        """Make `frames`, ascending, the cached frames: evict all others and allocate pages for new ones.

        Where the policy averages (`sink_decay` below 1), evicted frames are averaged into the sink first.
        """
        self._check_onloaded()
        leaving = self.table.frames_leaving(frames)
        if self.policy.sink_decay < 1 and leaving:
            self._average(leaving, self.table.pages_needed(frames))
        self.store.make_room(self.table.pages_needed(frames))
        self.table.set_window(frames)

    def clear(self) -> None:
        """Evict all frames."""
        self._check_onloaded()
        self.sink = None
        self.table.set_window(())

    def bind(self, run: Pass) -> KeyValues:
        """Return the attention of one pass over the pages; its scratch pages last until `end_pass`."""
        return self._attention(self._layout(run))

    def end_pass(self) -> None:
        """Free the scratch pages of the pass."""
        self.table.free_scratch()

    def rollback(self, first: int) -> None:
        """Roll back to before frame `first`: free its pages and all later ones."""
        self.table.drop_from(first)

    def fork(self) -> PagedCache:
        """Return a cache of the same frames in the same pages; either side copies a page before it writes it."""
        self._check_onloaded()
        other = PagedCache(self.store, self.table.copy(), self.policy)
        other.sink = self.sink
        return other

    def release(self) -> None:
        """Free all pages; a second call does nothing."""
        if self.open:
            if self.offloaded is not None:
                self.offloaded.discard(self.table)
            self.table.release()
            self.sink = self.last_offload = None
            self.open = False
            self.store.users -= 1

    def export_pages(self) -> ExportedPages:
        """Copy all cached frames, on the store's device, or in host memory if they are offloaded."""
        if self.offloaded is not None:
            kv, scales = self.offloaded.read(self.table)
        else:
            kv, scales = self.store.read(list(self.table.pages.values()))
        return ExportedPages(self.frames, dict(self.table.positions), kv, scales, self.sink)

    def import_pages(self, exported: ExportedPages) -> None:
        """Replace the cached frames by exported ones, in fresh pages; ValueError for another shape or dtype."""
        self.clear()
        self.set_window(exported.frames)
        self.table.positions |= exported.positions
        self.store.write(list(self.table.pages.values()), exported.kv, exported.scales)
        self.sink = None if exported.sink is None else exported.sink.to(self.store.device)

    def offload(self, *others: PagedCache) -> None:
        """Move the pages of this cache and `others` to host memory; shared pages are copied once.

        No pass can run until `onload`. Sink averages are moved too, and return when the next frame is averaged.
        """
        caches = [cache for cache in (self, *others) if cache.offloaded is None]
        sinks = {id(cache.sink): cache.sink for cache in caches if cache.sink is not None}
        hosted = {key: self.store.to_host(sink) for key, sink in sinks.items()}
        offloaded = Offloaded(self.store, [cache.table for cache in caches])
        for cache in caches:
            cache.last_offload, cache.sink = offloaded, hosted.get(id(cache.sink))

    def prefetch(self) -> None:
        """Start copying the pages back, ahead of `onload`; OutOfPages leaves them in host memory."""
        if self.offloaded is not None:
            self.offloaded.prefetch()

    def onload(self) -> None:
        """Copy the pages back, with those of the caches that were offloaded together."""
        if self.offloaded is not None:
            self.offloaded.onload()

    def _check_onloaded(self) -> None:
        if self.offloaded is not None:
            raise InferixError("the pages of this session are in host memory; resume it first")

    def _layout(self, run: Pass) -> list[GroupPages]:
        self._check_onloaded()
        self.store.make_room(fresh_pages(run, self.table))
        return layout_pass(run, self.table, self.policy.moving_positions)

    def _attention(self, rows: list[GroupPages]) -> KeyValues:
        store = self.store
        if not store.form.staged:
            return PagedAttention(
                self._parts(rows), store.kv, store.rope_rows, store.rope_columns, half_split=store.rope.half_split
            )
        own = [page for row in rows for page in row.pages]
        through = through_slots(rows, store.form.read_in_place)
        staging = store.slots(through.slots)
        return StagedAttention(
            self._parts(through.rows), store.kv, store.scales, staging,
            written=(store.ints(list(range(len(own)))), store.ints(own)),
            seen=None if through.seen is None else (store.ints(through.seen), store.ints(list(range(through.slots)))),
            rope_rows=store.rope_rows, rope_columns=store.rope_columns, half_split=store.rope.half_split,
        )  # fmt: skip

    def _average(self, leaving: list[int], pages_needed: int) -> None:
        """Average leaving frames into the sink and rewrite its pages; checks that `pages_needed` more are free."""
        frames = self.frames[: self.policy.sink_size]
        table, store = self.table, self.store
        needed = max(0, pages_needed) + table.count_shared(frames)
        store.make_room(needed)
        store.pool.require(needed)
        wide = torch.promote_types(store.form.model_dtype, torch.float32)
        sink_pages = [table.pages[frame] for frame in frames]
        old = store.restored(sink_pages, wide) if self.sink is None else self.sink.to(store.device, non_blocking=True)
        leaving_kv = store.restored([table.pages[frame] for frame in leaving], wide)
        self.sink = old  # still valid if a write below fails
        new = old.clone()  # forks may share the old one
        for frame, kv in zip(leaving, leaving_kv.unbind(2), strict=True):
            at = (frame - frames[0]) % len(frames)  # each frame goes to the sink frame of its phase
            (cos_sin,), *_ = store.rope_cos_sin([table.positions[frames[at]] - table.positions[frame]])
            new[:, :, at] = average_frame(new[:, :, at], kv, store.rope, cos_sin, self.policy.sink_decay)
        table.write(frames, [table.positions[frame] for frame in frames])
        store.replace([table.pages[frame] for frame in frames], new)
        self.sink = new

    def _parts(self, rows: list[GroupPages]) -> list[PassTables]:
        return [self._part(part) for part in parts_of(rows)]

    def _part(self, rows: list[GroupPages]) -> PassTables:
        ints, rope_cos_sin = self.store.ints, self.store.rope_cos_sin
        sinks = rotates_for_sink(self.policy, rows)
        width = max(self.table.room, *(len(row.listed) for row in rows))
        lists = [[(*pages, *(0,) * (width - len(pages))) for pages, _ in row.lists] for row in rows]
        counts = [[len(pages) for pages, _ in row.lists] for row in rows]
        early = [[count for _, count in row.lists] for row in rows]

        def by_list(values: Sequence[Sequence[Any]]) -> Tensor:
            return ints(values) if rows[0].head_lists else ints(values)[:, 0]

        return PassTables(
            pages=ints([row.pages for row in rows]),
            page_table=by_list(lists),
            page_count=by_list(counts),
            rope_time=torch.stack([rope_cos_sin(row.positions)[0] for row in rows]),
            rope_sink=torch.stack([rope_cos_sin(row.sink_positions)[0] for row in rows]) if sinks else None,
            sink_count=by_list(early) if sinks else None,
        )


def bind_together(caches: Sequence[PagedCache], passes: Sequence[Pass]) -> KeyValues:
    """Return the attention of one pass over several caches; call `end_pass` of each cache after it.

    The passes have groups of equal sizes, and the caches share a store. Caches are in the order of the batch dim.
    """
    first, *others = caches
    if not others:
        return first.bind(passes[0])
    return first._attention(interleaved([cache._layout(run) for cache, run in zip(caches, passes, strict=True)]))
