"""Running a server: the socket, uvicorn, and an end that drains."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import uvicorn

from ..errors import UsageError, quoted
from .access import LOOPBACK, Access
from .app import Server, make_app
from .live_session import LiveSession
from .settings import ServeSettings

LOG = logging.getLogger("inferix.serve")
LOOK_SECONDS = 0.5  # between two looks at the engine
TELL_SECONDS = 2.0  # for viewers to get the reason why an engine has ended
PING_SECONDS = 20.0  # between two pings of a WebSocket; a client that answers none is disconnected after as long


class ReadyServer(uvicorn.Server):
    """Calls `ready` once requests are answered. loop: the event loop, once it runs."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self.ready = ready
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started:
            self.ready()


class DrainingServer(ReadyServer):
    """Drains live sessions at the first SIGTERM or Ctrl-C, then ends; a second one ends it at once.

    with_engine: ends once the engine has ended, too; `lost` is then True.
    """

    def __init__(
        self, config: uvicorn.Config, server: Server, ready: Callable[[], object], with_engine: bool = False
    ) -> None:
        super().__init__(config, ready)
        self.server, self.with_engine, self.lost = server, with_engine, False
        self._stopped = False  # before the drain begins, which waits for the loop
        self._draining: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.with_engine:
            self._watch = asyncio.ensure_future(self._watch_engine())

    async def _watch_engine(self) -> None:
        lives = set[LiveSession]()
        while self.server.host.alive:
            lives = set(self.server.live.sessions.values())
            await asyncio.sleep(LOOK_SECONDS)
        if not (self.should_exit or self._stopped):
            LOG.error("the engine has ended: %s", self.server.host.reason)
            self.lost = True
            try:
                await self._tell(lives.union(self.server.live.sessions.values()))
            finally:
                self.should_exit = True

    async def _tell(self, lives: Collection[LiveSession]) -> None:
        """End sessions of an engine that has ended; their viewers get the reason before the connection is closed."""
        for live in lives:
            live.end("lost", str(self.server.host.reason))
        until = time.monotonic() + TELL_SECONDS
        while any(live.viewer is not None for live in lives) and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS / 10)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or self.loop is None:
            self.force_exit = self.should_exit = True
            return
        LOG.info("%s: draining for at most %g s", signal.Signals(sig).name, self.server.settings.drain_seconds)
        self.request_drain()

    def request_drain(self) -> None:
        """Drain the live sessions and end; free to any thread once the server has started."""
        assert self.loop is not None
        self._stopped = True
        self.loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self.server.drain()
        self.should_exit = True


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that listens; UsageError for an address that is open to others without a token, or not free."""
    if token is None and host not in LOOPBACK:
        raise UsageError(
            f"host is {quoted(host)}, which other machines reach, and there is no token; give token, a file with one"
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        message = f"cannot listen on {quoted(host)}, port {port}: {error}; choose another port or host"
        raise UsageError(message) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_config(server: Server, log_level: str = "warning") -> uvicorn.Config:
    """The settings of uvicorn for a server."""
    return config_of(make_app(server), server.settings, log_level)


def config_of(app: Access, settings: ServeSettings, log_level: str = "warning") -> uvicorn.Config:
    """The settings of uvicorn for an application."""
    return uvicorn.Config(
        app, http=impatient(settings.start_seconds),
        ws_max_size=settings.message_bytes, ws_max_queue=16, ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS, ws_per_message_deflate=False, log_level=log_level, log_config=None,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)), server_header=False,
    )  # fmt: skip


def impatient(seconds: float) -> Any:
    """Factory of uvicorn's HTTP protocol, which closes a connection without a whole request after some seconds."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    def make(*arguments: Any, **settings: Any) -> Any:
        protocol: Any = AutoHTTPProtocol(*arguments, **settings)

        def look() -> None:
            transport = protocol.transport
            if transport is not None and protocol.cycle is None and transport.get_protocol() is protocol:
                LOG.info("a connection sent no request within %g s", seconds)
                transport.close()

        protocol.loop.call_later(seconds, look)
        return protocol

    return make


def serve(
    server: Server, listener: socket.socket, ready: Callable[[], object], log_level: str = "warning",
    with_engine: bool = False,
) -> bool:  # fmt: skip
    """Serve until SIGTERM or Ctrl-C, or `with_engine` until the engine has ended; returns True for such an end.

    ready: called once requests are answered.
    """
    runner = DrainingServer(make_config(server, log_level), server, ready, with_engine)
    runner.run(sockets=[listener])
    return runner.lost
