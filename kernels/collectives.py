"""Collectives between the ranks of one world as ops of a traced pass: `all_to_all`, `all_gather` and `hand_over`.

The ops name their ranks by the number of a group of this process, so that their schema is tensors and integers. Bytes
travel as they are, so every dtype does, and a result has the same bits on every rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InferixError, UsageError
from .op import Op
from .spec import Arg, OpSpec


class CollectiveFailed(InferixError):
    """A collective that ended because another rank did, or that waited for one for too long."""


@dataclass(eq=False)
class Traffic:
    """Counters of what this rank sent, in all groups of one world.

    sent: bytes to other ranks; calls: collectives. since: time (`time.monotonic`) at which the collective that runs now
    began, or None.
    """

    sent: int = 0
    calls: int = 0
    since: float | None = None


@dataclass(eq=False)
class RankGroup:
    """Ranks that communicate.

    process_group: of torch.distributed; of any backend. rank: this one's number in it. traffic: counters, which groups
    of one world share.
    """

    process_group: Any
    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    def wait(self, begin: Callable[[], Any], sent: int, calls: int = 1) -> None:
        """Run a collective in which this rank sends `sent` bytes to others; CollectiveFailed where others are gone."""
        traffic = self.traffic
        traffic.since = time.monotonic()
        try:
            begin().wait()
        except RuntimeError as error:
            raise CollectiveFailed(f"a collective of {self.size} ranks failed: {str(error).splitlines()[0]}") from error
        finally:
            traffic.since = None
        traffic.sent += sent
        traffic.calls += calls

    def broadcast(self, tensor: Tensor) -> None:
        """Copy a tensor of rank 0 to all ranks; not counted, since it is no part of a pass."""
        self.wait(lambda: self.process_group.broadcast([as_bytes(tensor)]), 0, calls=0)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a tensor to another rank, which receives it."""
        self.wait(lambda: self.process_group.send([as_bytes(tensor)], rank, 0), tensor.nbytes)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill a tensor with that which another rank sends."""
        self.wait(lambda: self.process_group.recv([as_bytes(tensor)], rank, 0), 0, calls=0)

    def swap(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Send a tensor to each of some other ranks, each of which sends one of its shape back; returns those.

        All ranks of the group call it. The tensors have one shape.
        """
        ranks = sorted(parts)
        sizes = [parts[rank].nbytes if rank in parts else 0 for rank in range(self.size)]
        sent = torch.stack([parts[rank] for rank in ranks]).contiguous()
        received = sent.new_empty(sent.shape)
        self.wait(
            lambda: self.process_group.alltoall_base(as_bytes(received), as_bytes(sent), sizes, sizes), sent.nbytes
        )
        return dict(zip(ranks, received, strict=True))


GROUPS: dict[int, RankGroup] = {}  # of this process, by number


def add_group(group: RankGroup) -> int:
    """Register a group; returns its number."""
    number = max(GROUPS, default=0) + 1
    GROUPS[number] = group
    return number


def remove_groups(numbers: Iterable[int]) -> None:
    """Forget groups, whose numbers are then free for those of another world."""
    for number in numbers:
        GROUPS.pop(number, None)


def group_of(number: int) -> RankGroup:
    if number not in GROUPS:
        raise UsageError(f"group is {number}; expected one of {sorted(GROUPS)}: the ranks of this process have ended")
    return GROUPS[number]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def exchange_reference(x: Tensor, out: Tensor, group: int) -> None:
    """See the public function for shapes."""
    ranks = group_of(group)
    if len(x) != ranks.size:
        raise UsageError(f"all_to_all: x has {len(x)} parts; expected {ranks.size}, one for each rank")
    sent = x.nbytes // ranks.size * (ranks.size - 1)
    ranks.wait(lambda: ranks.process_group.alltoall_base(as_bytes(out), as_bytes(x), [], []), sent)


def gather_reference(x: Tensor, out: Tensor, group: int) -> None:
    """See the public function for shapes."""
    ranks = group_of(group)
    if len(out) != ranks.size:
        raise UsageError(f"all_gather: out has {len(out)} parts; expected {ranks.size}, one for each rank")
    parts = [as_bytes(part) for part in out]
    ranks.wait(lambda: ranks.process_group.allgather([parts], [as_bytes(x)]), x.nbytes * (ranks.size - 1))


def hand_over_reference(x: Tensor, out: Tensor, group: int) -> None:
    """See the public function for shapes."""
    ranks = group_of(group)
    if ranks.size != 2:
        raise UsageError(f"hand_over: group {group} has {ranks.size} ranks; expected 2")
    first = ranks.rank == 0
    if first:
        out.copy_(x)
    ranks.wait(lambda: ranks.process_group.broadcast([as_bytes(out)]), x.nbytes if first else 0)


ALL_TO_ALL_SPEC = OpSpec(
    name="all_to_all",
    reference=exchange_reference,
    outputs=("out",),
    like="x",
    args={"x": Arg("ranks entries"), "out": Arg("ranks entries", ("x",))},
    family="exchange",
    label="all-to-all",
    flops="0",
)
ALL_GATHER_SPEC = OpSpec(
    name="all_gather",
    reference=gather_reference,
    outputs=("out",),
    like="x",
    args={"x": Arg("entries"), "out": Arg("ranks entries", ("x",))},
    family="exchange",
    label="all-gather",
    flops="0",
)
HAND_OVER_SPEC = OpSpec(
    name="hand_over",
    reference=hand_over_reference,
    outputs=("out",),
    like="x",
    args={"x": Arg("entries"), "out": Arg("entries", ("x",))},
    family="exchange",
    label="hand-over",
    flops="0",
    awaited=True,
)
ALL_TO_ALL, ALL_GATHER, HAND_OVER = Op(ALL_TO_ALL_SPEC), Op(ALL_GATHER_SPEC), Op(HAND_OVER_SPEC)


def all_to_all(x: Tensor, *, group: int, out: Tensor | None = None) -> Tensor:
    """Send part i of x [ranks, ...] to rank i; returns [ranks, ...] whose part i came from rank i.

    group: number of `add_group`. Raises UsageError for another number of parts than ranks. Source: MPI_Alltoall.
    """
    flat = x.contiguous().view(len(x), -1)
    out = flat.new_empty(flat.shape) if out is None else out.view(flat.shape)
    ALL_TO_ALL(flat, out, group)
    return out.view(x.shape)


def all_gather(x: Tensor, *, ranks: int, group: int, out: Tensor | None = None) -> Tensor:
    """Return [ranks, ...] whose part i is x [...] of rank i. group: number of `add_group`, of `ranks` ranks.

    Raises UsageError for another number of ranks. Source: MPI_Allgather.
    """
    flat = x.contiguous().view(-1)
    out = flat.new_empty(ranks, *flat.shape) if out is None else out.view(ranks, -1)
    ALL_GATHER(flat, out, group)
    return out.view(ranks, *x.shape)


def hand_over(x: Tensor, *, group: int, out: Tensor | None = None) -> Tensor:
    """Return x [...] of the first of two ranks, on both. group: number of `add_group`, of two ranks.

    A graph runs it even where this rank does not read the result. Raises UsageError for another number of ranks.
    """
    flat = x.contiguous().view(-1)
    out = flat.new_empty(flat.shape) if out is None else out.view(flat.shape)
    HAND_OVER(flat, out, group)
    return out.view(x.shape)
