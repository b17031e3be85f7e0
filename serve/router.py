"""A router before several servers: one address, a session's messages to the server that has it, and another one after.

A client's WebSocket stays open while its session moves: when its server drains or is gone, the router attaches to the
session at another server, which goes on from the checkpoint in the folder that they share. The router keeps no session:
several of them can stand before the same servers.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Annotated, Any, Literal

import httpx
import websockets
from fastapi import FastAPI, Query, Request, WebSocket
from fastapi.responses import Response, StreamingResponse
from starlette.websockets import WebSocketDisconnect
from websockets.asyncio.client import ClientConnection
from websockets.typing import Subprotocol

from ..errors import message_of, one_line, quoted
from ..version import __version__
from .access import Access
from .answers import add_error_answers, errors
from .connection import STALLED, TOO_LATE
from .control_reader import MISUSED, Closed, ControlReader
from .page_files import PAGE_FILES, add_page
from .protocol import SUBPROTOCOLS, Attach, Codec, Control, Ended, Event, Notice, Open, Refused
from .refusals import RETRY_AFTER, Refusal
from .routing import MOVED, ControlMemory, ReplicaFacts, choose, choose_for_job
from .server import ReadyServer, config_of
from .settings import ServeSettings

LOG = logging.getLogger("inferix.serve")
POLL_SECONDS = 1.0  # between two looks at the servers
ANSWER_SECONDS = 5.0  # for a server's numbers, and for a WebSocket to it
PING_SECONDS = 5.0  # after which a server that is cut off is noticed
RETRY_SECONDS = 0.3  # between two tries to go on with a session
PASSED_AT_A_TIME = 100  # requests that are passed on
PASSED_SECONDS = 60.0  # that a server may take to answer a request that is passed on
SENT_HEADERS = ("accept", "content-type", "if-modified-since", "if-none-match", "if-range", "range")
KEPT_HEADERS = (
    "accept-ranges", "cache-control", "content-disposition", "content-length", "content-range", "content-type", "etag",
    "inferix-resume", "last-modified", "location", "openai-poll-after-ms", "retry-after",
)  # fmt: skip
ID = "[0-9a-f]{32}"
PAGE = 100  # jobs asked for at a time

Servers = Callable[[], Awaitable[list[str]]]


class ServerLost(Exception):
    """The connection to a server ended without the end of the session."""


class Router:
    """The servers behind one address. urls: asked for again and again, since servers come and go.

    settings: of the clients' side: token, times and sizes; the servers have the same token.
    """

    def __init__(self, urls: Servers, settings: ServeSettings) -> None:
        self.urls, self.settings = urls, settings
        self.replicas: dict[str, ReplicaFacts] = {}
        self.headers = {} if settings.token is None else {"Authorization": f"Bearer {settings.token}"}
        self.client = httpx.AsyncClient(headers=self.headers, timeout=ANSWER_SECONDS)
        # Downloads have connections of their own: slow readers must not hold those that servers are asked by.
        self.passing = httpx.AsyncClient(
            headers=self.headers, timeout=ANSWER_SECONDS, limits=httpx.Limits(max_connections=PASSED_AT_A_TIME)
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.poll()
        poller = asyncio.create_task(self._poll_forever())
        try:
            yield
        finally:
            poller.cancel()
            await self.client.aclose()
            await self.passing.aclose()

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.poll()

    async def poll(self, session: str | None = None) -> str | None:
        """Ask all servers for their numbers; returns the one that has a session."""
        urls = await self.urls()
        answers = await asyncio.gather(*(self._facts(url, session) for url in urls))
        self.replicas = {url: facts for url, facts in zip(urls, answers, strict=True) if facts is not None}
        return next((url for url, facts in self.replicas.items() if facts.holds), None)

    async def _facts(self, url: str, session: str | None) -> ReplicaFacts | None:
        """The numbers of one server; None where it does not answer."""
        try:
            answer = await self.client.get(f"{url}/v1/replica", params={} if session is None else {"session": session})
            return ReplicaFacts.model_validate(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError) as error:
            LOG.info("server %s does not answer: %s", url, one_line(error))
            return None

    def choose(self, avoided: set[str], moved: bool = False) -> str:
        """A server with room; Refusal where there is none."""
        url = choose({url: facts for url, facts in self.replicas.items() if url not in avoided}, moved)
        self.replicas[url] = self.replicas[url].with_another()  # until the next look
        return url

    async def connect(self, url: str, subprotocol: str) -> ClientConnection:
        """A WebSocket to a server; ServerLost where it does not answer."""
        try:
            return await websockets.connect(
                f"ws{url.removeprefix('http')}/v1/live", subprotocols=[Subprotocol(subprotocol)], max_size=None,
                additional_headers=self.headers, open_timeout=ANSWER_SECONDS, ping_interval=PING_SECONDS,
                ping_timeout=PING_SECONDS, compression=None, proxy=None,
            )  # fmt: skip
        except (OSError, TimeoutError, websockets.WebSocketException) as error:
            raise ServerLost(f"{url}: {one_line(error)}") from error

    async def holder_of(self, path: str) -> str:
        """The server that has what is at a path, such as a job; Refusal where none does."""
        urls = list(self.replicas)
        found = await asyncio.gather(*(self._has(url, path) for url in urls))
        for url, has in zip(urls, found, strict=True):
            if has:
                return url
        raise Refusal("not_found", f"no server that answers has {quoted(path)}", 404)

    async def _has(self, url: str, path: str) -> bool:
        try:
            async with self.client.stream("GET", f"{url}{path}") as answer:
                return answer.status_code != 404
        except httpx.HTTPError as error:
            LOG.info("server %s does not answer: %s", url, one_line(error))
            return False

    async def jobs(self) -> list[dict[str, Any]]:
        """The video jobs of all servers that answer, newest first."""
        lists = await asyncio.gather(*(self._jobs_of(url) for url in list(self.replicas)))
        jobs = [job for jobs in lists for job in jobs]
        return sorted(jobs, key=lambda job: (job["created_at"], job["id"]), reverse=True)

    async def _jobs_of(self, url: str) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = []
        while True:
            after = {"after": jobs[-1]["id"]} if jobs else {}
            try:
                answer = await self.client.get(f"{url}/v1/videos", params={"limit": PAGE, **after})
                page = answer.raise_for_status().json()
            except (httpx.HTTPError, ValueError) as error:
                LOG.info("server %s does not answer: %s", url, one_line(error))
                return jobs
            jobs += page["data"]
            if not page["has_more"]:
                return jobs

    async def server_for(self, method: str, path: str, query: Mapping[str, str]) -> str:
        """The server that a request of a path is passed on to; Refusal where there is none."""
        if re.fullmatch(r"/v1/(models|live/schema|worlds(/[^/]+)?)", path):
            return self.any_url()
        if (method, path) == ("POST", "/v1/videos"):
            url = choose_for_job(self.replicas)
            self.replicas[url] = self.replicas[url].model_copy(update={"jobs": self.replicas[url].jobs + 1})
            return url
        if (job := re.match(rf"/v1/videos/{ID}(?=/|$)", path)) is not None:
            return await self.holder_of(job[0])
        if re.fullmatch(rf"/v1/recordings/{ID}/[^/]+", path):
            return await self.holder_of(path)
        if (peer := re.fullmatch(rf"/v1/(?:whep|whip)(?:/({ID}))?", path)) is not None:
            session = peer[1] or query.get("session")
            if session is not None and re.fullmatch(ID, session) is None:
                raise Refusal("invalid", f"session is {quoted(session, 64)}; expected an id of 32 hexadecimal digits")
            holder = None if session is None else await self.poll(session)
            if holder is None and method == "POST":
                return self.choose(set(), moved=session is not None)
            if holder is not None:
                return holder
        raise Refusal("not_found", f"the router and its servers have no {quoted(path)}", 404)

    def any_url(self) -> str:
        """A server that answers; Refusal where none does."""
        for url, facts in self.replicas.items():
            if facts.status == "ok":
                return url
        raise Refusal("at_capacity", "no server answers", 503, None, RETRY_AFTER)


class Relay:
    """One client: its messages to a server and back, and another server once the first is gone."""

    def __init__(self, socket: WebSocket, router: Router) -> None:
        self.socket, self.router = socket, router
        offered = socket.scope.get("subprotocols", [])
        self.subprotocol = next((name for name in SUBPROTOCOLS if name in offered), None)
        self.codec = Codec(self.subprotocol or SUBPROTOCOLS[0])
        self.reader = ControlReader(self.codec, router.settings.messages_per_second)
        self.memory = ControlMemory()
        self.own = f"router.{secrets.token_hex(4)}."  # begins the ids of controls that the client did not send
        self.session: str | None = None
        self.resume = ""
        self.server: ClientConnection | None = None
        self.url = ""

    async def serve(self) -> None:
        """Run from the handshake to the close."""
        await self.socket.accept(self.subprotocol)
        try:
            await self._run()
        except WebSocketDisconnect:
            pass
        except Closed as end:
            with suppress(RuntimeError, WebSocketDisconnect):
                await self.socket.close(end.code, end.reason)
        finally:
            if self.server is not None:
                await self.server.close()

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self.router.settings.start_seconds):
                self.begin = await self._first_control()
        except TimeoutError:
            limit = ("start_seconds", self.router.settings.start_seconds)
            await self._refuse(None, Refusal("too_late", f"nothing was opened within {limit[1]:g} s", 408, limit))
            raise Closed(TOO_LATE, "start_seconds") from None
        try:
            await self._begin_at_a_server()
        except Refusal as refusal:
            await self._refuse(self.begin.id, refusal)
            raise Closed(refusal.close or MISUSED, refusal.code) from None
        taking = asyncio.create_task(self._take_controls())
        showing = asyncio.create_task(self._show())
        try:
            await asyncio.wait({taking, showing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (taking, showing):
                task.cancel()
            results = await asyncio.gather(taking, showing, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    # Beginning

    async def _first_control(self) -> Open | Attach:
        while True:
            control = await self._receive()
            if isinstance(control, Open | Attach):
                return control
            if control is not None:
                await self._refuse(control.id, Refusal("wrong_order", "no session is open; send open or attach first"))

    async def _begin_at_a_server(self) -> None:
        """Connect to the server that has the client's session, or to one with room, and send what it began with."""
        tried: set[str] = set()
        while True:
            attaching = isinstance(self.begin, Attach)
            holder = await self.router.poll(self.begin.session) if isinstance(self.begin, Attach) else None
            url = holder if holder is not None and holder not in tried else self.router.choose(tried, moved=attaching)
            try:
                self.server, self.url = await self.router.connect(url, self.codec.subprotocol), url
                await self._to_server(self.begin)
                return
            except ServerLost as error:
                LOG.warning("server lost: %s", error)
                tried.add(url)

    # Both directions

    async def _receive(self) -> Control | None:
        """See `ControlReader.receive`."""
        return await self.reader.receive(self.socket, partial(self._refuse, None))

    async def _take_controls(self) -> None:
        """Pass on what the client sends. What no server gets is kept, for the next one."""
        while True:
            control = await self._receive()
            if isinstance(control, Open | Attach):
                refusal = Refusal("wrong_order", "a session is open; use another connection")
                await self._refuse(control.id, refusal)
            elif control is not None:
                self.memory.sent(control)
                with suppress(ServerLost):
                    await self._to_server(control)

    async def _to_server(self, control: Control) -> None:
        if self.server is None:
            return
        try:
            await self.server.send(self.codec.pack(control.model_dump(exclude_none=True)))
        except websockets.ConnectionClosed as error:
            raise ServerLost(f"{self.url}: {one_line(error)}") from error

    async def _show(self) -> None:
        """Pass on what servers send, one after the other, until the session ends."""
        while True:
            try:
                await self._show_of_one_server()
            except ServerLost as error:
                if self.session is None:
                    await self._retry_opening(error)
                else:
                    await self._move(str(error))

    async def _show_of_one_server(self) -> None:
        """Pass on what the present server sends. ServerLost where it ends before the session; Closed after it."""
        assert self.server is not None
        try:
            async for message in self.server:
                event = self.codec.read_event(message)
                if event is None:
                    await self._send(message)
                    continue
                if event["type"] == "ended" and event["code"] in MOVED and self.session is not None:
                    raise ServerLost(f"{self.url}: {event['message']}")
                if event["type"] == "opened":
                    self.session, self.resume = event["session"], event["resume"]
                    self.memory.prompt = event.get("prompt")
                if event["type"] == "refused" and event["code"] == "draining" and self.session is None:
                    raise ServerLost(f"{self.url}: {event['message']}")
                if not str(event.get("id", "")).startswith(self.own) and self.memory.pass_on(event):
                    await self._send(message)
        except websockets.ConnectionClosed:
            pass  # its code says why
        code, reason = self.server.close_code or 1006, self.server.close_reason or ""
        if code in (1001, 1006, 1011, 1012):
            raise ServerLost(f"{self.url}: closed with {code}")
        raise Closed(code, reason)

    async def _retry_opening(self, error: ServerLost) -> None:
        """Open the session at another server: the first one ended before it was there."""
        LOG.warning("server lost: %s", error)
        await self.router.poll()
        self.router.replicas.pop(self.url, None)
        try:
            await self._begin_at_a_server()
        except Refusal as refusal:
            await self._refuse(self.begin.id, refusal)
            raise Closed(refusal.close or MISUSED, refusal.code) from None

    async def _move(self, reason: str) -> None:
        """Go on with the session at another server, and tell its client; Closed where none can within the time."""
        LOG.warning("session %s moves: %s", self.session, reason)
        old, self.server = self.server, None
        if old is not None:
            await old.close()
        since = time.perf_counter()
        until = since + self.router.settings.resume_seconds
        while True:
            try:
                opened = await self._attach_somewhere()
                break
            except (Refusal, ServerLost) as error:
                gone = isinstance(error, Refusal) and error.code == "not_found"
                if gone or time.perf_counter() > until:
                    await self._event(Ended(code="lost", message=f"no server could go on with it: {message_of(error)}"))
                    raise Closed(1000, "the session is over") from None
                await asyncio.sleep(RETRY_SECONDS)
        seconds, lost = time.perf_counter() - since, self.memory.lost_blocks(opened["next_block"])
        LOG.info("session %s moved in %.3f s, %d blocks lost", self.session, seconds, lost)
        await self._event(
            Notice(kind="moved", message="the session goes on at another server", blocks=lost, seconds=seconds)
        )
        await self._send(self.codec.pack(opened | {"id": self.begin.id}))
        controls, dropped = self.memory.owed(opened.get("prompt"), self.own)
        for id in dropped:
            await self._refuse(id, Refusal("moved", "the session moved before it was applied; send it again"))
        for control in controls:
            await self._to_server(control)

    async def _attach_somewhere(self) -> dict[str, Any]:
        """Attach to the session at a server with room; returns its `opened`."""
        assert self.session is not None
        await self.router.poll()
        url = self.router.choose({self.url} if len(self.router.replicas) > 1 else set(), moved=True)
        server = await self.router.connect(url, self.codec.subprotocol)
        control = Attach(
            id=f"{self.own}attach", type="attach", session=self.session, resume=self.resume, media=self.begin.media
        )
        try:
            await server.send(self.codec.pack(control.model_dump(exclude_none=True)))
            event = self.codec.read_event(await asyncio.wait_for(server.recv(), ANSWER_SECONDS))
        except (websockets.ConnectionClosed, TimeoutError) as error:
            await server.close()
            raise ServerLost(f"{url}: {one_line(error)}") from error
        if event is None or event["type"] != "opened":
            await server.close()
            assert event is not None
            raise Refusal(event.get("code", "failed"), event.get("message", "the server did not go on"))
        self.server, self.url = server, url
        return event

    # Sending to the client

    async def _event(self, event: Event) -> None:
        await self._send(self.codec.write(event))

    async def _refuse(self, id: int | str | None, refusal: Refusal) -> None:
        await self._event(Refused(id=id, **refusal.as_dict()))

    async def _send(self, message: str | bytes) -> None:
        """Send one message to the client; Closed where it takes none for too long."""
        try:
            async with asyncio.timeout(self.router.settings.stall_seconds):
                if isinstance(message, str):
                    await self.socket.send_text(message)
                else:
                    await self.socket.send_bytes(message)
        except TimeoutError:
            raise Closed(STALLED, "stall_seconds") from None
        except RuntimeError as error:  # Starlette's answer once the close was sent or received
            raise WebSocketDisconnect(1006) from error


def router_app(router: Router) -> FastAPI:
    """The routes of a router, without the check of `Access`, which `make_router_app` adds."""

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with router.running():
            yield

    app = FastAPI(title="Inferix", version=__version__, docs_url=None, redoc_url=None, lifespan=running)
    add_error_answers(app)
    add_page(app)

    @app.get("/health", responses=errors(503))
    def health(response: Response) -> dict[str, Any]:
        """Show whether any server takes sessions; status 503 where none does."""
        taking = sum(facts.status == "ok" for facts in router.replicas.values())
        response.status_code = 200 if taking else 503
        sessions = sum(facts.sessions for facts in router.replicas.values())
        places = sum(facts.places for facts in router.replicas.values())
        return {"status": "ok" if taking else "failed", "servers": taking, "sessions": sessions, "places": places}

    @app.get("/v1/replicas", responses=errors())
    def replicas() -> dict[str, ReplicaFacts]:
        """The servers in numbers, by address."""
        return router.replicas

    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await Relay(socket, router).serve()

    @app.get("/v1/videos", responses=errors(404))
    async def list_videos(
        after: Annotated[str | None, Query(pattern=f"^{ID}$")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """List the video jobs of all servers that answer."""
        jobs = await router.jobs()
        if order == "asc":
            jobs.reverse()
        places = {job["id"]: place for place, job in enumerate(jobs)}
        if after is not None and after not in places:
            raise Refusal("not_found", f"there is no video {quoted(after)}", 404)
        start = 0 if after is None else places[after] + 1
        data = jobs[start : start + limit]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {
            "object": "list", "data": data, "first_id": first, "last_id": last, "has_more": start + limit < len(jobs)
        }  # fmt: skip

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def pass_on(request: Request, path: str) -> Response:
        """Have the server answer that a request belongs to."""
        url = await router.server_for(request.method, request.url.path, request.query_params)
        return await passed_on(router, url, request)

    return app


async def passed_on(router: Router, url: str, request: Request) -> Response:
    """The answer of a server to a request."""
    sent = router.passing.build_request(
        request.method, f"{url}{request.url.path}", params=str(request.url.query),
        headers={name: request.headers[name] for name in SENT_HEADERS if name in request.headers},
        content=request.stream() if request.method == "POST" else None, timeout=PASSED_SECONDS,
    )  # fmt: skip
    try:
        answer = await router.passing.send(sent, stream=True)
    except httpx.HTTPError as error:
        raise Refusal("at_capacity", "the server does not answer", 503, None, RETRY_AFTER) from error
    headers = {name: value for name, value in answer.headers.items() if name in KEPT_HEADERS}

    async def body() -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_bytes():
                yield piece
        finally:
            await answer.aclose()

    return StreamingResponse(body(), answer.status_code, headers)


def make_router_app(router: Router) -> Access:
    """The ASGI application of a router: its routes behind the check of `Access`."""
    settings = router.settings
    return Access(router_app(router), settings.token, tuple(PAGE_FILES), settings.upload_bytes, settings.stall_seconds)


def run_router(
    router: Router, listener: socket.socket, ready: Callable[[], object], log_level: str = "warning"
) -> None:
    """Route until SIGTERM or Ctrl-C. ready: called once requests are answered."""
    ReadyServer(config_of(make_router_app(router), router.settings, log_level), ready).run(sockets=[listener])
