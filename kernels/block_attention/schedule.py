"""Schedule of the warp-specialised kernel as a table: its barriers, and the steps of each warp group in order.

`hopper.py` unrolls the table while it is compiled, so that a change of it is a change of the kernel. Tests run the same
kernel in plain Python, where a table with a dropped arrive, a flipped phase or a missing wait deadlocks or races.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Barrier:
    """Barriers (mbarrier) of a ring of buffers, one a stage.

    ring: "q", of which an item of work fills one stage, or "k" or "v", of which a tile of keys does. arrivals: those
    that complete a phase, bytes of loads apart.
    """

    name: str
    ring: str
    arrivals: int


@dataclass(frozen=True)
class Step:
    """One step of a warp group.

    does: "wait" until the phase of barrier `on` is complete; "arrive" there; "expect" the bytes of its ring there,
    which is an arrival too; "load" the next stage of ring `on`, completing at barrier `at`; begin product "qk" or "pv";
    "ready": wait until product `on` is complete and `left` later ones may not be; "softmax"; "rescale" the result.
    back: how many tiles before the current one. phase: 1 to wait for the phase before, which a fresh barrier counts as
    complete, so that the first fill of a stage waits for nothing.
    """

    does: str
    on: str = ""
    at: str = ""
    back: int = 0
    phase: int = 0
    left: int = 0


@dataclass(frozen=True)
class Schedule:
    """Barriers, depth of each ring, and the parts of a warp group's program.

    parts: "fill item" and "fill tile" of the producer; "begin", "first", "each" and "last" of a consumer: before the
    tiles of an item, of its first tile, of each further tile, and after the last.
    """

    depths: tuple[tuple[str, int], ...]
    barriers: tuple[Barrier, ...]
    parts: tuple[tuple[str, tuple[Step, ...]], ...]

    def barrier(self, name: str) -> Barrier:
        return next(barrier for barrier in self.barriers if barrier.name == name)

    def depth(self, ring: str) -> int:
        """Number of stages of a ring."""
        return dict(self.depths)[ring]

    def offset(self, name: str) -> int:
        """Place of a barrier's first stage among all barriers in memory."""
        before = self.barriers[: self.barriers.index(self.barrier(name))]
        return sum(self.depth(barrier.ring) for barrier in before)

    def arrivals(self) -> tuple[int, ...]:
        """Arrivals of every barrier in memory, in order."""
        return tuple(barrier.arrivals for barrier in self.barriers for _ in range(self.depth(barrier.ring)))

    def steps(self, part: str) -> tuple[Step, ...]:
        return dict(self.parts)[part]


def make_schedule(stages: int, consumers: int) -> Schedule:
    """The schedule with `stages` tiles of keys and of values in flight, for a number of consumer warp groups.

    Product QK of a tile and PV of the tile before run together, and beside the softmax of the tile.
    """
    return Schedule(
        depths=(("q", 1), ("k", stages), ("v", stages)),
        barriers=(
            Barrier("q_full", "q", 1), Barrier("q_free", "q", consumers),
            Barrier("k_full", "k", 1), Barrier("k_free", "k", consumers),
            Barrier("v_full", "v", 1), Barrier("v_free", "v", consumers),
        ),
        parts=(
            ("fill item", (Step("wait", "q_free", phase=1), Step("expect", "q_full"), Step("load", "q", at="q_full"))),
            ("fill tile", (
                Step("wait", "k_free", phase=1), Step("expect", "k_full"), Step("load", "k", at="k_full"),
                Step("wait", "v_free", phase=1), Step("expect", "v_full"), Step("load", "v", at="v_full"),
            )),
            ("begin", (Step("wait", "q_full"),)),
            ("first", (
                Step("wait", "k_full"), Step("qk"), Step("ready", "qk"), Step("arrive", "k_free"), Step("softmax"),
            )),
            ("each", (
                Step("wait", "k_full"), Step("qk"), Step("wait", "v_full", back=1), Step("pv", back=1),
                Step("ready", "qk", left=1), Step("arrive", "k_free"), Step("softmax"),
                Step("ready", "pv"), Step("arrive", "v_free", back=1), Step("rescale"),
            )),
            ("last", (
                Step("arrive", "q_free"), Step("wait", "v_full", back=1), Step("pv", back=1), Step("ready", "pv"),
                Step("arrive", "v_free", back=1),
            )),
        ),
    )  # fmt: skip
