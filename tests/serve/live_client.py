"""A server in a thread of this process, and a small client of the live protocol."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import websockets

import inferix
from inferix.runtime.engine import Engine
from inferix.serve.app import Server
from inferix.serve.engine_host import engine_limits
from inferix.serve.server import DrainingServer, address_of, listen, make_config
from inferix.serve.settings import ServeSettings

PROMPT = "a red robot in a snowy forest by day"
WAIT = 60.0  # seconds that a test waits for what has to come


def small_engine(settings: ServeSettings, rewind_blocks: int = 4, num_steps: int = 1) -> Engine:
    """The small world; with one step a block takes a fraction of its playing time, and hardly follows actions."""
    limits = engine_limits(settings)
    return inferix.load(device="cpu", limits=limits, rewind_blocks=rewind_blocks, num_steps=num_steps)


@contextmanager
def serving(
    settings: ServeSettings, folder: Path, engine: Engine | None = None, with_engine: bool = False
) -> Iterator[Served]:
    """A running server; it is drained at the end. with_engine: it ends once its engine has ended."""
    server = Server(engine or small_engine(settings), settings, folder)
    listener = listen("127.0.0.1", 0, settings.token)
    ready = threading.Event()
    runner = DrainingServer(make_config(server), server, ready.set, with_engine)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(WAIT)
        yield Served(server, address_of(listener), listener.getsockname(), runner)
    finally:
        runner.should_exit = True
        thread.join(WAIT)
        listener.close()
        assert not thread.is_alive()


class Served:
    """A server under test. url: of HTTP; address: of its socket."""

    def __init__(self, server: Server, url: str, address: tuple[str, int], runner: DrainingServer) -> None:
        self.server, self.url, self.address, self.runner = server, url, address, runner

    def connect(self, token: str | None = None, **options: Any) -> Any:
        """A WebSocket to the live route."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = f"ws{self.url.removeprefix('http')}/v1/live"
        return websockets.connect(url, additional_headers=headers, max_size=None, **options)

    def raw_socket(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=WAIT)


class Client:
    """A client that keeps all events and media headers, in the order they came."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.events: list[dict[str, Any]] = []
        self.media: list[tuple[int, ...]] = []
        self.payloads: list[bytes] = []
        self.last_id = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.close()

    async def send(self, type: str, **fields: Any) -> int:
        self.last_id += 1
        await self.socket.send(json.dumps({"type": type, "id": self.last_id, **fields}))
        return self.last_id

    async def receive(self) -> dict[str, Any] | None:
        """The next event; None for a media message."""
        async with asyncio.timeout(WAIT):
            message = await self.socket.recv()
        if isinstance(message, bytes):
            self.media.append(struct.unpack("<BBHIII", message[:16]))
            self.payloads.append(message[16:])
            return None
        event: dict[str, Any] = json.loads(message)
        self.events.append(event)
        return event

    async def until(self, type: str, **fields: Any) -> dict[str, Any]:
        """Receive up to an event with some fields."""
        while True:
            event = await self.receive()
            assert event is None or event["type"] == type or event["type"] not in ("refused", "ended"), event
            if event is not None and event["type"] == type and fields.items() <= event.items():
                return event

    async def open(self, **fields: Any) -> dict[str, Any]:
        await self.send("open", **({} if "world" in fields else {"prompt": PROMPT}) | fields)
        return await self.until("opened")

    async def applied(self, type: str, **fields: Any) -> dict[str, Any]:
        """Send a control and wait until it is applied."""
        return await self.until("applied", id=await self.send(type, **fields))

    async def refused(self, type: str, **fields: Any) -> dict[str, Any]:
        return await self.until("refused", id=await self.send(type, **fields))
