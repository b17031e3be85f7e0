"""The worker of several ranks, in the process of rank 0: each plan runs on all ranks, of which this is one.

Every rank keeps a part of each page (see `graphs/shards.py`). What a plan takes is divided among the ranks, and what
it gives is joined, so that a session saved by several ranks is that of one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import RankFailed
from ...graphs.shards import Shard
from ...kernels.collectives import CollectiveFailed, RankGroup
from ..execution.executors import Executor
from ..plans import (
    CloseStore,
    Grid,
    PassPlan,
    Plan,
    ReadHost,
    ReadPages,
    ReadSink,
    Release,
    SetSink,
    WritePages,
    encode_plan,
)
from ..worker import LocalWorker
from .messages import Message
from .peers import Peers

GIVES = (ReadPages, ReadHost, ReadSink)  # plans whose tensors are joined from all ranks
TAKES = (WritePages, SetSink)  # plans whose tensors are divided among the ranks
OF_THE_END = (Release, CloseStore)  # plans that have nothing to do once the ranks have ended


class RankedWorker:
    """Runs plans on the ranks of a group. local: the worker of this rank, 0."""

    def __init__(self, local: LocalWorker, peers: Peers, group: RankGroup) -> None:
        self.local, self.peers, self.group = local, peers, group
        self.shard = local.parts.shard
        self.end = weakref.finalize(self, peers.close)  # also at the exit of the process

    @property
    def supports_whole_block(self) -> bool:
        return self.local.supports_whole_block

    @property
    def executors(self) -> tuple[Executor, ...]:
        return self.local.executors

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        """Run a plan on all ranks; RankFailed, which names the rank, where one of them ends, hangs or fails alone.

        An error that all ranks raise is raised as this rank's own; the ranks live on.
        """
        if self.peers.fault is not None and isinstance(plan, OF_THE_END):
            return []
        parts = self.divided(plan, tensors)
        number = self.peers.ran + 1
        shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        moved = isinstance(plan, PassPlan)  # its tensors are the same on all ranks, and on their device
        values, encoded = {"number": number, "shapes": shapes if moved else []}, encode_plan(plan)
        try:
            self.peers.send(
                lambda peer: Message("plan", values, encoded, () if moved else tuple(parts[peer.rank]))
            )  # fmt: skip
            if moved:
                for tensor in parts[0]:
                    self.group.broadcast(tensor)
            result = self.local.execute(plan, parts[0])
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
            replies = [list(message.tensors) for message in self.peers.replies()]
            return [self.joined(plan.grid, [mine, *theirs]) for mine, *theirs in zip(result, *replies, strict=True)]
        return result

    def divided(self, plan: Plan, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors that each rank takes."""
        if isinstance(plan, TAKES):
            per_tensor = [divided(tensor, self.shard, plan.grid) for tensor in tensors]
            return [[parts[rank] for parts in per_tensor] for rank in range(self.shard.ranks)]
        return [[tensor.contiguous() for tensor in tensors]] * self.shard.ranks

    def joined(self, grid: Grid, parts: Sequence[Tensor]) -> Tensor:
        return joined([part.to(parts[0].device) for part in parts], self.shard, grid)


def divided(pages: Tensor, shard: Shard, grid: Grid) -> list[Tensor]:
    """Parts of pages [layers, 2, n, page_tokens, heads, head_dim], or of scales [layers, 2, n, heads], by rank."""
    if pages.ndim == 4 or shard.layout == "ulysses":
        return [part.contiguous() for part in pages.chunk(shard.ranks, dim=3 if pages.ndim == 4 else 4)]
    flat = pages.flatten(0, 2)
    parts = shard.tiles(grid).split(flat, grid)
    return [part.unflatten(0, pages.shape[:3]).contiguous() for part in parts]


def joined(parts: Sequence[Tensor], shard: Shard, grid: Grid) -> Tensor:
    """The pages or scales whose parts by rank these are."""
    if parts[0].ndim == 4 or shard.layout == "ulysses":
        return torch.cat(list(parts), dim=3 if parts[0].ndim == 4 else 4)
    tiled = torch.stack([part.flatten(0, 2) for part in parts])
    return shard.tiles(grid).tokens(tiled, grid).unflatten(0, parts[0].shape[:3])

