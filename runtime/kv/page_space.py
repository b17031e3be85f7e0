"""The pages of one picture size as bookkeeping sees them: sizes, the pool of page ids, and the worker that has them."""

from __future__ import annotations

from ..plans import CloseStore, GrowStore, OpenStore
from ..worker_client import WorkerClient
from .page_store import PageForm
from .pages import PagePool


class PageSpace:
    """Owns the page ids of a worker's store. slots: frames of its staging buffer that one session needs.

    sessions: for how many the buffer has room; a store that grows makes more. users: number of open caches.
    """

    def __init__(
        self, form: PageForm, pages: int, slots: int, client: WorkerClient, grows: bool, sessions: int = 1
    ) -> None:
        self.form, self.slots, self.client, self.grows, self.sessions = form, slots, client, grows, sessions
        self.users = 0
        client.execute(OpenStore(form.grid, pages, slots, sessions))
        self.pool = PagePool(pages)

    @property
    def nbytes(self) -> int:
        """Bytes of the store as it was allocated or has grown."""
        form = self.form
        staging = self.sessions * self.slots * form.slot_bytes(form.model_dtype) if form.staged else 0
        return self.pool.size * form.nbytes + staging

    @property
    def most_batched(self) -> int | None:
        """Sessions that one pass can serve, since the staging buffer has room for no more; None for any number."""
        return None if self.grows or not self.form.staged else self.sessions

    def make_room(self, count: int) -> None:
        """Grow the store until `count` pages are free, at least to twice its size.

        Does nothing where the store has a fixed size.
        """
        if self.grows and (missing := count - len(self.pool.free)) > 0:
            more = max(missing, self.pool.size)
            self.client.execute(GrowStore(self.form.grid, self.pool.size + more))
            self.pool.grow(more)

    def close(self) -> None:
        self.client.execute(CloseStore(self.form.grid))
