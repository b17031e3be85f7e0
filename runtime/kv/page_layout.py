"""Layout of a pass over pages: pages to write, pages to read, and rotary positions, as host integers.

Keys stay rotated at the position where they were stored. A group that sees a frame at another position rotates its
query by the difference instead: once for the window, and once more for the sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import InferixError, UsageError
from ...graphs.passes import Group, Pass
from ..plans import GroupPages
from .pages import PageTable


def fresh_pages(run: Pass, table: PageTable) -> int:
    """Free pages that a pass needs: to replace shared pages that it writes, and as scratch."""
    return table.count_shared(run.written) + len(run.scratch) - len(table.scratch)


def layout_pass(run: Pass, table: PageTable, moving: bool, permanent: int = 0) -> list[GroupPages]:
    """Return the pages of each group; the table allocates scratch pages and notes the positions of written frames.

    Keys are stored at the group's positions, or at the frame numbers if `moving` (positions count in the window).
    Pages are listed in `ring_order`. permanent: first frames, which stay in the window.
    InferixError for a context frame that no pass has written; UsageError for positions that need a third rotation.
    """
    table.free_scratch()
    table.pool.require(fresh_pages(run, table))
    positions = dict(table.positions)
    for group in run.groups:
        stored = group.frames if moving else tuple(map(group.position_of, group.frames))
        if group.write:
            table.write(group.frames, stored)
        positions |= dict(zip(group.frames, stored, strict=True))
    table.alloc_scratch(run.scratch)
    pages = table.pages | table.scratch
    ring = table.room - permanent
    return [_row(group, pages, positions, permanent, ring) for group in run.groups]


def ring_order(frames: Sequence[int], permanent: int, ring: int) -> list[int]:
    """Sort frames as their pages lie in a run of pages that is written round and round.

    A branch takes its pages one after the other, and a new frame takes the page of the one that it evicts. So the
    window is a ring of `ring` pages behind those of the `permanent` first frames, and a full window in this order is
    one run, where the branch got one. The order follows from frame numbers alone and never from page ids, which depend
    on other sessions: a session adds up its keys in the same order alone and beside others, and after a restore. With
    `ring` 0 or less, of a window without an end, frames stay as they are.
    """
    if ring <= 0:
        return list(frames)
    return sorted(frames, key=lambda frame: frame if frame < permanent else permanent + (frame - permanent) % ring)


def _row(group: Group, pages: dict[int, int], positions: dict[int, int], permanent: int, ring: int) -> GroupPages:
    if unwritten := [frame for frame in group.context if frame not in positions]:
        raise InferixError(f"frames {unwritten} of the context have no keys and values: no pass has written them")
    shifts = {frame: positions[frame] - at for frame, at in zip(group.context, group.positions, strict=True)}
    own = shifts[group.frames[0]]
    others = sorted({shift for shift in shifts.values() if shift != own})
    if len(others) > 1 or any(shifts[frame] != own for frame in group.frames):
        raise UsageError(
            f"frames {group.context} at positions {group.positions} are stored at distances "
            f"{sorted(set(shifts.values()))}; pages allow one for the window and one for the sink. Use absolute "
            "positions, or shot_offset=0"
        )
    context = ring_order(group.context, permanent, ring)
    sinks = [frame for frame in context if shifts[frame] != own]
    window = [frame for frame in context if shifts[frame] == own]
    sink_shift = others[0] if others else own
    at = [group.position_of(frame) for frame in group.frames]

    def read(frames: Sequence[int]) -> tuple[tuple[int, ...], int]:
        early, late = ([frame for frame in part if frame in frames] for part in (sinks, window))
        return tuple(pages[frame] for frame in early + late), len(early)

    return GroupPages(
        pages=tuple(pages[frame] for frame in group.frames),
        positions=tuple(positions[frame] for frame in group.frames),
        listed=tuple(pages[frame] for frame in sinks + window),
        sinks=len(sinks),
        sink_positions=tuple(position + sink_shift for position in at),
        head_lists=tuple(map(read, group.head_contexts)),
    )


def parts_of(rows: Sequence[GroupPages]) -> list[list[GroupPages]]:
    """Runs of neighbouring groups with equally many frames; each run is one launch."""
    parts: list[list[GroupPages]] = []
    for row in rows:
        if parts and len(parts[-1][0].pages) == len(row.pages):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def interleaved(passes: Sequence[Sequence[GroupPages]]) -> list[GroupPages]:
    """Join passes whose parts have equal sizes: within each part, the rows of one pass after those of the other."""
    return [row for parts in zip(*map(parts_of, passes), strict=True) for part in parts for row in part]


def rotates_for_sink(rotates: bool, rows: Sequence[GroupPages]) -> bool:
    """True if a part needs queries rotated for the sink.

    rotates: the policy can need them (`ContextPolicy.rotates_sink`). Every pass has them then, so that the shapes of
    the tables stay the same.
    """
    return rotates or any(row.sinks for row in rows)


@dataclass(frozen=True)
class ThroughSlots:
    """Groups whose frames go through a staging buffer of `slots` slots; the pass's own frames come first.

    seen: the page of each slot that is read through the buffer; None where rows list the pages themselves.
    """

    rows: list[GroupPages]
    slots: int
    seen: list[int] | None


def through_slots(rows: Sequence[GroupPages], read_in_place: bool) -> ThroughSlots:
    """Lay the pass out over a staging buffer: written through it, and read through it unless `read_in_place`."""
    own = [page for row in rows for page in row.pages]
    seen = list(dict.fromkeys([*own, *(page for row in rows for page in row.listed)]))
    slot = {page: index for index, page in enumerate(seen)}

    def staged(row: GroupPages) -> GroupPages:
        pages = tuple(slot[page] for page in row.pages)
        if read_in_place:
            return replace(row, pages=pages)
        listed = tuple(slot[page] for page in row.listed)
        lists = tuple((tuple(slot[page] for page in part), sinks) for part, sinks in row.head_lists)
        return replace(row, pages=pages, listed=listed, head_lists=lists)

    if read_in_place:
        return ThroughSlots([staged(row) for row in rows], len(own), None)
    return ThroughSlots([staged(row) for row in rows], len(seen), seen)
