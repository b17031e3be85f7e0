"""KV cache of one branch in pages of a shared store; `ContiguousCache` is its plain reference.

Eviction edits the page table and a fork copies it; keys and values are not moved. The pages of a paused session can be
offloaded to host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...errors import InferixError
from ...graphs.passes import Pass
from ...schemes.context import ContextPolicy
from ..plans import (
    AverageSink,
    LoadSink,
    OffloadSink,
    PassLayout,
    ReadPages,
    ReadSink,
    SetSink,
    WritePages,
    WriteSink,
)
from ..worker_client import Handle
from .offload import Offloaded
from .page_layout import fresh_pages, interleaved, layout_pass
from .page_space import PageSpace
from .pages import PageTable


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

    def __init__(self, store: PageSpace, table: PageTable, policy: ContextPolicy) -> None:
        self.store, self.table, self.policy = store, table, policy
        self.grid, self.client = store.form.grid, store.client
        self.sink: Handle | None = None  # averages, which forks share
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

    def layout(self, run: Pass) -> PassLayout:
        """Lay one pass out over the pages; its scratch pages last until `end_pass`."""
        self._check_onloaded()
        self.store.make_room(fresh_pages(run, self.table))
        rows = layout_pass(run, self.table, self.policy.moving_positions, self.policy.sink_size)
        return PassLayout(self.grid, tuple(rows), self.table.room, self.policy.rotates_sink)

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
            kv, *more = self.client.execute(ReadPages(self.grid, tuple(self.table.pages.values())))
            scales = more[0] if more else None
        sink = None if self.sink is None else self.client.execute(ReadSink(self.grid, self.sink.number))[0]
        return ExportedPages(self.frames, dict(self.table.positions), kv, scales, sink)

    def import_pages(self, exported: ExportedPages) -> None:
        """Replace the cached frames by exported ones, in fresh pages; ValueError for another shape or dtype."""
        self.clear()
        self.set_window(exported.frames)
        self.table.positions |= exported.positions
        pages = [exported.kv] if exported.scales is None else [exported.kv, exported.scales]
        self.client.execute(WritePages(self.grid, tuple(self.table.pages.values())), *pages)
        if exported.sink is not None:
            self.sink = self.client.handle()
            self.client.execute(SetSink(self.grid, self.sink.number), exported.sink)

    def offload(self, *others: PagedCache) -> None:
        """Move the pages of this cache and `others` to host memory; shared pages are copied once.

        No pass can run until `onload`. Sink averages are moved too, and return when the next frame is averaged.
        """
        caches = [cache for cache in (self, *others) if cache.offloaded is None]
        hosted: dict[Handle | None, Handle | None] = {None: None}
        for sink in dict.fromkeys(cache.sink for cache in caches if cache.sink is not None):
            result = hosted[sink] = self.client.handle()
            self.client.execute(OffloadSink(self.grid, sink.number, result.number))
        offloaded = Offloaded(self.store, [cache.table for cache in caches])
        for cache in caches:
            cache.last_offload, cache.sink = offloaded, hosted[cache.sink]

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

    def _average(self, leaving: list[int], pages_needed: int) -> None:
        """Average leaving frames into the sink and rewrite its pages; checks that `pages_needed` more are free."""
        frames = self.frames[: self.policy.sink_size]
        table, store, client = self.table, self.store, self.client
        needed = max(0, pages_needed) + table.count_shared(frames)
        store.make_room(needed)
        store.pool.require(needed)
        if self.sink is None:
            sink = client.handle()
            client.execute(LoadSink(self.grid, sink.number, tuple(table.pages[frame] for frame in frames)))
            self.sink = sink  # valid if a write below fails, too
        moves = []
        for frame in leaving:
            at = (frame - frames[0]) % len(frames)  # each frame goes to the sink frame of its phase
            moves.append((table.pages[frame], at, table.positions[frames[at]] - table.positions[frame]))
        result = client.handle()
        client.execute(
            AverageSink(self.grid, self.sink.number, result.number, tuple(moves), self.policy.sink_decay)
        )
        table.write(frames, [table.positions[frame] for frame in frames])
        client.execute(WriteSink(self.grid, result.number, tuple(table.pages[frame] for frame in frames)))
        self.sink = result


def layout_together(caches: Sequence[PagedCache], passes: Sequence[Pass]) -> PassLayout:
    """Lay one pass out over several caches; call `end_pass` of each cache after it.

    The passes have groups of equal sizes, and the caches share a store. Caches are in the order of the batch dim.
    """
    first, *others = (cache.layout(run) for cache, run in zip(caches, passes, strict=True))
    if not others:
        return first
    return replace(first, rows=tuple(interleaved([first.rows, *(other.rows for other in others)])))
