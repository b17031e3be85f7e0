"""The worker of several ranks, in the process of rank 0: each plan runs on all ranks, of which this is one.

Every rank keeps a part of each page (see `graphs/shards.py`). What a plan takes is divided among the ranks, and what
it gives is joined, so that a session saved by several ranks is that of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import RankFailed
from ...graphs.shards import Shard
from ...graphs.tiles import shares
from ...kernels.collectives import CollectiveFailed, RankGroup, remove_groups
from ...models.column_decoder import divided_columns
from ..execution.executors import Executor
from ..plans import (
    CloseStore,
    Decode,
    Grid,
    GuidedPass,
    PassPlan,
    Plan,
    ReadDecoding,
    ReadHost,
    ReadPages,
    ReadSink,
    Release,
    SetDecoding,
    SetSink,
    WritePages,
    encode_plan,
)
from ..worker import LocalWorker
from .messages import Message
from .peers import Peer, Peers

GIVES = (ReadPages, ReadHost, ReadSink, ReadDecoding)  # plans whose tensors are joined from all ranks
TAKES = (WritePages, SetSink)  # plans whose tensors are divided among the ranks
PASSES = (PassPlan, GuidedPass, Decode)  # plans whose tensors are the same on all ranks, and on their device
OF_THE_END = (Release, CloseStore)  # plans that have nothing to do once the ranks have ended


class RankedWorker:
    """Runs plans on the ranks of a group. local: the worker of this rank, 0."""

    def __init__(self, local: LocalWorker, peers: Peers, group: RankGroup) -> None:
        self.local, self.peers, self.group = local, peers, group
        self.shard = local.parts.shard
        self.end = weakref.finalize(self, end_world, peers, self.shard)  # also at the exit of the process

    @property
    def supports_whole_block(self) -> bool:
        return self.local.supports_whole_block

    @property
    def executors(self) -> tuple[Executor, ...]:
        return self.local.executors

    def of_branches(self, place: int) -> BranchRanks:
        """The ranks that run the branches of guidance of a place."""
        return BranchRanks(self, place)

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = (), place: int | None = None) -> list[Tensor]:
        """Run a plan on all ranks; RankFailed, which names the rank, where one of them ends, hangs or fails alone.

        place: of branches of guidance, whose ranks alone run the plan. An error that all ranks raise is raised as this
        rank's own; the ranks live on.
        """
        if self.peers.fault is not None and isinstance(plan, OF_THE_END):
            return []
        moved = isinstance(plan, PASSES)
        parts = self.divided(plan, tensors)
        number = self.peers.ran + 1
        shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        values, encoded = {"number": number, "shapes": shapes if moved else [], "place": place}, encode_plan(plan)
        try:
            self.peers.send(
                lambda peer: Message("plan", values, encoded, () if moved else tuple(self.part_of(peer, parts)))
            )  # fmt: skip
            if moved:
                for tensor in parts[0]:
                    self.group.broadcast(tensor)
            result = self.local.execute(plan, parts[0]) if place in (None, self.shard.branches.place) else []
            if isinstance(plan, GuidedPass):
                result = self.collected(plan, parts[0][0], result)
        except CollectiveFailed as error:
            self.peers.wait_for_fault(str(error))
            raise
        except (KeyboardInterrupt, SystemExit):
            self.peers.fail("rank 0 was interrupted within a pass")
            raise
        except Exception as error:  # of any kind: it is raised again, once the other ranks are known to have it or end
            if not self.peers.all_failed():
                self.peers.fail(f"rank 0 failed: {type(error).__name__}: {error}")
                raise RankFailed(self.peers.fault or "") from error
            self.peers.failed_together()
            raise
        self.peers.finished()
        if isinstance(plan, GIVES):
            return self.whole(plan, [result, *(list(message.tensors) for message in self.peers.replies())], place)
        return result

    def part_of(self, peer: Peer, parts: Sequence[list[Tensor]]) -> list[Tensor]:
        """The part of a rank, of one for each rank or for each rank of a branch of guidance."""
        return parts[peer.rank % len(parts)]

    def collected(self, plan: GuidedPass, latents: Tensor, own: Sequence[Tensor]) -> list[Tensor]:
        """Velocities of all branches, by their order in the plan, of which this rank has some.

        The first rank of each place sends those of its branches.
        """
        mine, velocities = iter(own), list[Tensor]()
        for branch in plan.branches:
            if branch.place == self.shard.branches.place:
                velocities.append(next(mine))
                continue
            batch, _, *sizes = latents.shape
            velocity = latents.new_empty(batch, len(branch.frames), *sizes)
            self.group.receive(velocity, branch.place * self.shard.ranks)
            velocities.append(velocity)
        return velocities

    def divided(self, plan: Plan, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors that each rank takes, by its number among all, or among those of its branches."""
        if isinstance(plan, SetDecoding):
            ranks = self.shard.columns.size
            columns = [divided_columns(tensor, plan.columns, ranks) for tensor in tensors]
            return [[parts[rank].contiguous() for parts in columns] for rank in range(ranks)]
        if isinstance(plan, TAKES) and (stage := self.shard.stage).size > 1:
            by_layer = [tensor.split(shares(len(tensor), stage.size)) for tensor in tensors]
            return [[parts[rank].contiguous() for parts in by_layer] for rank in range(stage.size)]
        if isinstance(plan, TAKES):
            per_tensor = [divided(tensor, self.shard, plan.grid) for tensor in tensors]
            return [[parts[rank] for parts in per_tensor] for rank in range(self.shard.ranks)]
        return [[tensor.contiguous() for tensor in tensors]] * self.shard.ranks

    def whole(self, plan: Plan, replies: Sequence[list[Tensor]], place: int | None) -> list[Tensor]:
        """The tensors that a plan gives, from those of each rank."""
        if isinstance(plan, ReadDecoding):
            (slots, *_), *_ = replies
            return [slots, *(on_one(parts, -1) for parts in zip(*(own[1:] for own in replies), strict=True))]
        if self.shard.stage.size > 1:
            return [on_one(parts, 0) for parts in zip(*replies, strict=True)]
        assert isinstance(plan, ReadPages | ReadHost | ReadSink)
        first = (place or 0) * self.shard.ranks  # without a place, a plan gives the tensors of all ranks
        own = replies[first : first + self.shard.ranks]
        return [self.joined(plan.grid, parts) for parts in zip(*own, strict=True)]

    def joined(self, grid: Grid, parts: Sequence[Tensor]) -> Tensor:
        return joined([part.to(parts[0].device) for part in parts], self.shard, grid)


def end_world(peers: Peers, shard: Shard) -> None:
    """End all ranks, and free the numbers of their groups here."""
    peers.close()
    remove_groups(shard.groups)


@dataclass(frozen=True)
class BranchRanks:
    """Worker of the ranks of `ranked` that run the branches of guidance of one place."""

    ranked: RankedWorker
    place: int

    @property
    def supports_whole_block(self) -> bool:
        return self.ranked.supports_whole_block

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        return self.ranked.execute(plan, tensors, self.place)


def on_one(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts of all ranks along a dimension, as one tensor on the device of the first."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim=dim)


def divided(pages: Tensor, shard: Shard, grid: Grid) -> list[Tensor]:
    """Parts of pages [layers, 2, n, page_tokens, heads, head_dim], or of scales [layers, 2, n, heads], by rank."""
    if pages.ndim == 4:  # pages with scales are not divided by tokens
        return [part.contiguous() for part in pages.chunk(shard.heads.size, dim=3)]
    regions = shard.regions(grid).split(pages.flatten(0, 2), grid)  # [regions, layers * 2 * n, t, heads, head_dim]
    parts = [part for region in regions for part in region.chunk(shard.heads.size, dim=2)]
    return [part.unflatten(0, pages.shape[:3]).contiguous() for part in parts]


def joined(parts: Sequence[Tensor], shard: Shard, grid: Grid) -> Tensor:
    """The pages or scales whose parts by rank these are."""
    if parts[0].ndim == 4:
        return torch.cat(list(parts), dim=3)
    heads, flat = shard.heads.size, [part.flatten(0, 2) for part in parts]
    regions = torch.stack([torch.cat(flat[first : first + heads], dim=2) for first in range(0, len(flat), heads)])
    return shard.regions(grid).tokens(regions, grid).unflatten(0, parts[0].shape[:3])
