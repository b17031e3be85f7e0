"""Resources of an engine: what it has loaded. The block loop and the sessions read them and change none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..models.spec import ModelSpec
from ..schemes.presets import Preset
from .config import DTYPES, EngineConfig
from .execution.executors import Executor
from .execution.loading import Components
from .kv.kv_manager import KVManager
from .kv.page_store import KV_DTYPES
from .parallel.ranked_decoder import RankedDecoder
from .parallel.ranked_worker import RankedWorker
from .worker import LocalWorker
from .worker_client import Worker, WorkerClient


@dataclass(frozen=True)
class Resources:
    """Settings, components, page ids and worker of one engine.

    preset: as loaded; page memory and graphs are sized for it. An overloaded engine can narrow the window of sessions:
    `SessionManager.preset` is that narrower preset. parts: what this process encodes and decodes with, and the weights
    of a worker in this process.
    """

    config: EngineConfig
    preset: Preset
    parts: Components
    kv_manager: KVManager
    client: WorkerClient
    device: torch.device
    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec:
        return self.parts.transformer.spec

    @property
    def worker(self) -> Worker:
        return self.client.worker

    @property
    def fault(self) -> str | None:
        """Reason why no pass can run any more: ranks have ended. None while passes run."""
        return self.worker.peers.fault if isinstance(self.worker, RankedWorker) else None

    @property
    def branches_apart(self) -> bool:
        """True if branches of guidance have ranks of their own, so that they run at the same time."""
        return self.parts.shard.branches.size > 1

    @property
    def executor(self) -> Executor:
        """The executor of this process: of its worker, or of rank 0 of several."""
        return self.executors[0]

    @property
    def executors(self) -> tuple[Executor, ...]:
        """Those of this process, one for each set of weights that is not another's."""
        assert isinstance(self.worker, LocalWorker | RankedWorker)
        return self.worker.executors


def make_resources(
    config: EngineConfig,
    preset: Preset,
    parts: Components,
    executor: Executor | None = None,
    worker: Worker | None = None,
) -> Resources:
    """Make the worker with the executor that `config` names, unless one is given, and the book of its pages."""
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    client = WorkerClient(worker or LocalWorker(config, preset, parts, executor))
    kv_dtype = KV_DTYPES[config.kv_dtype] if config.kv_dtype is not None else dtype
    clients = [client]
    if parts.shard.columns.size > 1:
        decoder = RankedDecoder(parts.vae, client, parts.shard.columns.size)
        parts = replace(parts, vae=decoder)
    if isinstance(client.worker, RankedWorker) and (places := parts.shard.branches.size) > 1:
        clients = [WorkerClient(client.worker.of_branches(place), client) for place in range(places)]
    kv_manager = KVManager(parts.transformer.spec, preset, (dtype, kv_dtype), clients, config.kv_memory, parts.shard)
    return Resources(config, preset, parts, kv_manager, client, device, dtype)
