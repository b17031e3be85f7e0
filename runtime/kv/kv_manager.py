"""KV manager: the pages of an engine, a store for each picture size, within one memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import UsageError
from ...graphs.shards import ALONE, Shard
from ...models.spec import ModelSpec
from ...schemes.page_needs import least_pages, page_needs, staging_slots
from ...schemes.presets import Preset
from ..byte_sizes import format_bytes
from ..plans import Grid
from ..worker_client import WorkerClient
from .page_space import PageSpace
from .page_store import PageForm
from .paged_cache import PagedCache
from .pages import PageTable

MOST_STAGED = 8  # sessions of a batch that a staging buffer within a budget has room for

class KVManager:
    """Owns the page ids of all stores, and has the worker open and close them.

    preset: as loaded; the narrower window of an overloaded engine needs no more pages. clients: of the ranks that have
    the pages of each branch of guidance; one for all branches where the same ranks have them. budget: bytes of all
    stores of a rank, allocated once. None: stores begin with the pages of one session, and grow. shard: of this rank;
    sizes in bytes are those of one rank.
    """

    def __init__(
        self,
        spec: ModelSpec,
        preset: Preset,
        dtypes: tuple[torch.dtype, torch.dtype],
        clients: Sequence[WorkerClient],
        budget: int | None,
        shard: Shard = ALONE,
    ) -> None:
        self.spec, self.preset, self.dtypes, self.clients, self.budget = spec, preset, dtypes, clients, budget
        self.shard = shard
        self.stores: dict[tuple[Grid, int], PageSpace] = {}  # by token grid and number of the client

    def new_cache(self, size: tuple[int, int], number: int = 0) -> PagedCache:
        """Return an empty cache for pictures of `size` (width, height), in the store of that size.

        number: of the cache in `Guidance.caches`.
        """
        store = self.store(size, number)
        return PagedCache(store, PageTable(store.pool, page_needs(self.preset).context or 0), self.preset.context)

    def store(self, size: tuple[int, int], number: int = 0) -> PageSpace:
        """Return the store of a cache for pictures of `size`.

        UsageError if the budget is too small for one session.
        """
        form, cache = self.form(size), None if len(self.clients) == 1 else number
        key = form.grid, cache or 0
        if key not in self.stores:
            unused = [other for other, store in self.stores.items() if not store.users and other[1] == key[1]]
            for other in unused:
                self.stores.pop(other).close()
            slots, pages, sessions = staging_slots(self.preset), least_pages(self.preset, cache), 1
            if self.budget is not None:
                used = sum(store.nbytes for other, store in self.stores.items() if other[1] == key[1])
                staging = slots * form.slot_bytes(form.model_dtype) if form.staged else 0
                fitting = (self.budget - used) // (pages * form.nbytes + staging)
                sessions = max(1, min(fitting, MOST_STAGED))
                pages = pages_in(self.budget, form.nbytes, sessions * staging + used, self.preset, pages)
            self.stores[key] = PageSpace(form, pages, slots, self.clients[key[1]], self.budget is None, sessions)
        return self.stores[key]

    def form(self, size: tuple[int, int]) -> PageForm:
        """Sizes and dtypes of a page for pictures of `size` (width, height)."""
        height, width = self.spec.latent_size(size)
        grid = height // self.spec.patch[0], width // self.spec.patch[1]
        return PageForm(self.spec, grid, *self.dtypes, self.shard)


def pages_in(budget: int, page_bytes: int, fixed: int, preset: Preset, least: int) -> int:
    """Number of pages in `budget` bytes less `fixed`; UsageError if that is less than one session needs, `least`."""
    pages = (budget - fixed) // page_bytes
    if pages < least:
        raise UsageError(
            f"kv_memory is {format_bytes(budget)}, but one session of {preset.name} needs "
            f"{format_bytes(least * page_bytes + fixed)}: {least} latent frames of {format_bytes(page_bytes)}. "
            "Increase kv_memory, or use a smaller window (local_attn_size), smaller pictures (size) or kv_dtype=fp8"
        )
    return pages
