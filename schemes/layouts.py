"""Layouts of one world over several ranks: which fit a model, and the bytes that they send.

Integers only, for the engine before weights are loaded and for the planner before there is anything. Sizes are those of
a model and of the token grid of its pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError, nearest, quoted

LAYOUTS = ("ulysses", "pass-q")  # in the order of preference where both fit
AUTO = "auto"
MOST_RANKS = 64


@dataclass(frozen=True)
class Divided:
    """Counts that ranks divide: heads of queries, heads of keys and values, and a frame's tokens (rows, columns)."""

    heads: int
    kv_heads: int
    grid: tuple[int, int]

    def reason_against(self, layout: str, ranks: int) -> str | None:
        """Why `ranks` ranks cannot have a layout; None where they can."""
        rows, columns = self.grid
        if not any(
            ranks % part == 0 and rows % part == 0 and columns % (ranks // part) == 0 for part in range(1, ranks + 1)
        ):
            return f"a frame of {rows} x {columns} tokens has no {ranks} equal tiles"
        if layout == "ulysses" and (self.heads % ranks or self.kv_heads % ranks):
            heads = f"{self.heads} heads" + (f" and {self.kv_heads} of keys" if self.kv_heads != self.heads else "")
            return f"{ranks} ranks do not divide {heads}"
        return None

    def layouts(self, ranks: int) -> tuple[str, ...]:
        """Layouts that `ranks` ranks can have, the preferred one first."""
        return tuple(layout for layout in LAYOUTS if self.reason_against(layout, ranks) is None)

    def counts(self, layouts: Iterable[str] = LAYOUTS, most: int = MOST_RANKS) -> tuple[int, ...]:
        """Numbers of ranks from 2 on that one of the layouts fits."""
        return tuple(
            ranks for ranks in range(2, most + 1)
            if any(self.reason_against(layout, ranks) is None for layout in layouts)
        )  # fmt: skip


def choose_layout(divided: Divided, ranks: int, parallel: str = AUTO) -> str:
    """The layout that `parallel` names, or the preferred one; UsageError, with the nearest that works, for none."""
    if parallel != AUTO and parallel not in LAYOUTS:
        raise UsageError(
            f"parallel is {quoted(parallel)}{nearest(parallel, (AUTO, *LAYOUTS))}; expected {AUTO}, "
            f"{', '.join(LAYOUTS)}"
        )
    wanted = LAYOUTS if parallel == AUTO else (parallel,)
    reasons = {layout: divided.reason_against(layout, ranks) for layout in wanted}
    fitting = [layout for layout, reason in reasons.items() if reason is None]
    if fitting:
        return fitting[0]
    against = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
    advice = []
    if others := [layout for layout in divided.layouts(ranks) if layout not in wanted]:
        advice.append(f"give parallel={others[0]}, which fits {ranks}")
    if counts := divided.counts(wanted):
        near = sorted(counts, key=lambda count: (abs(count - ranks), count))[0]
        advice.append(f"give gpus={near}, the nearest that works with {' or '.join(wanted)}")
    advice = advice or ["give gpus=1"]
    raise UsageError(f"gpus is {ranks} with parallel={parallel}, but {against}; {', or '.join(advice)}")


@dataclass(frozen=True)
class PassShape:
    """Sizes of one pass that decide what it sends.

    tokens: of all its frames. sinks: True where queries are rotated once more for the sink. velocity: entries of its
    result. batch: sessions, or branches of guidance, in the pass.
    """

    tokens: int
    sinks: bool
    velocity: int
    batch: int = 1


def bytes_sent(
    layout: str, ranks: int, shape: PassShape, divided: Divided, head_dim: int, layers: int, item: int,
    last_reads: bool = True,
) -> int:  # fmt: skip
    """Bytes that one rank sends to all others in one pass.

    item: bytes of a number. last_reads: False where nothing reads the result of the last layer's attention.
    """
    share = ranks - 1
    tokens = shape.batch * shape.tokens // ranks  # of a rank's tile
    entry = head_dim * item
    velocity = share * shape.batch * shape.velocity // ranks * item
    back = layers if last_reads else layers - 1
    if layout == "ulysses":
        there = tokens * (divided.heads + 2 * divided.kv_heads) // ranks * entry * share
        return layers * there + back * (tokens * divided.heads // ranks * entry * share) + velocity
    wide = max(item, 4)
    queries = (1 + shape.sinks) * share * tokens * divided.heads * entry
    partial = share * tokens * divided.heads * (head_dim + 1) * wide
    return back * (queries + partial) + velocity

