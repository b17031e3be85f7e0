"""The memory for keys and values of an engine: a store of pages for each size of picture, within one budget."""

from __future__ import annotations

import torch

from ...errors import UsageError
from ...models.wan.spec import ModelSpec
from ...schemes.page_needs import least_pages, page_needs, staging_slots
from ...schemes.presets import Preset
from ..byte_sizes import format_bytes
from .page_store import PagedStore, PageForm
from .paged_cache import PagedCache
from .pages import BlockTable


class KVMemory:
    """Owns the stores. preset: as loaded; a window that overload narrows needs no more. budget: bytes, which are
    allocated once and never move; None is what one session needs, and more where more sessions, or a window without an
    end, ask for it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        preset: Preset,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        budget: int | None,
    ) -> None:
        self.spec, self.preset, self.dtypes, self.device, self.budget = spec, preset, dtypes, device, budget
        self.stores: dict[tuple[int, int], PagedStore] = {}  # by token grid

    def new_cache(self, size: tuple[int, int]) -> PagedCache:
        """An empty past for pictures of `size` (width, height), in the pages that all sessions of that size share."""
        store = self.store(size)
        return PagedCache(store, BlockTable(store.pool, page_needs(self.preset).held or 0), self.preset.context)

    def store(self, size: tuple[int, int]) -> PagedStore:
        """The pages for pictures of `size`; UsageError where the budget is too small for one session."""
        form = self.form(size)
        if form.grid not in self.stores:
            self.stores = {grid: store for grid, store in self.stores.items() if store.users}
            slots, pages = staging_slots(self.preset), least_pages(self.preset)
            if self.budget is not None:
                taken = sum(store.nbytes for store in self.stores.values())
                staging = slots * form.slot_bytes(form.model) if form.staged else 0
                pages = pages_in(self.budget, form.nbytes, staging + taken, self.preset)
            self.stores[form.grid] = PagedStore(form, pages, slots, self.device, grows=self.budget is None)
        return self.stores[form.grid]

    def batches(self, size: tuple[int, int]) -> bool:
        """Whether passes of several sessions can be bound at a time: not where pages go through a buffer for one."""
        return not (self.form(size).staged and self.budget is not None)

    def form(self, size: tuple[int, int]) -> PageForm:
        """What a page is for pictures of `size`."""
        height, width = self.spec.latent_size(size)
        return PageForm(self.spec, (height // self.spec.patch[0], width // self.spec.patch[1]), *self.dtypes)


def pages_in(budget: int, page_bytes: int, fixed: int, preset: Preset) -> int:
    """Pages that fit into `budget` bytes beside `fixed` ones; UsageError where a session of the preset needs more."""
    least = least_pages(preset)
    pages = (budget - fixed) // page_bytes
    if pages < least:
        raise UsageError(
            f"kv_memory is {format_bytes(budget)}, but one session of {preset.name} needs "
            f"{format_bytes(least * page_bytes + fixed)}: {least} latent frames of {format_bytes(page_bytes)}. Give at "
            "least that much, or ask for a smaller window (local_attn_size), smaller pictures (size) or fewer bytes a "
            "number (kv_dtype)"
        )
    return pages
