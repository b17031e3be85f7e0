"""Where the frames of a pass stand in pages and in time: host integers, ready to be put into tensors.

Keys stay as they were stored, rotated at a place. A group that sees a frame at another position turns its query by
the difference instead, once for the frames that stand as its own do and once more for the sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import InferixError, UsageError
from ...graphs.passes import Group, Pass
from ...schemes.context import ContextPolicy
from .pages import PageTable


@dataclass(frozen=True)
class GroupPages:
    """One group of a pass over pages.

    pages and positions: of its own frames, where keys are written and at which temporal position they are stored.
    listed: pages it sees, the first `sinks` of them with its queries at `sink_positions`, the rest at `positions`.
    """

    pages: tuple[int, ...]
    positions: tuple[int, ...]
    listed: tuple[int, ...]
    sinks: int
    sink_positions: tuple[int, ...]


def fresh_pages(run: Pass, table: PageTable) -> int:
    """Free pages that a pass needs: for frames that it writes but shares, and for those that it does not keep."""
    written = sum(table.count_shared(group.frames) for group in run.groups if group.write)
    return written + sum(len(group.frames) for group in run.groups if not group.write) - len(table.scratch)


def layout_pass(run: Pass, table: PageTable, moving: bool) -> list[GroupPages]:
    """Rows of a pass, one for each group; the table takes note of what is written and borrows scratch pages.

    Keys are stored at the group's positions, or where those move, at the frames' own numbers.
    """
    table.free_scratch()
    table.pool.require(fresh_pages(run, table))
    positions = dict(table.positions)
    for group in run.groups:
        stored = group.frames if moving else tuple(map(group.position_of, group.frames))
        if group.write:
            table.write(group.frames, stored)
        positions |= dict(zip(group.frames, stored, strict=True))
    table.alloc_scratch([frame for group in run.groups if not group.write for frame in group.frames])
    pages = table.pages | table.scratch
    return [_row(group, pages, positions) for group in run.groups]


def _row(group: Group, pages: dict[int, int], positions: dict[int, int]) -> GroupPages:
    if unwritten := [frame for frame in group.context if frame not in positions]:
        raise InferixError(f"frames {unwritten} are attended to, but nothing has written their keys and values")
    shifts = {frame: positions[frame] - at for frame, at in zip(group.context, group.positions, strict=True)}
    own = shifts[group.frames[0]]
    others = sorted({shift for shift in shifts.values() if shift != own})
    if len(others) > 1 or any(shifts[frame] != own for frame in group.frames):
        raise UsageError(
            f"frames {group.context} at positions {group.positions} are stored at {sorted(set(shifts.values()))} from "
            "there; pages allow one shift for a block with its window and one for its sink. Use absolute positions, "
            "or no scene cuts (shot_offset=0)"
        )
    sinks = [frame for frame in group.context if shifts[frame] != own]
    window = [frame for frame in group.context if shifts[frame] == own]
    turn = others[0] if others else own
    at = [group.position_of(frame) for frame in group.frames]
    return GroupPages(
        pages=tuple(pages[frame] for frame in group.frames),
        positions=tuple(positions[frame] for frame in group.frames),
        listed=tuple(pages[frame] for frame in sinks + window),
        sinks=len(sinks),
        sink_positions=tuple(position + turn for position in at),
    )


def parts_of(rows: list[GroupPages]) -> list[list[GroupPages]]:
    """Neighbouring rows with equally many frames together: each list is one launch."""
    parts: list[list[GroupPages]] = []
    for row in rows:
        if parts and len(parts[-1][0].pages) == len(row.pages):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def interleaved(passes: Sequence[list[GroupPages]]) -> list[GroupPages]:
    """Rows of passes that have the same parts as those of one pass: in each part, one pass after the other."""
    return [row for parts in zip(*map(parts_of, passes), strict=True) for part in parts for row in part]


def rotates_for_sink(policy: ContextPolicy, rows: list[GroupPages]) -> bool:
    """Whether the tables of a part turn queries for a sink; where the policy does, in every pass, so that the tables
    keep their shapes.
    """
    return (policy.moving_positions and policy.sink_size > 0) or any(row.sinks for row in rows)


@dataclass(frozen=True)
class ThroughSlots:
    """Rows whose frames go through a buffer of `slots`, the pass's own first, in order.

    seen: pages that are read through the buffer, by slot; None where rows list the pages themselves.
    """

    rows: list[GroupPages]
    slots: int
    seen: list[int] | None


def through_slots(rows: list[GroupPages], read_in_place: bool) -> ThroughSlots:
    """The same pass, written through a buffer, and read through it unless pages can be read in place."""
    own = [page for row in rows for page in row.pages]
    seen = list(dict.fromkeys([*own, *(page for row in rows for page in row.listed)]))
    slot = {page: index for index, page in enumerate(seen)}

    def moved(row: GroupPages) -> GroupPages:
        pages = tuple(slot[page] for page in row.pages)
        return replace(row, pages=pages, listed=row.listed if read_in_place else tuple(slot[p] for p in row.listed))

    if read_in_place:
        return ThroughSlots([moved(row) for row in rows], len(own), None)
    return ThroughSlots([moved(row) for row in rows], len(seen), seen)
