"""Clients that join, leave, vanish, come back, fork, say nothing and stall for minutes, and the server's memory.

The server is another process, with short limits for clients that are gone, so that each of its ends is reached often.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from ..errors import InferixError, one_line
from .result import Result, Series, as_in_a_file
from .serve import resident, serving

SHORT_LIMITS = ("resume_seconds=3", "stall_seconds=5", "start_seconds=2")
MEDIA = ("raw", "jpeg", "h264", "vp9", "fmp4")
WATCHED = (1.0, 6.0)  # seconds that a client stays
STALLED = 45.0  # seconds that a stalled client reads nothing; unanswered pings end its connection before
CATCH_UP = 5.0  # seconds that it then reads
PATIENCE = 120.0  # seconds after which a wait is a fault
GROWTH = 64 << 20  # bytes of the server's process from the second tenth of the time to the last
TENTHS = 10
CLOCK = "none; memory of the server's process, each second"


@dataclass
class Sample:
    """One look at the server. seconds: since the start. files, threads: of its process."""

    seconds: float
    memory: int
    files: int
    threads: int


@dataclass
class Figures:
    """counts: of what clients did and got. faults: what must not happen."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    def rows(self) -> list[dict[str, Any]]:
        """Medians of each tenth of the time."""
        rows = []
        for tenth in range(TENTHS):
            low, high = (self.seconds * part / TENTHS for part in (tenth, tenth + 1))
            part = [sample for sample in self.samples if low <= sample.seconds < high]
            if part:
                facts = {name: median(getattr(one, name) for one in part) for name in ("memory", "files", "threads")}
                rows.append({"until": high, **{name: int(value) for name, value in facts.items()}})
        return rows

    def growth(self) -> int:
        """Bytes from the second tenth to the last; 0 for too few samples."""
        rows = self.rows()
        return rows[-1]["memory"] - rows[1]["memory"] if len(rows) == TENTHS else 0


class Refused(InferixError):
    """The server has no room for a session."""


class Viewer:
    """One connection. facts: `opened`, once it has come."""

    def __init__(self, socket: Any, figures: Figures) -> None:
        self.socket, self.figures = socket, figures
        self.facts: dict[str, Any] = {}
        self.last = 0

    async def send(self, type: str, **fields: Any) -> int:
        self.last += 1
        await self.socket.send(json.dumps({"type": type, "id": self.last, **fields}))
        return self.last

    async def receive(self) -> dict[str, Any] | None:
        """The next event; None for media."""
        async with asyncio.timeout(PATIENCE):
            message = await self.socket.recv()
        if isinstance(message, bytes):
            self.figures.counts["messages of media"] += 1
            return None
        event: dict[str, Any] = json.loads(message)
        return event

    async def until(self, type: str, id: int | None = None) -> dict[str, Any]:
        """Receive up to an event. Refused where there is no room, InferixError for another refusal or an end."""
        while True:
            event = await self.receive()
            if event is None:
                continue
            if event["type"] == type and id in (None, event["id"]):
                return event
            if event["type"] == "refused" and event["code"] == "at_capacity":
                raise Refused(event["message"])
            if event["type"] in ("refused", "ended"):
                raise InferixError(f"{event['type']}: {event['message']}")

    async def begin(self, type: str, **fields: Any) -> None:
        """Open or attach."""
        await self.send(type, **fields)
        self.facts = await self.until("opened")
        self.figures.counts["sessions" if type == "open" else "attached"] += 1

    async def watch(self, seconds: float, random: Random) -> None:
        """Watch and steer for some seconds, and until a block has come."""
        end, blocks = time.monotonic() + seconds, 0
        while time.monotonic() < end or not blocks:
            event = await self.receive()
            if event is None:
                continue
            if event["type"] == "ended":
                raise InferixError(f"ended: {event['message']}")
            if event["type"] == "state":
                blocks += 1
                self.figures.counts["blocks"] += 1
                if self.facts["actions"]:
                    await self.send("act", action=random.choice(self.facts["actions"]), pressed=random.random() < 0.7)

    async def stop(self) -> None:
        """End the session and wait for the close."""
        from websockets import ConnectionClosed

        await self.send("stop")
        with suppress(ConnectionClosed):
            while True:
                await self.receive()

    def vanish(self) -> None:
        """End without a close."""
        self.socket.transport.abort()


class Churn:
    """The clients of one run. url: of the server; end: on the clock of `time.monotonic`."""

    def __init__(self, url: str, token: str | None, prompt: str, seed: int, end: float, stalled: float) -> None:
        self.url, self.prompt, self.seed, self.end, self.stalled = url, prompt, seed, end, stalled
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.figures = Figures()
        self.ways: tuple[tuple[Callable[[Random], Awaitable[None]], int], ...] = (
            (self.leave, 4), (self.vanish, 2), (self.come_back, 2), (self.fork, 2), (self.say_nothing, 1),
        )  # fmt: skip

    def connect(self) -> Any:
        import websockets

        return websockets.connect(
            f"ws{self.url.removeprefix('http')}/v1/live", additional_headers=self.headers, max_size=None,
            open_timeout=PATIENCE, ping_interval=None, compression=None,
        )  # fmt: skip

    async def run(self, number: int) -> None:
        """One client, which comes again and again in one of the ways; client 0 stalls."""
        random = Random(f"{self.seed}/{number}")
        ways, weights = zip(*self.ways, strict=True)
        while time.monotonic() < self.end:
            way = self.stall if number == 0 else random.choices(ways, weights)[0]
            self.figures.counts[way.__name__.replace("_", " ")] += 1
            try:
                await way(random)
            except Refused:
                self.figures.counts["refused"] += 1
                await asyncio.sleep(random.uniform(0.2, 1.0))
            except Exception as error:  # of any kind: it is a fault to report, and the others go on
                self.figures.faults.append(f"{way.__name__}: {type(error).__name__}: {one_line(error)}")
                await asyncio.sleep(1.0)

    def opening(self, random: Random) -> dict[str, Any]:
        return {"prompt": self.prompt, "seed": random.randrange(100), "media": [random.choice(MEDIA)]}

    async def leave(self, random: Random) -> None:
        """Watch, sometimes with a recording, and stop."""
        async with self.connect() as socket:
            viewer = Viewer(socket, self.figures)
            await viewer.begin("open", **self.opening(random))
            if random.random() < 0.2:
                await viewer.send("record", format=random.choice(("mp4", "hls")))
            await viewer.watch(random.uniform(*WATCHED), random)
            await viewer.stop()

    async def vanish(self, random: Random) -> None:
        """Watch, and be gone."""
        async with self.connect() as socket:
            viewer = Viewer(socket, self.figures)
            await viewer.begin("open", **self.opening(random))
            await viewer.watch(random.uniform(*WATCHED), random)
            viewer.vanish()

    async def come_back(self, random: Random) -> None:
        """Watch, be gone, and attach again."""
        async with self.connect() as socket:
            viewer = Viewer(socket, self.figures)
            await viewer.begin("open", **self.opening(random))
            await viewer.watch(random.uniform(*WATCHED), random)
            viewer.vanish()
        async with self.connect() as socket:
            await self.take_over(socket, viewer.facts, random)

    async def fork(self, random: Random) -> None:
        """Watch, fork, and watch the fork to its end."""
        async with self.connect() as socket:
            viewer = Viewer(socket, self.figures)
            await viewer.begin("open", **self.opening(random))
            await viewer.watch(1.0, random)
            twin = await viewer.until("applied", await viewer.send("fork"))
            viewer.vanish()
        async with self.connect() as socket:
            await self.take_over(socket, twin, random)

    async def take_over(self, socket: Any, facts: dict[str, Any], random: Random) -> None:
        viewer = Viewer(socket, self.figures)
        media = [random.choice(MEDIA)]
        await viewer.begin("attach", session=facts["session"], resume=facts["resume"], media=media)
        await viewer.watch(random.uniform(*WATCHED), random)
        await viewer.stop()

    async def say_nothing(self, random: Random) -> None:
        """Connect and wait to be refused."""
        from websockets import ConnectionClosed

        async with self.connect() as socket:
            try:
                while True:
                    await Viewer(socket, self.figures).receive()
            except ConnectionClosed:
                pass

    async def stall(self, random: Random) -> None:
        """Watch, and read nothing more."""
        from websockets import ConnectionClosed

        async with self.connect() as socket:
            viewer = Viewer(socket, self.figures)
            await viewer.begin("open", **self.opening(random) | {"media": ["raw"]})
            await viewer.watch(1.0, random)
            await asyncio.sleep(max(0.0, min(self.stalled, self.end - time.monotonic())))
            try:
                async with asyncio.timeout(CATCH_UP):
                    while True:
                        await viewer.receive()
            except TimeoutError:
                self.figures.counts["stalled and went on"] += 1
            except ConnectionClosed:
                self.figures.counts["stalled and disconnected"] += 1
            viewer.vanish()


async def churn(
    one: Churn, clients: int, process: Any, begun: float, progress: Callable[[str], object]
) -> Figures:
    """Run the clients to the end, and look at the server meanwhile and after."""
    figures = one.figures
    running = [asyncio.create_task(one.run(number)) for number in range(clients)]
    reported = begun
    while not all(task.done() for task in running):
        now = time.monotonic()
        if process is not None and now < one.end:
            figures.samples.append(look(now - begun, process))
        if now - reported >= 60 and figures.samples:
            reported, memory = now, figures.samples[-1].memory
            progress(f"{(now - begun) / 60:.0f} min, {memory / 1e6:.0f} MB, {len(figures.faults)} faults")
        await asyncio.wait(running, timeout=1.0)
    await asyncio.gather(*running)
    await check_empty(one, figures)
    return figures


def look(seconds: float, process: Any) -> Sample:
    """Memory, open files and threads of a process."""
    place = Path("/proc") / str(process.pid)
    files, threads = (len(os.listdir(place / name)) for name in ("fd", "task"))
    return Sample(seconds, resident(process) or 0, files, threads)


async def check_empty(one: Churn, figures: Figures) -> None:
    """Add a fault for what the server still has once all clients are gone."""
    import httpx

    wanted = ("inferix_live_sessions", "inferix_connections", "inferix_engine_pages_in_use")
    until = time.monotonic() + PATIENCE
    async with httpx.AsyncClient(base_url=one.url, headers=one.headers, timeout=PATIENCE) as client:
        while True:
            text = (await client.get("/metrics")).text
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            left = {name: float(values[name]) for name in wanted if float(values[name])}
            if not left or time.monotonic() > until:
                break
            await asyncio.sleep(0.5)
    if left:
        figures.faults.append(f"left behind: {', '.join(f'{name} {value:g}' for name, value in left.items())}")


def run(
    url: str | None,
    arguments: Sequence[str],
    minutes: float,
    sessions: int,
    prompt: str,
    token: str | None,
    progress: Callable[[str], object],
    seed: int = 0,
    stalled: float = STALLED,
) -> Result:
    """Run two clients more than there are places. url: of a running server; None starts one with short limits."""
    from .machine import environment

    begun = environment("cpu")
    short = [part for limit in SHORT_LIMITS for part in ("--limit", limit)]
    arguments = [] if url is not None else ["--queue=1", *short, *arguments]
    with serving(url, arguments) as (address, process):
        start = time.monotonic()
        one = Churn(address, token, prompt, seed, start + 60 * minutes, stalled)
        figures = asyncio.run(churn(one, sessions + 2, process, start, progress))
    figures.seconds = 60 * minutes
    settings = {"arguments": arguments, "minutes": minutes, "clients": sessions + 2, "seed": seed, "url": url}
    memory = tuple(float(sample.memory) for sample in figures.samples)
    return Result(
        kind="churn", clock=CLOCK, environment=begun, subject={}, settings=settings, ceilings={},
        series={"server/memory": Series("B", memory)} if memory else {},
        facts=as_in_a_file({
            "rows": figures.rows(), "counts": dict(sorted(figures.counts.items())), "faults": figures.faults,
            "growth": figures.growth(),
        }),
    )  # fmt: skip
