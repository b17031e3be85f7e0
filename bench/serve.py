"""Live sessions of a server as its clients see them: first picture, intervals, underruns, control to pixel.

A chunk-cadence client: each session plays the pictures that arrive at the video's rate, after the first block and a
buffer. It draws nothing, and counts the times that its player had no picture to show. The server is another process,
so that its clients' work is not in its thread; on one machine they still share the cores.
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from ..errors import InferixError, UsageError, quoted
from .result import Result, Series, as_in_a_file

HEADER = struct.Struct("<BBHIII")
FIRST = 2  # flag of the first message of a block
BUFFER = 0.15  # seconds that a player waits after its first block
CONTROL_SECONDS = (1.0, 2.5)  # between two controls of a session
SETTLE = 3  # blocks that are not counted at the start of a session
CLOCK = "from sending a message to receiving the first message of the block that shows it, in the client"
QUANTITIES = ("first_picture", "intervals", "control_to_pixel")
STARTING = 180.0  # seconds that a server may take to come up
SHARES = (0.5, 0.95, 0.99)


@dataclass
class Viewed:
    """Measurements of one session, in seconds. underruns: times that the player had nothing to show."""

    first_picture: float = 0.0
    intervals: list[float] = field(default_factory=list)
    control_to_pixel: list[float] = field(default_factory=list)
    underruns: int = 0
    frames: int = 0
    late: int = 0
    skipped: int = 0


@dataclass
class Step:
    """Measurements of a number of sessions at a time. refused: the answer to a session above it."""

    sessions: int
    viewed: list[Viewed]
    refused: dict[str, Any] | None = None
    memory: int | None = None  # bytes of the server's process


class Player:
    """A player of `fps` pictures per second, by the clock of its caller."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.end: float | None = None  # when the pictures that arrived so far have been shown
        self.underruns = 0

    def add(self, now: float, pictures: int) -> None:
        """Add pictures that arrive now."""
        if self.end is None:
            self.end = now + BUFFER
        elif now > self.end:
            self.underruns += 1
            self.end = now
        self.end += pictures / self.fps


async def view(url: str, token: str | None, seconds: float, prompt: str, seed: int, media: str) -> Viewed:
    """Watch and steer one session for a while. Refused where the server has no room."""
    import websockets

    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    numbers, viewed = random.Random(seed), Viewed()
    start = time.perf_counter()
    async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live", additional_headers=headers) as socket:
        await socket.send(json.dumps(dict(type="open", id=0, prompt=prompt, seed=seed, media=[media])))
        opened: dict[str, Any] = {}
        asked: dict[int, float] = {}  # controls by id
        shown: dict[int, list[float]] = {}  # by the block that shows them: when they were sent
        actions: list[str] = []
        player, last, blocks, next_control = Player(1.0), 0.0, 0, float("inf")
        while (now := time.perf_counter()) < start + seconds:
            if now >= next_control:
                asked[len(asked) + 1] = now
                action = numbers.choice(actions) if actions else None
                control = {"type": "prompt", "text": prompt} if action is None else {"type": "act", "action": action}
                await socket.send(json.dumps(control | {"id": len(asked)}))
                next_control = now + numbers.uniform(*CONTROL_SECONDS)
            try:
                async with asyncio.timeout(max(0.001, min(next_control, start + seconds) - now)):
                    message = await socket.recv()
            except TimeoutError:
                continue
            now = time.perf_counter()
            if isinstance(message, bytes):
                _, flags, _, block, _, pictures = HEADER.unpack_from(message)
                if flags & FIRST:
                    blocks += 1
                    if blocks == 1:
                        viewed.first_picture = now - start
                    if blocks > SETTLE:
                        viewed.intervals.append(now - last)
                    last = now
                    viewed.control_to_pixel += [now - sent for sent in shown.pop(block, [])]
                    if blocks == SETTLE:
                        player = Player(opened["media"]["fps"])
                player.add(now, pictures)
                viewed.frames += pictures
                continue
            event = json.loads(message)
            if event["type"] == "opened":
                opened, actions = event, event["actions"]
                next_control = now + numbers.uniform(*CONTROL_SECONDS)
            elif event["type"] == "applied":
                shown.setdefault(event["block"], []).append(asked[event["id"]])
            elif event["type"] == "refused" and not opened:
                raise Refused(event)
            elif event["type"] == "state":
                viewed.skipped = event["skipped"]
                viewed.late += event.get("slack", 0.0) < 0 and blocks > SETTLE
        viewed.underruns = player.underruns
        await socket.send(json.dumps({"type": "stop", "id": len(asked) + 1}))
        async with asyncio.timeout(30):
            async for _ in socket:  # until the server has freed the session
                pass
    return viewed


class Refused(InferixError):
    """The server has no room for a session. event: its answer."""

    def __init__(self, event: dict[str, Any]) -> None:
        super().__init__(event["message"])
        self.event = event


async def step(url: str, token: str | None, sessions: int, seconds: float, prompt: str, media: str) -> Step:
    """Watch several sessions at a time; those that the server refuses are missing."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for seed in range(sessions):
            tasks.append(group.create_task(caught(view(url, token, seconds, prompt, seed, media))))
            await asyncio.sleep(min(1.0, seconds / 4))  # the server measures block times before it admits the next
    results = [task.result() for task in tasks]
    viewed = [result for result in results if isinstance(result, Viewed)]
    refused = next((result.event for result in results if isinstance(result, Refused)), None)
    return Step(len(viewed), viewed, refused)


async def caught(viewing: Any) -> Viewed | Refused:
    try:
        viewed: Viewed = await viewing
        return viewed
    except Refused as refused:
        return refused


def run(
    url: str | None,
    arguments: Sequence[str],
    most: int,
    seconds: float,
    prompt: str,
    media: str,
    token: str | None,
    progress: Callable[[str], object],
) -> Result:
    """Measure 1 to `most` sessions, until the server refuses one. url: of a running server; None starts one."""
    from .machine import environment

    steps, begun = [], environment("cpu")
    with serving(url, arguments) as (address, process):
        for sessions in range(1, most + 1):
            progress(f"{sessions} sessions for {seconds:g} s")
            steps.append(asyncio.run(step(address, token, sessions, seconds, prompt, media)))
            steps[-1].memory = None if process is None else resident(process)
            if steps[-1].refused is not None:
                break
    return result_of(steps, begun, {"arguments": list(arguments), "seconds": seconds, "media": media, "url": url})


def result_of(steps: Sequence[Step], begun: dict[str, Any], settings: dict[str, Any]) -> Result:
    """The steps as the result of a benchmark. begun: the environment at the start; its device is the client's."""
    samples = {f"{one.sessions} sessions/{name}": samples_of(one, name) for one in steps for name in QUANTITIES}
    series = {name: Series("s", values) for name, values in samples.items() if values}
    rows = [row(one) for one in steps]
    return Result(
        kind="serve", clock=CLOCK, environment=begun, subject={}, settings={**settings, "buffer": BUFFER}, ceilings={},
        series=series, facts=as_in_a_file({"rows": rows, "refused": [one.refused for one in steps if one.refused]}),
    )  # fmt: skip


def samples_of(one: Step, name: str) -> tuple[float, ...]:
    """The samples of one quantity, of all sessions of a step."""
    values = [getattr(viewed, name) for viewed in one.viewed]
    return tuple(values if name == "first_picture" else chain.from_iterable(values))


def row(one: Step) -> dict[str, Any]:
    """The figures of one step: medians and tails over all of its sessions."""

    def all_of(name: str) -> list[float]:
        return [value for viewed in one.viewed for value in getattr(viewed, name)]

    firsts = [viewed.first_picture for viewed in one.viewed]
    return {
        "sessions": one.sessions,
        "first_picture": quantiles(firsts),
        "interval": quantiles(all_of("intervals")),
        "control_to_pixel": quantiles(all_of("control_to_pixel")),
        "controls": len(all_of("control_to_pixel")),
        "blocks": len(all_of("intervals")),
        "late_blocks": sum(viewed.late for viewed in one.viewed),
        "underruns": sum(viewed.underruns for viewed in one.viewed),
        "skipped": sum(viewed.skipped for viewed in one.viewed),
        "memory": one.memory,
        "refused": None if one.refused is None else one.refused["message"],
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 of some values, the nearest ones; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    return {f"p{share * 100:.0f}": ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in SHARES}


@contextmanager
def serving(url: str | None, arguments: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[str] | None]]:
    """A server's address, and its process if it is started here."""
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"url is {quoted(url)}; expected an address such as http://127.0.0.1:8000")
        yield url.rstrip("/"), None
        return
    command = [sys.executable, "-m", "inferix", "serve", "--port", "0", "--json", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise InferixError(f"inferix serve ended with code {process.wait(STARTING)} before it was up")
        yield json.loads(line)["url"], process
    finally:
        process.terminate()
        process.wait(STARTING)


def resident(process: subprocess.Popen[str]) -> int | None:
    """Resident memory of a process in bytes; None where the system does not say."""
    try:
        with open(f"/proc/{process.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return None
