"""Offload of KV pages to host memory and back. Tables that are offloaded together keep sharing pages.

On a GPU the host memory is pinned and copies run on a stream of their own, so that `prefetch` overlaps with the passes
of other sessions. On a CPU they are plain copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from ..plans import JoinTransfer, Offload, Onload, ReadHost
from .page_space import PageSpace
from .pages import PageTable


class Offloaded:
    """The pages of `tables` in host memory; the tables have no pages until `prefetch` or `onload`."""

    def __init__(self, store: PageSpace, tables: Sequence[PageTable]) -> None:
        self.store, self.grid, self.host = store, store.form.grid, store.client.handle()
        for table in tables:
            table.free_scratch()
        pages = sorted({page for table in tables for page in table.pages.values()})
        store.client.execute(Offload(self.grid, self.host.number, tuple(pages)))
        index = {page: slot for slot, page in enumerate(pages)}
        self.tables = [(table, {frame: index[page] for frame, page in table.pages.items()}) for table in tables]
        for table in tables:
            table.pool.release(table.pages.values())
            table.pages = {}
        self.prefetched = self.complete = False

    def frames(self, table: PageTable) -> tuple[int, ...]:
        return tuple(self._slots(table))

    def read(self, table: PageTable) -> tuple[Tensor, Tensor | None]:
        """Return the host copy of a table's pages, and their scales, after the copy is complete."""
        slots = tuple(self._slots(table).values())
        kv, *scales = self.store.client.execute(ReadHost(self.grid, self.host.number, slots))
        return kv, scales[0] if scales else None

    def prefetch(self) -> None:
        """Allocate pages and start copying into them; OutOfPages leaves everything in host memory."""
        if self.prefetched:
            return
        references = Counter(slot for _, slots in self.tables for slot in set(slots.values()))
        needed, pool = sorted(references), self.store.pool
        self.store.make_room(len(needed))
        pages = dict(zip(needed, pool.acquire(len(needed), room=len(needed)), strict=True))
        with ExitStack() as on_failure:
            on_failure.callback(pool.release, pages.values())
            plan = Onload(self.grid, self.host.number, tuple(needed), tuple(pages.values()))
            self.store.client.execute(plan)
            on_failure.pop_all()
        for slot, count in references.items():
            pool.share([pages[slot]] * (count - 1))
        for table, slots in self.tables:
            table.pages = {frame: pages[slot] for frame, slot in slots.items()}
        self.prefetched = True

    def onload(self) -> None:
        """Copy the pages back; passes that are launched from now on run after the copy."""
        self.prefetch()
        self.store.client.execute(JoinTransfer(self.grid))
        self.complete = True
        del self.host

    def discard(self, table: PageTable) -> None:
        """Remove a table that is closed, so that its pages are not copied back."""
        if self.prefetched:
            self.store.client.execute(JoinTransfer(self.grid))  # its pages are free only after the copy
        self.tables = [(other, slots) for other, slots in self.tables if other is not table]

    def _slots(self, table: PageTable) -> dict[int, int]:
        return next(slots for other, slots in self.tables if other is table)
