"""One branch's keys and values in pages of a store that it shares: what `ContiguousCache` keeps in one piece.

Nothing is rolled or copied: eviction is an edit of the block table, a fork a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..graphs.paged_attention import PagedAttention
from ..graphs.passes import Pass
from ..graphs.tables import PassTables
from .paged_store import PagedStore
from .pages import BlockTable
from .placement import Row, fresh_pages, parts_of, place_pass


@dataclass(frozen=True)
class HeldPages:
    """What a branch holds, out of the store: frames in the order of their pages, the temporal positions at which
    the keys of those written are stored, and keys and values [layers, 2, frames, page_tokens, heads, head_dim].
    """

    frames: tuple[int, ...]
    places: dict[int, int]
    kv: Tensor


class PagedCache:
    """A view of `store` through a block table.

    moving: positions change while frames are held. sinks: passes tell how queries are turned for a sink even
    where there is none yet, so that the shapes of their tables stay.
    """

    def __init__(self, store: PagedStore, table: BlockTable, moving: bool, sinks: bool) -> None:
        self.store, self.table, self.moving, self.sinks = store, table, moving, sinks

    @property
    def frames(self) -> tuple[int, ...]:
        return self.table.frames

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, shared ones too."""
        return len(self.table.pages) * self.store.page_bytes

    def hold(self, frames: tuple[int, ...]) -> None:
        """Hold just `frames`, ascending: keep those that are here, drop others, take pages for new ones."""
        self.store.make_room(self.table.wanted(frames))
        self.table.hold(frames)

    def clear(self) -> None:
        """Forget all frames."""
        self.table.hold(())

    def bind(self, run: Pass) -> PagedAttention:
        """The pages as the attention of one pass."""
        parts = self.tables(run)
        return PagedAttention(parts, self.store.kv, self.store.row_turns, self.store.column_turns)

    def tables(self, run: Pass) -> list[PassTables]:
        """What the kernels of the pass read, part by part. Pages of groups that do not write last until `settle`."""
        self.store.make_room(fresh_pages(run, self.table))
        return [self._part(rows) for rows in parts_of(place_pass(run, self.table, self.moving))]

    def settle(self) -> None:
        """The pass is over; what it did not write is gone."""
        self.table.give_back()

    def export_pages(self) -> HeldPages:
        """A copy of everything that is held."""
        table = self.table
        return HeldPages(self.frames, dict(table.places), self.store.read(list(table.pages.values())))

    def import_pages(self, held: HeldPages) -> None:
        """Hold just what `export_pages` gave, of this cache or of one like it, in fresh pages."""
        self.clear()
        self.hold(held.frames)
        self.table.places |= held.places
        self.store.write(list(self.table.pages.values()), held.kv)

    def fork(self) -> PagedCache:
        """The same past, in the same pages; each side gets pages of its own for what it writes from now on."""
        return PagedCache(self.store, self.table.copy(), self.moving, self.sinks)

    def release(self) -> None:
        """Let all pages go; a second call does nothing."""
        self.table.release()

    def _part(self, rows: list[Row]) -> PassTables:
        device = self.store.device
        turned = self.sinks or any(row.sinks for row in rows)
        width = max(self.table.room, *(len(row.listed) for row in rows))
        listed = [row.listed + (0,) * (width - len(row.listed)) for row in rows]
        return PassTables(
            pages=_ints([row.pages for row in rows]).to(device),
            table=_ints(listed).to(device),
            count=_ints([len(row.listed) for row in rows]).to(device),
            time_turns=torch.stack([self.store.turns(row.places)[0] for row in rows]),
            sink_turns=torch.stack([self.store.turns(row.sink_places)[0] for row in rows]) if turned else None,
            sink_count=_ints([row.sinks for row in rows]).to(device) if turned else None,
        )


def _ints(values: list[tuple[int, ...]] | list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
