"""Start the ranks of a world, or join those that a launcher has started, from rank 0.

Own ranks are `python -m inferix.runtime.parallel.rank_process` with the environment that torchrun would set, so that a
script needs no guard against being imported by them, and one way of joining serves both.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...errors import InferixError, UsageError, quoted
from ...graphs.shards import Shard
from ...kernels.collectives import RankGroup
from ...models.decoder import DecoderSpec
from ...models.spec import ModelSpec
from ...schemes.layouts import RankGrid
from ...schemes.presets import Preset
from ..capacity.memory_check import MemoryCheck
from ..capacity.rank_planner import decoder_ranks
from ..config import EngineConfig
from ..execution.loading import Components
from ..worker import LocalWorker
from .identity import difference, identity
from .messages import Connection, Message
from .peers import Peer, Peers
from .rank_process import ADDRESS
from .ranked_worker import RankedWorker, end_world
from .rendezvous import LOCAL, START, Place, host_store, join_grid, join_store

COLLECTIVE = 1.25  # a collective ends by itself after so many timeouts of a rank, whose process may be out of reach
WORLDS = count(1)  # of this process
JOINED: list[dist.TCPStore] = []  # by ranks of a launcher, which serve one world


@dataclass
class World:
    """Ranks that are connected and agree on what to load. shard: rank 0's."""

    peers: Peers
    group: RankGroup
    shard: Shard

    def worker(self, config: EngineConfig, preset: Preset, parts: Components) -> RankedWorker:
        """The worker of all ranks; waits until all have loaded."""
        local = LocalWorker(config, preset, parts)
        self.peers.replies()
        return RankedWorker(local, self.peers, self.group)


@dataclass
class Start:
    """Start of the ranks of an engine, once sizes are known and before weights are read.

    check: of sizes and memory, made first; it chooses the layout. size: of pictures, None for the model's own. name,
    settings, offline: arguments of `load`. reason: of the planner's choice, None where the layout was named.
    """

    config: EngineConfig
    preset: Preset
    check: MemoryCheck
    size: tuple[int, int] | None
    name: str | None
    settings: Mapping[str, Any]
    offline: bool
    world: World | None = None
    reason: str | None = None

    def __call__(
        self,
        spec: ModelSpec,
        decoder: DecoderSpec,
        text: int,
        fast: DecoderSpec | None,
        made_on_host: bool,
        files: Sequence[Path] = (),
    ) -> Shard:
        """Raise UsageError for sizes that the ranks cannot divide; start them."""
        config = self.config
        if ":" in config.device:
            message = f"device is {quoted(config.device)} with gpus={config.gpus}"
            raise UsageError(f"{message}; ranks take GPUs 0, 1, ...: use cuda")
        if config.device.startswith("cuda") and Place.of() is None and torch.cuda.device_count() < config.gpus:
            count = torch.cuda.device_count()  # a launcher may have ranks on other machines
            raise UsageError(f"gpus is {config.gpus}, but there are {count} here; give gpus={count}, or device=cpu")
        choice = self.check.choice(spec, decoder, text, fast)  # once, since free memory changes
        self.check(spec, decoder, text, fast, made_on_host, files, choice)
        size = self.size or spec.default_size
        together = decoder_ranks(spec, size, config.gpus, config.shard_decoder) > 1
        grid, self.reason = choice.grid, choice.reason
        if grid.tokens > 1 and config.kv_dtype not in (None, config.dtype):
            raise UsageError(
                f"kv_dtype is {quoted(config.kv_dtype)} with parallel={grid.layout}, whose pages have the model's "
                "dtype; leave kv_dtype out, or use parallel=ulysses"
            )
        mine = identity(spec, self.preset, files, torch.device(config.device))
        self.config = replace(config, parallel=grid.layout, measured=None, shard_weights=choice.shard_weights)
        self.world = start(self.config, grid, together, mine, self.name, self.settings, self.offline)
        return self.world.shard

    def close(self) -> None:
        if self.world is not None:
            end_world(self.world.peers, self.world.shard)


def start(
    config: EngineConfig,
    grid: RankGrid,
    decode_together: bool,
    mine: Mapping[str, Any],
    preset: str | None,
    settings: Mapping[str, Any],
    offline: bool,
) -> World:
    """Start `config.gpus` - 1 ranks, or join them, and have them load what this one loads.

    decode_together: each decodes some columns of a picture. mine: what this rank loads, see `identity`. preset and
    settings: arguments of `load`. RankFailed or UsageError, naming the rank, where one cannot load or has other weights
    or versions.
    """
    ranks, place = config.gpus, Place.of()
    number = next(WORLDS)
    if place is None:
        store = host_store(LOCAL, ranks)
        place = Place(0, ranks, 0, LOCAL, store.port)
    else:
        if place.ranks != ranks:
            raise UsageError(f"gpus is {ranks}, but {place.ranks} ranks were started; give gpus={place.ranks}")
        if JOINED:
            raise UsageError("ranks that a launcher started serve one engine; load one, or give gpus without it")
        store = join_store(place)
        JOINED.append(store)
    processes = {} if store in JOINED else started(place, config)
    try:
        peers = connect(store, place, processes, config.rank_timeout)
    except BaseException:
        for process in processes.values():
            process.kill()
            process.wait()
        raise
    try:
        shared = asdict(replace(config, model=str(config.model)))
        threads = max(1, torch.get_num_threads() // ranks) if config.device == "cpu" else torch.get_num_threads()
        setup = {
            "config": shared, "grid": asdict(grid), "settings": dict(settings), "preset": preset, "offline": offline,
            "name": f"{number}", "timeout": COLLECTIVE * config.rank_timeout, "threads": threads,
            "decode_together": decode_together,
        }  # fmt: skip
        try:
            peers.send(lambda peer: Message("setup", setup))
        except TypeError as error:
            raise UsageError(f"settings of an engine with gpus={ranks} must be plain values: {error}") from error
        for peer, reply in zip(peers.peers, peers.replies(), strict=True):
            if (differing := difference(mine, reply.values["identity"])) is not None:
                what, here, there = differing
                raise UsageError(
                    f"{peer} has {what} {quoted(there)}, and rank 0 has {quoted(here)}; give all ranks the same files, "
                    "versions and kind of GPU"
                )
        peers.send(lambda peer: Message("go"))
        limit = COLLECTIVE * config.rank_timeout
        group, shard = join_grid(
            store, place, grid, f"{number}", torch.device(config.device), limit, config.shard_weights,
            decode_together,
        )  # fmt: skip
    except BaseException:
        peers.close()
        raise
    peers.group = group
    return World(peers, group, shard)


def started(place: Place, config: EngineConfig) -> dict[int, subprocess.Popen[bytes]]:
    """Start the processes of all ranks but this one, by rank."""
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-m", f"{__package__}.rank_process"]
    return {
        rank: subprocess.Popen(
            command,
            env=os.environ | replace(place, rank=rank, local=rank).environment | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )
        for rank in range(1, config.gpus)
    }  # fmt: skip


def connect(
    store: dist.TCPStore, place: Place, processes: Mapping[int, subprocess.Popen[bytes]], timeout: float
) -> Peers:
    """Accept the connections of all other ranks; InferixError that names those that do not come."""
    token = secrets.token_hex(16)
    with socket.create_server((LOCAL if processes else "", 0), backlog=place.ranks) as server:
        server.settimeout(0.1)
        host = LOCAL if processes else place.host
        store.set(ADDRESS, f"{host}|{server.getsockname()[1]}|{token}")
        peers: dict[int, Peer] = {}
        end = time.monotonic() + START.total_seconds()
        while len(peers) < place.ranks - 1:
            missing = sorted(set(range(1, place.ranks)) - set(peers))
            ended = [rank for rank in missing if rank in processes and processes[rank].poll() is not None]
            if ended or time.monotonic() > end:
                code = f" (code {processes[ended[0]].returncode})" if ended else ""
                raise InferixError(f"rank {(ended or missing)[0]} did not start{code}; its errors are above")
            try:
                stream, _ = server.accept()
            except TimeoutError:
                continue
            stream.settimeout(None)
            connection = Connection(stream)
            hello = connection.receive()
            if hello is None or not secrets.compare_digest(str(hello.values.get("token")), token):
                connection.close()
                continue
            rank = int(hello.values["rank"])
            pid, host_name = int(hello.values["pid"]), str(hello.values["host"])
            peers[rank] = Peer(rank, connection, pid, host_name, processes.get(rank))
    return Peers([peers[rank] for rank in sorted(peers)], timeout)

