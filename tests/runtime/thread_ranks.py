"""Ranks as threads of one process: the workers, messages and collectives of several processes, without their start."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from oracles import make_engine
from torch import Tensor

from inferix.graphs.lowered import Lowered
from inferix.graphs.shards import Shard
from inferix.kernels.collectives import RankGroup, remove_groups
from inferix.models.family import Checkpoint
from inferix.models.fingerprints import fingerprint
from inferix.models.registry import family_of
from inferix.runtime.capacity.rank_planner import divided
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.execution.loading import Components
from inferix.runtime.parallel import rank_process
from inferix.runtime.parallel.messages import Connection, Message
from inferix.runtime.parallel.peers import Peer, Peers
from inferix.runtime.parallel.ranked_worker import RankedWorker
from inferix.runtime.parallel.rendezvous import LOCAL, Place, join_grid, join_store
from inferix.runtime.worker import LocalWorker
from inferix.schemes.layouts import RankGrid

TIMEOUT = 60.0


class ThreadRank:
    """A rank in a thread: what `rank_process` is in a process. sent: messages to rank 0."""

    def __init__(self, worker: LocalWorker, group: RankGroup, connection: Connection) -> None:
        self.worker, self.group, self.connection = worker, group, connection
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    @torch.no_grad()
    def serve(self) -> None:
        while (message := self.connection.receive()) is not None:
            if message.kind == "beat":
                continue
            try:
                rank_process.run(self.worker, self, message)
            except Exception as error:  # of any kind: the test raises it after all ranks have ended
                self.send(Message("error", {"number": message.values["number"], "error": str(error)}))
        # as the end of a process does, this closes the connections of the collectives
        remove_groups(self.worker.parts.shard.groups)
        self.group.process_group = None

    def send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # the test is over
            self.connection.send(message)


class Alive(Peers):
    """Peers that need no beats: a thread does not hang by itself."""

    def _hung(self, now: float) -> str | None:
        for peer in self.peers:
            peer.seen = now
        return super()._hung(now)


def groups_of(
    grid: RankGrid, shard_weights: bool = False, shard_decoder: bool = False
) -> list[tuple[RankGroup, Shard]]:
    store = dist.TCPStore(LOCAL, 0, grid.ranks, True, timedelta(seconds=60), wait_for_workers=False)
    places = [Place(rank, grid.ranks, rank, LOCAL, store.port, hosted=True) for rank in range(grid.ranks)]

    def joined(place: Place) -> tuple[RankGroup, Shard]:
        device = torch.device("cpu")
        return join_grid(join_store(place), place, grid, "test", device, TIMEOUT, shard_weights, shard_decoder)

    with ThreadPoolExecutor(grid.ranks) as pool:
        return list(pool.map(joined, places))


def grid_of(engine: Engine, ranks: int, layout: str) -> RankGrid:
    counts = divided(engine.spec, engine.default_size, engine.preset.sampler.guide)
    grid = counts.grid_of(layout, ranks)
    assert grid is not None, counts.reason_against(layout, ranks)
    return grid


def parts_of(engine: Engine, shard: Shard) -> Components:
    """A rank's part of the weights, as it would load them."""
    parts, spec = dataclasses.replace(engine.parts, shard=shard), engine.spec
    family = family_of(spec)
    if (shards := family.weight_shards(spec, shard.weights, shard.stage)) is None:
        return parts
    weights = Checkpoint(Path("test"), "test", (), engine.parts.transformer.state_dict(), spec, None)
    own = family.load(weights, engine.config.precision, engine.dtype, engine.device, shards=shards)
    prints = {"transformer": shards.fingerprint, "decoder": fingerprint(parts.vae)}
    return dataclasses.replace(parts, transformer=own, fingerprints=prints)


@contextlib.contextmanager
def one_traces_at_a_time() -> Iterator[None]:
    """Torch's export is for one thread; ranks that wait for it are in no collective."""
    lock, lowered = threading.Lock(), GraphExecutor.lowered

    def locked(executor: GraphExecutor, *key: object) -> Lowered:
        with lock:
            return lowered(executor, *key)

    with mock.patch.object(GraphExecutor, "lowered", locked):
        yield


@contextlib.contextmanager
def thread_engine(
    engine: Engine, ranks: int, layout: str, shard_weights: bool = False, shard_decoder: bool = False
) -> Iterator[Engine]:
    """An engine of the same settings and weights whose passes run on threads, one a rank; they end with the context."""
    config = dataclasses.replace(
        engine.config, gpus=ranks, parallel=layout, shard_weights=shard_weights, shard_decoder=shard_decoder
    )
    groups, workers = list[RankGroup](), list[LocalWorker]()
    for group, shard in groups_of(grid_of(engine, ranks, layout), shard_weights, shard_decoder):
        groups.append(group)
        workers.append(LocalWorker(config, engine.preset, parts_of(engine, shard)))
    peers, threads = [], []
    for rank in range(1, ranks):
        mine, theirs = (Connection(end) for end in socketpair())
        threads.append(ThreadRank(workers[rank], groups[rank], theirs).thread)
        peers.append(Peer(rank, mine, 0, "test"))
    alive = Alive(peers, TIMEOUT)
    alive.group = groups[0]
    worker = RankedWorker(workers[0], alive, groups[0])
    worker.groups, worker.locals = groups, workers
    with one_traces_at_a_time():
        yield Engine(config, engine.preset, workers[0].parts, engine.manager.limits, worker=worker)
    worker.end()
    for thread in threads:
        thread.join()


def socketpair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server((LOCAL, 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


@contextlib.contextmanager
def pair(
    preset: str, layout: str, ranks: int = 2, shard_weights: bool = False, shard_decoder: bool = False,
    **overrides: object,
) -> Iterator[tuple[Engine, Engine]]:
    """Engines of a preset on one rank, and on several, with the same weights."""
    alone = make_engine(preset, **overrides)
    with thread_engine(alone, ranks, layout, shard_weights, shard_decoder) as ranked:
        yield alone, ranked


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())
