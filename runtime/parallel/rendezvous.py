"""Where ranks meet: environment, store, and process group.

Ranks are started by `launch`, by torchrun, or by srun. All say rank, number of ranks and the address of rank 0 in the
environment; each rank makes a client of one `TCPStore` from it, and the group of collectives from that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...errors import InferixError, UsageError, quoted
from ...graphs.shards import Axis, Shard, Stage
from ...kernels.collectives import RankGroup, add_group
from ...schemes.layouts import RankGrid

START = timedelta(seconds=120)  # for all ranks to be there
LOCAL = "127.0.0.1"
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One rank of several. local: number among the ranks of its machine. hosted: the launcher holds the store."""

    rank: int
    ranks: int
    local: int
    host: str
    port: int
    hosted: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Place | None:
        """The place that the environment names, as torchrun and srun set it; None where there is one rank.

        UsageError for a variable that is missing or no number.
        """
        values = dict(environment)
        if "RANK" not in values and int(values.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # started by srun
            values |= {
                "RANK": values.get("SLURM_PROCID", ""), "WORLD_SIZE": values["SLURM_STEP_NUM_TASKS"],
                "LOCAL_RANK": values.get("SLURM_LOCALID", "0"),
            }  # fmt: skip
        if "RANK" not in values or values.get("WORLD_SIZE", "1") == "1":
            return None
        numbers = {"LOCAL_RANK": 0}
        for name in VARIABLES:
            if name not in values:
                raise UsageError(f"RANK is {quoted(values['RANK'])}, but {name} is not set; start ranks by torchrun")
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
            if name in values:
                if not values[name].isdecimal():
                    raise UsageError(f"{name} is {quoted(values[name])}; expected a whole number")
                numbers[name] = int(values[name])
        if numbers["RANK"] >= numbers["WORLD_SIZE"]:
            raise UsageError(f"RANK is {numbers['RANK']}; expected less than WORLD_SIZE, {numbers['WORLD_SIZE']}")
        return cls(
            numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], values["MASTER_ADDR"],
            numbers["MASTER_PORT"], values.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(self.local),
            "MASTER_ADDR": self.host, "MASTER_PORT": str(self.port), "TORCHELASTIC_USE_AGENT_STORE": str(self.hosted),
        }  # fmt: skip


def host_store(host: str, ranks: int) -> dist.TCPStore:
    """A store on a free port, for ranks of which this process is 0, or their launcher."""
    return dist.TCPStore(host, 0, ranks, True, START, wait_for_workers=False)


def join_store(place: Place) -> dist.TCPStore:
    """The store of a place; rank 0 holds it unless its launcher does. UsageError for a port in use."""
    holds = place.rank == 0 and not place.hosted
    try:
        return dist.TCPStore(place.host, place.port, place.ranks, holds, START, wait_for_workers=False)
    except RuntimeError as error:
        if holds and "EADDRINUSE" in str(error):
            raise UsageError(
                f"MASTER_PORT is {place.port}, which another program uses; take another one, such as {place.port + 1}"
            ) from error
        raise InferixError(f"no rank 0 at {place.host}:{place.port}: {' '.join(str(error).split())[:200]}") from error


def join_group(store: dist.TCPStore, place: Place, name: str, device: torch.device, timeout: float) -> RankGroup:
    """The group of all ranks, which waits until each of them has joined it."""
    inner, limit = dist.PrefixStore(f"inferix/{name}", store), timedelta(seconds=timeout)
    group: Any
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        group = dist.ProcessGroupNCCL(inner, place.rank, place.ranks, options)
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = limit
        host = {"hostname": place.host} if place.host in (LOCAL, "localhost") else {}
        options._devices = [
            dist.ProcessGroupGloo.create_device(**host) if host else dist.ProcessGroupGloo.create_default_device()
        ]
        group = dist.ProcessGroupGloo(inner, place.rank, place.ranks, options)
    return RankGroup(group, place.rank, place.ranks)


def join_grid(
    store: dist.TCPStore, place: Place, grid: RankGrid, name: str, device: torch.device, timeout: float,
    shard_weights: bool = False, shard_decoder: bool = False,
) -> tuple[RankGroup, Shard]:  # fmt: skip
    """The group of all ranks, and this rank's part of every pass, with the groups that it communicates in.

    shard_weights: ranks of a pass divide the weights. shard_decoder: all ranks divide the decoded pictures.
    """
    whole = join_group(store, place, name, device, timeout)
    tile, head = place.rank % grid.tiles, place.rank % grid.heads
    branch, token = place.rank // (grid.tiles * grid.layers), tile // grid.heads

    def number(part: str, rank: int, ranks: int) -> int:
        """Number of the group of some ranks, of which this is `rank`."""
        if ranks in (1, place.ranks):
            return add_group(whole) if ranks > 1 else 0
        own = replace(place, rank=rank, ranks=ranks)
        return add_group(replace(join_group(store, own, f"{name}/{part}", device, timeout), traffic=whole.traffic))

    group = number(f"pass/{branch}", tile, grid.tiles)
    heads = group if grid.heads == grid.tiles else number(f"heads/{branch}/{token}", head, grid.heads)
    tokens = group if grid.tokens == grid.tiles else number(f"tokens/{branch}/{head}", token, grid.tokens)
    weights = Axis(grid.tiles, tile, group) if shard_weights else Axis()
    stage = Stage()
    if grid.layers > 1:
        after, before = place.rank < grid.layers - 1, place.rank > 0
        given = number(f"layers/{place.rank - 1}", 1, 2) if before else 0
        stage = Stage(
            grid.layers, place.rank, given, number(f"layers/{place.rank}", 0, 2) if after else 0, add_group(whole)
        )
    every = max(group if grid.tiles == place.ranks else 0, stage.group) or add_group(whole)
    columns = Axis(place.ranks, place.rank, every) if shard_decoder else Axis()
    return whole, Shard(
        Axis(grid.heads, head, heads), Axis(grid.tokens, token, tokens), group, Axis(grid.branches, branch), weights,
        columns, stage, every,
    )  # fmt: skip
