"""A rank other than 0: loads its part of the engine that rank 0 describes, then runs the plans that it sends.

`python -m inferix.runtime.parallel.rank_process` is one such rank; its place is in the environment. The process ends
when its connection to rank 0 does, in whatever it is: rank 0 may have been killed.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InferixError, quoted
from ...graphs.shards import Shard
from ...kernels.collectives import RankGroup
from ...models.decoder import DecoderSpec
from ...models.registry import make_preset
from ...models.spec import ModelSpec
from ...schemes.layouts import RankGrid
from ..config import EngineConfig
from ..execution.loading import load_parts
from ..plans import GuidedPass, decode_plan
from ..worker import LocalWorker
from .identity import identity
from .messages import Connection, Message, connected
from .peers import BEAT
from .ranked_worker import GIVES
from .rendezvous import START, Place, join_grid, join_store

ADDRESS = "inferix/control"  # key of rank 0's address in the store


class Inbox:
    """Messages of rank 0, received by a thread that ends the process with the connection.

    timeout: seconds of silence of rank 0, after which the process ends, too. rank: this one's number. end: of
    the process, with a code, from any thread.
    """

    def __init__(self, connection: Connection, rank: int, end: Callable[[int], object] = os._exit) -> None:
        self.connection, self.queue = connection, queue.SimpleQueue[Message]()
        self.rank, self.timeout, self.end = rank, START.total_seconds(), end
        self.silent = 0  # looks since the last message
        self.group: RankGroup | None = None
        threading.Thread(target=self._receive, name="rank-0", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        threading.Thread(target=self._watch, name="rank-0-watch", daemon=True).start()

    def _receive(self) -> None:
        try:
            while (message := self.connection.receive()) is not None:
                self.silent = 0
                if message.kind != "beat":
                    self.queue.put(message)
        finally:
            self.end(0)  # whatever the other threads wait for

    def _beat(self) -> None:
        stop = threading.Event()
        while not stop.wait(BEAT):
            waits = self.group is not None and self.group.traffic.since is not None
            self.send(Message("beat", {"waits": waits}))

    def _watch(self) -> None:
        """End the process once rank 0 is silent; looks are counted, since this process may have been stopped, too."""
        while self.silent * BEAT < self.timeout:
            time.sleep(BEAT)
            self.silent += 1
        last = threading.Timer(1.0, self.end, (1,))  # who reads stderr may be stopped, too
        last.daemon = True
        last.start()
        try:
            if self.rank == 1:  # one error of all ranks
                print(f"rank 0 has sent nothing for {self.timeout:g} s: it hangs. The other ranks end", file=sys.stderr)
        finally:
            last.cancel()
            self.end(1)

    def send(self, message: Message) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self.end(0)

    def next(self, kind: str) -> Message:
        message = self.queue.get()
        if message.kind != kind:
            raise InferixError(f"rank 0 sent {quoted(message.kind)}; expected {quoted(kind)}")
        return message


def serve_if_ranked() -> None:
    """Serve as the rank that the environment names, until rank 0 ends; return at once for rank 0 and for one alone."""
    place = Place.of()
    if place is None or place.rank == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0
    try:
        serve(place)
    except InferixError as error:  # rank 0 reports it
        raise SystemExit(1) from error


@torch.no_grad()
def serve(place: Place) -> None:
    store = join_store(place)
    try:
        host, port, token = store.get(ADDRESS).decode().split("|")
    except RuntimeError as error:
        raise InferixError(f"rank 0 loaded no engine for {place.ranks} ranks") from error
    inbox = Inbox(connected((host, int(port)), START.total_seconds()), place.rank)
    hello = {"rank": place.rank, "token": token, "pid": os.getpid(), "host": socket.gethostname()}
    inbox.send(Message("hello", hello))
    number = 0
    try:
        worker = load_worker(place, store, inbox)
        while True:
            message = inbox.next("plan")
            number = message.values["number"]
            try:
                run(worker, inbox, message)
            except Exception as error:  # rank 0 decides: it may have failed in the same way
                inbox.send(Message("error", {"number": number, "error": f"{type(error).__name__}: {error}"}))
    except Exception as error:  # of any kind: rank 0 names it, and this process ends with it
        inbox.send(Message("error", {"number": number, "error": f"{type(error).__name__}: {error}"}))
        raise


def run(worker: LocalWorker, inbox: Inbox, message: Message) -> None:
    """Run one plan, and send what it gives."""
    plan, tensors = decode_plan(message.plan), [tensor.to(worker.device) for tensor in message.tensors]
    group, shard, result = inbox.group, worker.parts.shard, list[Tensor]()
    assert group is not None
    if shapes := message.values["shapes"]:
        tensors = [torch.empty(shape, dtype=getattr(torch, name), device=worker.device) for name, shape in shapes]
        for tensor in tensors:
            group.broadcast(tensor)
    if message.values["place"] in (None, shard.branches.place):
        result = worker.execute(plan, tensors)
    if isinstance(plan, GuidedPass) and shard.branches.place > 0 and group.rank % shard.ranks == 0:
        for velocity in result:
            group.send(velocity.contiguous(), 0)
    inbox.send(Message("done", {"number": message.values["number"]}))
    if isinstance(plan, GIVES):
        inbox.send(Message("reply", {}, tensors=tuple(result)))


def load_worker(place: Place, store: Any, inbox: Inbox) -> LocalWorker:
    """Load the model that rank 0 names, once it agrees that it is the same one."""
    setup = inbox.next("setup").values
    inbox.timeout = setup["config"]["rank_timeout"]
    torch.set_num_threads(setup["threads"])
    config = EngineConfig.of(**{**setup["config"], "device": device_of(setup["config"]["device"], place)})
    preset = make_preset(config.preset, **setup["settings"])

    def agree(
        spec: ModelSpec, decoder: DecoderSpec, text: int, fast: DecoderSpec | None, made_on_host: bool,
        files: Sequence[Path] = (),
    ) -> Shard:  # fmt: skip
        inbox.send(Message("reply", {"identity": identity(spec, preset, files, torch.device(config.device))}))
        inbox.next("go")
        grid, device = RankGrid(**setup["grid"]), torch.device(config.device)
        inbox.group, shard = join_grid(
            store, place, grid, setup["name"], device, setup["timeout"], config.shard_weights,
            setup["decode_together"],
        )
        return shard

    parts = load_parts(config, preset, setup["preset"], agree, offline=setup["offline"], text_prompts=False)
    vae = parts.vae if setup["decode_together"] else parts.vae.to("meta")  # rank 0 decodes, and encodes
    parts = replace(parts, vae=vae, fast_vae=None)
    worker = LocalWorker(config, preset, parts)
    inbox.send(Message("reply", {"ready": True}))
    return worker


def device_of(device: str, place: Place) -> str:
    """The device of a rank: the GPU with the number of the rank on its machine."""
    return f"cuda:{place.local}" if device.startswith("cuda") else device


if __name__ == "__main__":
    serve_if_ranked()
