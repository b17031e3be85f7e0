"""Pages of resting sessions in host memory. Tables that go together keep sharing what they share.

On a GPU the host memory is pinned and copies run on a stream of their own: back ahead of time (`prefetch`), while
others compute. On a CPU they are plain copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from .page_store import PagedStore
from .pages import PageTable


class Offloaded:
    """The pages of `tables`, on the host; the tables hold none until `onload`."""

    def __init__(self, store: PagedStore, tables: Sequence[PageTable]) -> None:
        self.store = store
        for table in tables:
            table.free_scratch()
        pages = sorted({page for table in tables for page in table.pages.values()})
        with store.transfer.beside():
            self.kv, self.scales = store.read(pages, host=True)
        store.transfer.join()  # before anyone writes the pages anew
        index = {page: slot for slot, page in enumerate(pages)}
        self.tables = [(table, {frame: index[page] for frame, page in table.pages.items()}) for table in tables]
        for table in tables:
            table.pool.release(table.pages.values())
            table.pages = {}
        self.coming = self.back = False

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def frames(self, table: PageTable) -> tuple[int, ...]:
        return tuple(self._slots(table))

    def read(self, table: PageTable) -> tuple[Tensor, Tensor | None]:
        """What `PagedStore.read` gave for the pages of a table, once it is there."""
        self.store.transfer.wait()
        return self._lying(list(self._slots(table).values()))

    def prefetch(self) -> None:
        """Take pages again and begin to fill them; where memory runs out, everything stays on the host."""
        if self.coming:
            return
        holders = Counter(slot for _, slots in self.tables for slot in set(slots.values()))
        wanted, pool = sorted(holders), self.store.pool
        self.store.make_room(len(wanted))
        pages = dict(zip(wanted, pool.acquire(len(wanted), room=len(wanted)), strict=True))
        with ExitStack() as failed:
            failed.callback(pool.release, pages.values())
            kv, scales = self._lying(wanted)
            with self.store.transfer.beside():
                self.store.write(list(pages.values()), kv, scales)
            failed.pop_all()
        for slot, count in holders.items():
            pool.share([pages[slot]] * (count - 1))
        for table, slots in self.tables:
            table.pages = {frame: pages[slot] for frame, slot in slots.items()}
        self.coming = True

    def onload(self) -> None:
        """Have the pages back; what is computed from now on sees them."""
        self.prefetch()
        self.store.transfer.join()
        self.back = True
        del self.kv, self.scales

    def leave_out(self, table: PageTable) -> None:
        """This table is closed and does not come back."""
        if self.coming:
            self.store.transfer.join()  # its pages are free for others only after the copy
        self.tables = [(other, slots) for other, slots in self.tables if other is not table]

    def _lying(self, slots: list[int]) -> tuple[Tensor, Tensor | None]:
        """Pages of some slots, as they lie: in pinned memory, and perhaps still coming, if they are all."""
        if slots == list(range(self.kv.shape[2])):
            return self.kv, self.scales
        self.store.transfer.wait()
        return self.kv[:, :, slots], None if self.scales is None else self.scales[:, :, slots]

    def _slots(self, table: PageTable) -> dict[int, int]:
        return next(slots for other, slots in self.tables if other is table)
