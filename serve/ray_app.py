"""Servers and their router as a Ray Serve application: `serve run config.yaml` with `inferix.serve.ray_app:build`.

A thin layer: each replica of the deployment `Engine` is a server as of `inferix serve`, on a port of its own, and each
of `Router` is `inferix route`. Ray starts, replaces and scales them. A directory, one named actor, has the servers'
addresses. The ranks of an engine of several GPUs are processes of Ray, in one placement group. Needs the extra `ray`.
"""

# Without postponed annotations: Ray reads the type of the argument of `build`.

import asyncio
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import InferixError, UsageError, quoted
from ..runtime.config import COERCIONS
from ..runtime.parallel.rendezvous import LOCAL, Place, host_store
from .routing import ReplicaFacts, Scaling
from .settings import ServeSettings, check_limits, read_token

DIRECTORY, NAMESPACE = "inferix-servers", "inferix"
HEARTBEAT_SECONDS = 2.0
FORGOTTEN_SECONDS = 10.0  # after which a server without a heartbeat is left out
STARTING_SECONDS = 60.0  # that a server may take to listen, once its engine is loaded
LATEST = ("load", "slack", "sessions", "places", "late", "realtime")  # numbers that the autoscaler gets
NO_SLACK = 1e6  # in place of the slack of a server that shows nothing
PLACEMENTS = ("STRICT_PACK", "PACK")  # ranks of a replica on one machine, or on as few as possible


class Arguments(BaseModel):
    """Arguments of the application, as in its configuration.

    shared: folder for checkpoints and worlds that all machines reach. token_file: needed where machines reach each
    other by their addresses. load: arguments of `inferix.load`, such as model, preset, device. limits: of `inferix
    serve --list-limits`. bundle: what Ray reserves for each rank where `load` has gpus; empty for a CPU and, unless
    device is cpu, a GPU. placement: of these ranks, one of `PLACEMENTS`. The rest as for `inferix serve`.
    """

    model_config = ConfigDict(extra="forbid")
    shared: str
    token_file: str | None = None
    sessions: int = 4
    checkpoint_every: int = 8
    rewind_blocks: int = 12
    load: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    bundle: dict[str, float] = {}
    placement: str = PLACEMENTS[0]

    @property
    def ranks(self) -> int:
        """Ranks of an engine; UsageError for no number of ranks."""
        return int(COERCIONS["gpus"]("gpus", self.load.get("gpus", 1)))

    @property
    def resources(self) -> dict[str, float]:
        """Resources of each rank, by Ray's names."""
        return self.bundle or ({"CPU": 1} if self.load.get("device") == "cpu" else {"CPU": 1, "GPU": 1})

    def settings(self) -> ServeSettings:
        """The settings of servers and router; UsageError for bad ones."""
        token = None if self.token_file is None else read_token(Path(self.token_file))
        return ServeSettings(
            token=token, shared=Path(self.shared), sessions=self.sessions, checkpoint_every=self.checkpoint_every,
            **check_limits(self.limits),
        )  # fmt: skip


class Directory:
    """The addresses of the servers that are up."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def beat(self, url: str) -> None:
        """Note that a server is up."""
        self.seen[url] = time.monotonic()

    def leave(self, url: str) -> None:
        self.seen.pop(url, None)

    def urls(self) -> list[str]:
        """The servers with a heartbeat in the last seconds."""
        oldest = time.monotonic() - FORGOTTEN_SECONDS
        self.seen = {url: seen for url, seen in self.seen.items() if seen > oldest}
        return list(self.seen)


def directory() -> Any:
    """The one directory of the cluster."""
    actor = ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(Directory)  # not in the group of who starts it
    return actor.options(name=DIRECTORY, namespace=NAMESPACE, get_if_exists=True, lifetime="detached").remote()


class Rank:
    """A rank above 0 of a replica's engine."""

    def serve(self, place: dict[str, str]) -> None:
        """Serve at a place, given as environment, until rank 0 ends; the process ends then."""
        from ..runtime.parallel.rank_process import serve_if_ranked

        os.environ |= place
        serve_if_ranked()


def start_ranks(arguments: Arguments) -> list[Any]:
    """Make this process rank 0, and start the others in bundles of its placement group; returns what keeps them."""
    resources, ranks = dict(arguments.resources), arguments.ranks
    host = LOCAL if arguments.placement == "STRICT_PACK" else ray.util.get_node_ip_address()
    store = host_store(host, ranks)
    options = {"num_cpus": resources.pop("CPU", 0), "num_gpus": resources.pop("GPU", 0), "resources": resources}
    started: list[Any] = [store]
    for rank in range(1, ranks):
        place = PlacementGroupSchedulingStrategy(ray.util.get_current_placement_group(), rank)
        actor = ray.remote(Rank).options(scheduling_strategy=place, **options).remote()
        actor.serve.remote(Place(rank, ranks, 0, host, store.port, hosted=True).environment)
        started.append(actor)
    os.environ |= Place(0, ranks, 0, host, store.port, hosted=True).environment
    return started


class Engine:
    """One server with its engine; Ray gives it a GPU or a share of the CPUs, and as much to each further rank."""

    def __init__(self, arguments: Arguments) -> None:
        from ..runtime.load import load
        from .app import Server
        from .engine_host import engine_limits
        from .heap import freeze, limit_arenas
        from .server import DrainingServer, address_of, listen, make_config

        limit_arenas()
        settings = arguments.settings()
        self.ranks = start_ranks(arguments) if arguments.ranks > 1 else []
        engine = load(limits=engine_limits(settings), rewind_blocks=arguments.rewind_blocks, **arguments.load)
        self.folder = tempfile.TemporaryDirectory(prefix="inferix-serve-")
        self.server = Server(engine, settings, Path(self.folder.name))
        host = "127.0.0.1" if settings.token is None else ray.util.get_node_ip_address()
        self.listener: socket.socket = listen(host, 0, settings.token)
        self.url = address_of(self.listener)
        ready = threading.Event()
        self.runner = DrainingServer(make_config(self.server), self.server, ready.set)
        self.thread = threading.Thread(target=self.runner.run, kwargs={"sockets": [self.listener]}, daemon=True)
        freeze()
        self.thread.start()
        if not ready.wait(STARTING_SECONDS):
            raise InferixError(f"the server on {self.url} did not start within {STARTING_SECONDS:g} s")
        self.directory = directory()
        ray.get(self.directory.beat.remote(self.url))
        self.ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_SECONDS):
            self.directory.beat.remote(self.url)

    def check_health(self) -> None:
        """InferixError where the engine or the server has ended; Ray then replaces this replica."""
        if not self.server.host.alive or not self.thread.is_alive():
            raise InferixError(f"the engine of {self.url} has ended: {self.server.host.reason}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The numbers that `ScaleOnSlack` decides by."""
        facts = self.server.facts(None)
        slack = NO_SLACK if facts.slack is None else facts.slack
        return {
            "load": facts.load, "slack": slack, "sessions": facts.sessions, "places": facts.places, "late": facts.late,
            "realtime": float(facts.realtime),
        }  # fmt: skip

    async def __del__(self) -> None:
        """Drain: sessions are saved, and their clients' router goes on with them elsewhere."""
        self.ended.set()
        await self.directory.leave.remote(self.url)
        self.runner.request_drain()
        await asyncio.to_thread(self.thread.join, self.server.settings.drain_seconds)
        self.listener.close()
        self.folder.cleanup()


class ScaleOnSlack:
    """Autoscaling policy: see `Scaling`. Its bounds are those of Ray's configuration."""

    def __init__(self, load: float = 0.7, slack: float = 0.0) -> None:
        self.load, self.slack = load, slack

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and no state."""
        scaling = Scaling(
            context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas, self.load, self.slack
        )
        replicas = latest(context.raw_metrics or {})
        if len(replicas) < context.current_num_replicas:
            return context.target_num_replicas, {}  # some have reported nothing yet
        return scaling.wanted(replicas), {}


def latest(metrics: Any) -> list[ReplicaFacts]:
    """The last numbers of each replica that has reported all of them, from Ray's series of values by replica."""
    series = [metrics.get(name, {}) for name in LATEST]
    replicas = set(series[0]).intersection(*series[1:])
    found = []
    for replica in replicas:
        load, slack, sessions, places, late, real = (by_replica[replica][-1].value for by_replica in series)
        found.append(ReplicaFacts(
            replica=str(replica), status="ok", sessions=int(sessions), places=int(places), load=load,
            slack=None if slack == NO_SLACK else slack, late=int(late), realtime=bool(real),
        ))  # fmt: skip
    return found


def check_placement(arguments: Arguments) -> None:
    """UsageError for ranks that the machines of Ray cannot hold."""
    if arguments.placement not in PLACEMENTS:
        raise UsageError(f"placement is {quoted(arguments.placement)}; expected {' or '.join(PLACEMENTS)}")
    needed = {name: amount for name, amount in arguments.resources.items() if amount > 0}
    if not needed:
        raise UsageError(f"bundle is {quoted(arguments.bundle)}; expected an amount above 0, such as CPU: 1")
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    held = [min(int(has.get(name, 0) / amount + 1e-6) for name, amount in needed.items()) for has in machines]
    one, every = max(held, default=0), sum(held)
    most = one if arguments.placement == "STRICT_PACK" else every
    if most < arguments.ranks:
        advice = [f"give gpus={most}"] if most > 0 else []
        advice += ["placement=PACK"] if every >= arguments.ranks else ["add machines"]
        where = "one machine" if arguments.placement == "STRICT_PACK" else "all machines"
        raise UsageError(
            f"gpus is {arguments.ranks} with placement={arguments.placement} and {needed} for each rank, and {where} "
            f"of Ray can hold {most}; {', or '.join(advice)}"
        )


def build(arguments: Arguments) -> serve.Application:
    """The application; UsageError for bad arguments, and for ranks that Ray has no room for.

    `serve run` calls it with `args` of the configuration.
    """
    settings = arguments.settings()
    if settings.checkpoint_every == 0:
        raise UsageError("checkpoint_every is 0, so that a lost replica would lose its sessions; give 1 or more")
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 1}}
    if arguments.ranks > 1:
        check_placement(arguments)
        own = arguments.resources
        options = {
            "ray_actor_options": {"num_cpus": own.get("CPU", 0), "num_gpus": own.get("GPU", 0)},
            "placement_group_bundles": [own] * arguments.ranks, "placement_group_strategy": arguments.placement,
        }  # fmt: skip

    def routes() -> Any:
        from .router import Router, make_router_app

        known = directory()

        async def urls() -> list[str]:
            answer: list[str] = await known.urls.remote()
            return answer

        return make_router_app(Router(urls, settings))

    engines = serve.deployment(
        Engine, name="Engine", num_replicas=1, health_check_period_s=5, **options,
        graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=settings.drain_seconds + 5,
    )  # fmt: skip
    router = serve.deployment(
        serve.ingress(routes)(), name="Router", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000
    )
    return router.bind(engines.bind(arguments))
