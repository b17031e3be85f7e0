"""Which graphs a stream asks for, told before anything is loaded.

Its passes are rehearsed over a block table, as the engine makes them over pages, so that a folder of graphs can be
filled without weights.
"""

from __future__ import annotations

from itertools import islice

from ...errors import UsageError
from ...graphs.passes import Pass
from ...models.wan.spec import ModelSpec
from ...schemes.page_needs import least_pages, page_needs, staging_slots
from ...schemes.presets import Preset
from ..capacity.planner import launches_whole, rehearse, steady, window
from ..kv.page_layout import parts_of, place_pass, turned
from ..kv.pages import BlockTable, PagePool
from .graph_builder import Query, stepped


class Rehearsal:
    """Collects the queries of one stream, each once, in the order in which they come up."""

    def __init__(self, spec: ModelSpec, preset: Preset, size: tuple[int, int], staged: bool) -> None:
        self.policy, self.pages = preset.context, least_pages(preset)
        self.channels, self.latent = spec.out_channels, spec.latent_size(size)
        self.slots = staging_slots(preset) if staged else 0
        held = window(preset)
        self.table = BlockTable(PagePool(4 * self.pages + held), held)
        self.found: dict[Query, None] = {}

    def ask(self, table: BlockTable, run: Pass, whole: bool) -> None:
        """The query of a pass over the pages of a table, or of the block whose passes have its tables."""
        if run.groups[-1].write:
            table.hold(run.groups[-1].context)
        rows = place_pass(run, table, self.policy.moving_positions)
        listed = max(table.room, *(len(row.listed) for row in rows))
        query = Query(
            whole=whole,
            parts=tuple((len(part), len(part[0].pages)) for part in parts_of(rows)),
            latent=(len(run.frames), self.channels, *self.latent),
            sinks=any(turned(self.policy, part) for part in parts_of(rows)),
            width=stepped(listed),
            pages=self.pages,
            slots=self.slots,
        )
        self.found[query] = None


def queries_of(spec: ModelSpec, preset: Preset, size: tuple[int, int], staged: bool = False) -> list[Query]:
    """What a stream of pictures of `size` (width, height) asks for on an engine without a budget of pages.

    Its first blocks, those of a full window, and passes that a rebuild or a new prompt sets off. staged: whether pages
    are kept in another dtype than the model's. UsageError where the window has no end.
    """
    if page_needs(preset).held is None:
        raise UsageError(
            f"{preset.name} with local_attn_size -1 keeps every frame, so there is no end of graphs; give a window "
            "(--set local_attn_size=21)"
        )
    whole, table = launches_whole(preset), (rehearsal := Rehearsal(spec, preset, size, staged)).table
    full = -(-2 * window(preset) // preset.num_frame_per_block) + preset.window_blocks
    for work in islice(rehearse(preset), full + len(steady(preset))):
        if work.switch is not None:
            seen = table.copy()
            if preset.context.recache_sink:
                seen.hold(())
            rehearsal.ask(seen, work.switch, whole=False)
            seen.release()
        passes = list(work.passes)
        if work.rebuilt:
            table.hold(())
            rehearsal.ask(table, passes.pop(0), whole=False)
        for run in passes[:1] if whole else passes:
            rehearsal.ask(table, run, whole)
    return list(rehearsal.found)
