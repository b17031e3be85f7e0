"""One branch's keys and values in pages of a store that it shares: what `ContiguousCache` keeps in one piece.

Nothing is rolled or copied: eviction is an edit of the block table, a fork a copy of it. While a session rests, its
pages can be away in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InferixError
from ...graphs.paged_attention import PagedAttention
from ...graphs.passes import Pass
from ...graphs.staged_attention import StagedAttention
from ...graphs.tables import PassTables
from ...models.wan.transformer import KeyValues
from ...schemes.context import ContextPolicy
from .offload import Offloaded
from .page_layout import Row, fresh_pages, interleaved, parts_of, place_pass, through_slots, turned
from .page_store import PagedStore
from .pages import BlockTable
from .sink_average import averaged


@dataclass(frozen=True)
class HeldPages:
    """What a branch holds, out of the store.

    frames: in the order of their pages. places: temporal positions at which keys are stored, of frames written.
    kv: [layers, 2, frames, page_tokens, heads, head_dim] as kept; scales: float32 [layers, 2, frames, heads], if
    the dtype has them. sink: averages of a moving sink, [layers, 2, sink frames, ...], once there are some.
    """

    frames: tuple[int, ...]
    places: dict[int, int]
    kv: Tensor
    scales: Tensor | None
    sink: Tensor | None


class PagedCache:
    """A view of `store` through a block table, under a policy."""

    def __init__(self, store: PagedStore, table: BlockTable, policy: ContextPolicy) -> None:
        self.store, self.table, self.policy = store, table, policy
        self.sink: Tensor | None = None  # averages [layers, 2, sink_size, page_tokens, heads, head_dim]
        self.moved: Offloaded | None = None
        self.open = True
        store.users += 1

    @property
    def frames(self) -> tuple[int, ...]:
        return self.table.frames if self.away is None else self.away.frames(self.table)

    @property
    def away(self) -> Offloaded | None:
        """Where the pages are while they are in host memory."""
        return None if self.moved is None or self.moved.back else self.moved

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, shared ones too."""
        return len(self.table.pages) * self.store.form.nbytes

    def hold(self, frames: tuple[int, ...]) -> None:
        """Hold just `frames`, ascending: keep those that are here, drop others, take pages for new ones."""
        self._check_here()
        leaving = self.table.dropped(frames)
        if self.policy.sink_decay < 1 and leaving:
            self._average(leaving, self.table.wanted(frames))
        self.store.make_room(self.table.wanted(frames))
        self.table.hold(frames)

    def clear(self) -> None:
        """Forget all frames."""
        self._check_here()
        self.sink = None
        self.table.hold(())

    def bind(self, run: Pass) -> KeyValues:
        """The pages as the attention of one pass; the scratch ones among them last until `settle`."""
        return self._attention(self._place(run))

    def settle(self) -> None:
        """The pass is over; what it did not write is gone."""
        self.table.give_back()

    def rollback(self, first: int) -> None:
        """Roll back to before frame `first`: free its pages and all later ones."""
        self.table.drop_from(first)

    def fork(self) -> PagedCache:
        """The same past, in the same pages; each side gets pages of its own for what it writes from now on."""
        self._check_here()
        other = PagedCache(self.store, self.table.copy(), self.policy)
        other.sink = self.sink
        return other

    def release(self) -> None:
        """Let all pages go; a second call does nothing."""
        if self.open:
            if self.away is not None:
                self.away.leave_out(self.table)
            self.table.release()
            self.sink = self.moved = None
            self.open = False
            self.store.users -= 1

    def export_pages(self) -> HeldPages:
        """A copy of everything that is held, on the store's device, or on the host if it is away."""
        if self.away is not None:
            kv, scales = self.away.read(self.table)
        else:
            kv, scales = self.store.read(list(self.table.pages.values()))
        return HeldPages(self.frames, dict(self.table.places), kv, scales, self.sink)

    def import_pages(self, held: HeldPages) -> None:
        """Hold just what `export_pages` gave, of this cache or of one like it, in fresh pages."""
        self.clear()
        self.hold(held.frames)
        self.table.places |= held.places
        self.store.write(list(self.table.pages.values()), held.kv, held.scales)
        self.sink = None if held.sink is None else held.sink.to(self.store.device)

    def offload(self, *others: PagedCache) -> None:
        """Move the pages to the host, with those of `others` that share them; nothing runs until `onload`.

        Averages of a moving sink go along, and come back when the next frame is averaged into them.
        """
        caches = [cache for cache in (self, *others) if cache.away is None]
        sinks = {id(cache.sink): cache.sink for cache in caches if cache.sink is not None}
        hosted = {key: self.store.to_host(sink) for key, sink in sinks.items()}
        away = Offloaded(self.store, [cache.table for cache in caches])
        for cache in caches:
            cache.moved, cache.sink = away, hosted.get(id(cache.sink))

    def prefetch(self) -> None:
        """Begin to bring the pages back, ahead of `onload`; OutOfPages leaves them where they are."""
        if self.away is not None:
            self.away.prefetch()

    def onload(self) -> None:
        """Have the pages back, with those of the caches that went along."""
        if self.away is not None:
            self.away.onload()

    def _check_here(self) -> None:
        if self.away is not None:
            raise InferixError("the pages of this session are in host memory; resume it first")

    def _place(self, run: Pass) -> list[Row]:
        self._check_here()
        self.store.make_room(fresh_pages(run, self.table))
        return place_pass(run, self.table, self.policy.moving_positions)

    def _attention(self, rows: list[Row]) -> KeyValues:
        store = self.store
        if not store.form.staged:
            return PagedAttention(self._parts(rows), store.kv, store.rope_rows, store.rope_columns)
        own = [page for row in rows for page in row.pages]
        through = through_slots(rows, store.form.read_in_place)
        staging = store.slots(through.slots)
        return StagedAttention(
            self._parts(through.rows), store.kv, store.scales, staging,
            written=(store.ints(list(range(len(own)))), store.ints(own)),
            seen=None if through.seen is None else (store.ints(through.seen), store.ints(list(range(through.slots)))),
            rope_rows=store.rope_rows, rope_columns=store.rope_columns,
        )  # fmt: skip

    def _average(self, leaving: list[int], wanted: int) -> None:
        """Let frames on their way out go into the sink, whose pages are written anew; `wanted` pages follow."""
        frames = self.frames[: self.policy.sink_size]
        table, store = self.table, self.store
        needed = max(0, wanted) + table.shared(frames)
        store.make_room(needed)
        store.pool.require(needed)
        wide = torch.promote_types(store.form.model, torch.float32)
        held = [table.pages[frame] for frame in frames]
        kept = store.restored(held, wide) if self.sink is None else self.sink.to(store.device, non_blocking=True)
        gone = store.restored([table.pages[frame] for frame in leaving], wide)
        self.sink = kept  # should writing fail half-way, the average is still there
        moved = kept.clone()  # forks may share the old one
        for frame, left in zip(leaving, gone.unbind(2), strict=True):
            at = (frame - frames[0]) % len(frames)
            (turns,), *_ = store.turns([table.places[frames[at]] - table.places[frame]])
            moved[:, :, at] = averaged(moved[:, :, at], left, turns, self.policy.sink_decay)
        table.write(frames, [table.places[frame] for frame in frames])
        store.replace([table.pages[frame] for frame in frames], moved)
        self.sink = moved

    def _parts(self, rows: list[Row]) -> list[PassTables]:
        return [self._part(part) for part in parts_of(rows)]

    def _part(self, rows: list[Row]) -> PassTables:
        ints, turns = self.store.ints, self.store.turns
        turn = turned(self.policy, rows)
        width = max(self.table.room, *(len(row.listed) for row in rows))
        listed = [row.listed + (0,) * (width - len(row.listed)) for row in rows]
        return PassTables(
            pages=ints([row.pages for row in rows]),
            table=ints(listed),
            count=ints([len(row.listed) for row in rows]),
            rope_time=torch.stack([turns(row.places)[0] for row in rows]),
            rope_sink=torch.stack([turns(row.sink_places)[0] for row in rows]) if turn else None,
            sink_count=ints([row.sinks for row in rows]) if turn else None,
        )


def bind_together(caches: Sequence[PagedCache], passes: Sequence[Pass]) -> KeyValues:
    """Passes with groups of the same sizes, each over its own cache, as the attention of one; then `settle` each.

    The caches, whose pages are of one store, take part in the order of the tokens' first dim.
    """
    first, *others = caches
    if not others:
        return first.bind(passes[0])
    return first._attention(interleaved([cache._place(run) for cache, run in zip(caches, passes, strict=True)]))
