"""Graph keys of a stream, from model and preset only, to fill a graph store without weights.

The passes of the block schedule are laid out over a page table, as `PagedCache` lays them out over pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from ...errors import UsageError
from ...graphs.passes import Pass
from ...models.spec import ModelSpec
from ...schemes.block_schedule import (
    ScheduledPass,
    blocks_before_repeat,
    repeat_period,
    supports_whole_block,
)
from ...schemes.page_needs import least_pages, page_needs, staging_slots
from ...schemes.presets import Preset
from ..kv.page_layout import layout_pass, parts_of, rotates_for_sink
from ..kv.page_store import padded_width
from ..kv.pages import PagePool, PageTable
from ..sampler import scheduled_blocks
from .graph_builder import GraphKey


class KeyCollector:
    """Collects the graph keys of one stream, each once, in the order in which they come up."""

    def __init__(
        self, spec: ModelSpec, preset: Preset, size: tuple[int, int], staged: bool, batches: Sequence[int]
    ) -> None:
        self.batches = batches
        self.policy, self.pages, self.guidance = preset.context, least_pages(preset), preset.sampler.guide
        self.channels, self.latent = spec.out_channels, spec.latent_size(size)
        self.slots = staging_slots(preset) if staged else 0
        context = page_needs(preset).context or 0
        self.table = PageTable(PagePool(4 * self.pages + context), context)
        self.keys: dict[GraphKey, None] = {}

    def add(self, table: PageTable, scheduled: ScheduledPass, whole: bool) -> None:
        """Add the key of a pass laid out over `table`, or with `whole`, of the block whose passes read these tables."""
        if scheduled.clears_cache:
            table.set_window(())
        if (frames := scheduled.window) is not None:
            table.set_window(frames)
        if whole and scheduled.committed is not None:
            layout_pass(scheduled.run, table, self.policy.moving_positions, self.policy.sink_size)
            self.add_pass(table, scheduled.own, whole, commits_before=True)
            return
        for run in scheduled.branch_runs(self.guidance).values():
            self.add_pass(table, run, whole)

    def add_pass(self, table: PageTable, run: Pass, whole: bool, commits_before: bool = False) -> None:
        """Add the key of a pass as one branch runs it."""
        rows = layout_pass(run, table, self.policy.moving_positions, self.policy.sink_size)
        listed = max(table.room, *(len(row.listed) for row in rows))
        key = GraphKey(
            whole=whole,
            parts=tuple((len(part), len(part[0].pages)) for part in parts_of(rows)),
            latent=(len(run.frames), self.channels, *self.latent),
            sinks=any(rotates_for_sink(self.policy.rotates_sink, part) for part in parts_of(rows)),
            width=padded_width(listed),
            pages=self.pages,
            slots=self.slots,
            texts=run.mixed_texts,
            head_groups=len(run.groups[0].head_contexts),
            commits_before=commits_before,
        )
        for count in self.batches:
            self.keys[replace(key, sessions=count, slots=count * key.slots)] = None


def graph_keys(
    spec: ModelSpec,
    preset: Preset,
    size: tuple[int, int],
    staged: bool = False,
    batches: Sequence[int] = (1,),
) -> list[GraphKey]:
    """List the keys of all graphs of a stream with pictures of `size` (width, height), without a page budget.

    These are the graphs of its first blocks, of blocks with a full window, and of the passes of a rebuild or a new
    prompt, with the blocks that follow a commit by itself. staged: True if pages have another dtype than the model.
    UsageError for a window without an end.
    """
    if page_needs(preset).context is None:
        raise UsageError(
            f"local_attn_size is -1 ({preset.name} keeps every frame), so the number of graphs has no limit; give a "
            "window such as local_attn_size=21"
        )
    collector = KeyCollector(spec, preset, size, staged, batches)
    for block in islice(scheduled_blocks(preset), blocks_before_repeat(preset) + repeat_period(preset)):
        if block.recache is not None:
            forked = collector.table.copy()
            collector.add(forked, block.recache, whole=False)
            forked.release()
        whole = supports_whole_block(preset, block.span.index)
        if block.commit_before is not None:
            forked, first = collector.table.copy(), block.passes[0]
            collector.add(forked, block.commit_before, whole=False)
            collector.add(forked, replace(first, run=first.own, committed=None), whole)
            forked.release()
        if block.rebuild is not None:
            collector.add(collector.table, block.rebuild, whole=False)
        passes = [scheduled for scheduled in block.passes if scheduled.kind != "rebuild"]
        for scheduled in passes[:1] if whole else passes:
            collector.add(collector.table, scheduled, whole)
    return list(collector.keys)
