"""The graphs that a stream needs, found before anything is loaded, to fill a folder of graphs without weights.

The passes of the block schedule are laid out over a page table, as the engine lays them out over pages.
"""

from __future__ import annotations

from itertools import islice

from ...errors import UsageError
from ...models.wan.spec import ModelSpec
from ...schemes.block_schedule import (
    ScheduledPass,
    blocks_before_repeat,
    repeat_period,
    supports_whole_block,
    window_of,
)
from ...schemes.page_needs import least_pages, page_needs, staging_slots, window
from ...schemes.presets import Preset
from ..kv.page_layout import layout_pass, parts_of, rotates_for_sink
from ..kv.pages import PagePool, PageTable
from ..sampler import scheduled_blocks
from .graph_builder import GraphKey, padded_width


class KeyCollector:
    """Collects the graph keys of one stream, each once, in the order in which they come up."""

    def __init__(self, spec: ModelSpec, preset: Preset, size: tuple[int, int], staged: bool) -> None:
        self.policy, self.pages = preset.context, least_pages(preset)
        self.channels, self.latent = spec.out_channels, spec.latent_size(size)
        self.slots = staging_slots(preset) if staged else 0
        held = window(preset)
        self.table = PageTable(PagePool(4 * self.pages + held), held)
        self.found: dict[GraphKey, None] = {}

    def add(self, table: PageTable, scheduled: ScheduledPass, whole: bool) -> None:
        """Add the key of a pass over the pages of a table, or of the block whose passes have its tables."""
        run = scheduled.run
        if scheduled.clears_cache:
            table.set_window(())
        if (frames := window_of(run)) is not None:
            table.set_window(frames)
        rows = layout_pass(run, table, self.policy.moving_positions)
        listed = max(table.room, *(len(row.listed) for row in rows))
        key = GraphKey(
            whole=whole,
            parts=tuple((len(part), len(part[0].pages)) for part in parts_of(rows)),
            latent=(len(run.frames), self.channels, *self.latent),
            sinks=any(rotates_for_sink(self.policy, part) for part in parts_of(rows)),
            width=padded_width(listed),
            pages=self.pages,
            slots=self.slots,
        )
        self.found[key] = None


def graph_keys(spec: ModelSpec, preset: Preset, size: tuple[int, int], staged: bool = False) -> list[GraphKey]:
    """Keys of all graphs that a stream of pictures of `size` (width, height) runs, on an engine without a page budget.

    They are those of its first blocks, of blocks with a full window, and of passes that a rebuild or a new prompt adds.
    staged: whether pages are kept in another dtype than the model's. Raises UsageError where the window has no end.
    """
    if page_needs(preset).held is None:
        raise UsageError(
            f"{preset.name} with local_attn_size -1 keeps every frame, so there is no end of graphs; give a window "
            "(--set local_attn_size=21)"
        )
    whole, keys = supports_whole_block(preset), KeyCollector(spec, preset, size, staged)
    for block in islice(scheduled_blocks(preset), blocks_before_repeat(preset) + repeat_period(preset)):
        if block.recache is not None:
            forked = keys.table.copy()
            keys.add(forked, block.recache, whole=False)
            forked.release()
        if block.rebuild is not None:
            keys.add(keys.table, block.rebuild, whole=False)
        passes = [scheduled for scheduled in block.passes if scheduled.kind != "rebuild"]
        for scheduled in passes[:1] if whole else passes:
            keys.add(keys.table, scheduled, whole)
    return list(keys.found)
