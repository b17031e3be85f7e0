"""Lists of pages that the presets' streams read, as `PagedCache` lays them out: once the window is full, and before."""

from __future__ import annotations

from itertools import islice

from inferix.models.registry import PRESETS
from inferix.runtime.kv.page_layout import layout_pass
from inferix.runtime.kv.pages import PagePool, PageTable
from inferix.runtime.sampler import scheduled_blocks
from inferix.schemes.block_schedule import blocks_before_repeat, repeat_period
from inferix.schemes.page_needs import least_pages, page_needs
from inferix.schemes.presets import Preset

LONGEST = 64  # frames of a list; longer ones differ from shorter ones in their length only


def lists_of(preset: Preset) -> list[tuple[tuple[int, ...], int]]:
    """Pages of each row of the denoising passes of the last blocks before a stream repeats, and its sinks."""
    context = page_needs(preset).context or 0
    table = PageTable(PagePool(4 * least_pages(preset) + context), context)
    blocks = blocks_before_repeat(preset) + repeat_period(preset)
    found: dict[tuple[tuple[int, ...], int], None] = {}
    for block in islice(scheduled_blocks(preset), blocks):
        for scheduled in block.passes:
            if scheduled.clears_cache:
                table.set_window(())
            if (frames := scheduled.window) is not None:
                table.set_window(frames)
            for run in scheduled.branch_runs(preset.sampler.guide).values():
                rows = layout_pass(run, table, preset.context.moving_positions, preset.context.sink_size)
                for row in rows:
                    if block.span.index >= blocks - 1:
                        found[row.listed[:LONGEST], row.sinks] = None
    return list(found)


def every_list() -> dict[tuple[tuple[int, ...], int], str]:
    """Lists of all presets with a window, each once, with a preset that has it."""
    named: dict[tuple[tuple[int, ...], int], str] = {}
    for name, preset in PRESETS.items():
        if page_needs(preset).context is not None:
            for listed in lists_of(preset):
                named.setdefault(listed, name)
    return named
