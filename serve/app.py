"""The routes of a server: the page, the live WebSocket, worlds, models, health and metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, WebSocket
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel

from ..errors import InferixError
from ..models.registry import family_of
from ..runtime.engine import Engine
from ..runtime.files import PartFile
from ..runtime.sessions.session_file import read_session
from ..version import __version__
from .access import Access
from .answers import add_error_answers, errors
from .checkpoints import Checkpoints
from .connection import Connection
from .engine_host import EngineHost
from .live_sessions import LiveSessions
from .metrics import ServerMetrics
from .page_files import PAGE_FILES, add_page
from .protocol import Attach, Open, json_schema
from .recording import Recordings
from .refusals import Refusal, refusal_of
from .routing import ReplicaFacts
from .settings import ServeSettings
from .trace import Trace
from .video_jobs import VideoJobs
from .video_routes import video_routes
from .webrtc import LONGEST_SDP, Answered, WebRtc, takes_video
from .worlds import SUFFIX, Worlds

ENCODER_THREADS = 2
LONGEST_TRACE = 60  # seconds

Seed = Annotated[int, Query(ge=0, lt=2**53)]
Id = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="32 hex digits")]


class Health(BaseModel):
    """status: ok, draining or failed. sessions: live ones; places: how many there may be."""

    status: str
    sessions: int
    places: int


class ModelInfo(BaseModel):
    """A model that the server runs. examples: prompts that it follows.

    video_in: sessions can be made from live video.
    """

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "inferix"
    preset: str
    size: tuple[int, int]
    fps: int
    actions: list[str]
    camera: bool
    video_in: bool
    rewind_blocks: int
    examples: list[str]


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelInfo]


class World(BaseModel):
    """A saved world."""

    id: str
    object: str = "world"
    bytes: int


class Server:
    """An engine, its live sessions and what is shared by all routes."""

    def __init__(self, engine: Engine, settings: ServeSettings, folder: Path) -> None:
        self.settings = settings
        self.host = EngineHost(engine)
        self.metrics = ServerMetrics(engine)
        shared = settings.shared or folder
        self.worlds = Worlds(shared / "worlds", settings.worlds, settings.prompt_characters)
        self.checkpoints = Checkpoints(shared / "checkpoints")
        self.jobs = VideoJobs(self.host, settings, folder / "videos")
        self.recordings = Recordings(
            folder / "recordings", settings.recordings, settings.recordings_kept, settings.recording_seconds,
            settings.push_to,
        )
        self.trace = Trace(engine.manager.ranges)
        engine.observe(self.trace.observe)
        self.live = LiveSessions(
            self.host, settings, self.worlds, self.recordings, self.metrics, self.checkpoints, self.trace
        )
        self.webrtc = WebRtc(self.live)
        self.pool = ThreadPoolExecutor(ENCODER_THREADS, "encoder")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine and look after the sessions; at the end drain them."""
        self.host.on_control(asyncio.get_running_loop(), self.live.control_applied)
        self.host.start()
        self.jobs.start()
        await asyncio.to_thread(self.checkpoints.trim)
        sweeper = asyncio.create_task(self.live.sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            await self.drain()
            await self.webrtc.close()
            await self.jobs.stop()
            await asyncio.to_thread(self.host.stop)
            self.pool.shutdown(cancel_futures=True)

    async def drain(self) -> None:
        """End all sessions within `drain_seconds`."""
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                await self.live.drain()
        except TimeoutError:
            return

    def health(self) -> Health:
        status = "ok" if self.host.alive else "failed"
        if self.live.draining:
            status = "draining"
        return Health(status=status, sessions=len(self.live.sessions), places=self.settings.sessions)

    def facts(self, session: str | None) -> ReplicaFacts:
        """The numbers that a router chooses by, and whether `session` is live here."""
        gauges = self.host.engine.metrics()["gauges"]
        watched = [live for live in self.live.sessions.values() if live.viewer is not None and live.video is None]
        slacks = [live.slack for live in watched if live.slack is not None]
        room = gauges["sessions_room"]
        return ReplicaFacts(
            replica=self.checkpoints.owner, status=self.health().status, sessions=self.live.places_taken,
            places=self.settings.sessions, room=None if math.isinf(room) else int(room), load=self.live.load,
            late=self.live.real_time.late, realtime=self.settings.realtime,
            pages_in_use=int(gauges["pages_in_use"]), slack=min(slacks, default=None),
            holds=session is not None and session in self.live.sessions, jobs=self.jobs.unfinished,
        )  # fmt: skip

    def models(self) -> ModelList:
        engine = self.host.engine
        info = ModelInfo(
            id=engine.parts.source, preset=engine.preset.name, size=engine.default_size, fps=engine.fps,
            actions=list(engine.spec.actions), camera=engine.spec.camera_channels is not None,
            video_in=takes_video(engine), rewind_blocks=engine.preset.context.rewind_blocks,
            examples=list(family_of(engine.spec).examples),
        )  # fmt: skip
        return ModelList(data=[info])

    async def receive_world(self, request: Request) -> World:
        """Store an uploaded world, if this engine can go on from it."""
        world, path = self.worlds.new()
        engine = self.host.engine
        part = PartFile(path)
        try:
            with part.part.open("wb") as file:
                async for piece in request.stream():
                    file.write(piece)
            await self.host.call(partial(read_session, part.part, engine.resources, engine.preset))
            part.keep()
        except InferixError as error:
            refusal = refusal_of(error)
            message = str(refusal).replace(str(part.part), "the file")
            raise Refusal(refusal.code, message, min(refusal.status, 499), refusal.limit) from error
        finally:
            part.discard()
        self.worlds.trim()
        return World(id=world, bytes=path.stat().st_size)


def make_app(server: Server) -> Access:
    """The ASGI application: the routes behind the check of `Access`."""
    app = FastAPI(
        title="Inferix", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan(server),
        description="Live sessions and video jobs of a block-diffusion world model.",
    )  # fmt: skip
    add_error_answers(app)
    add_page(app)
    add_facts(app, server)
    add_worlds(app, server)
    add_recordings(app, server)
    add_live(app, server)
    add_webrtc(app, server)
    app.include_router(video_routes(server.jobs))
    settings = server.settings
    return Access(app, settings.token, tuple(PAGE_FILES), settings.upload_bytes, settings.stall_seconds)


def lifespan(server: Server) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        async with server.running():
            yield

    return running


def add_facts(app: FastAPI, server: Server) -> None:
    @app.get("/health", responses={503: {"model": Health}, **errors()})
    def health(response: Response) -> Health:
        """Show whether the server takes sessions; status 503 where it does not."""
        facts = server.health()
        response.status_code = 200 if facts.status == "ok" else 503
        return facts

    @app.get("/v1/replica", responses=errors())
    def replica(session: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None) -> ReplicaFacts:
        """The numbers that a router chooses among servers by; `holds`: `session` is live here."""
        return server.facts(session)

    @app.get("/metrics", responses=errors())
    def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/trace", responses=errors(503))
    async def trace(seconds: Annotated[float, Query(gt=0, le=LONGEST_TRACE)] = 5.0) -> dict[str, Any]:
        """Record the next seconds of all live sessions, as a trace for Perfetto or Chrome."""
        if server.trace.recording:
            raise Refusal("at_capacity", "a trace is being recorded", 503, None, LONGEST_TRACE)
        server.trace.begin()
        try:
            await asyncio.sleep(seconds)
        finally:
            recorded = server.trace.end()
        return recorded

    @app.get("/v1/models", responses=errors())
    def models() -> ModelList:
        """The models that the server runs."""
        return server.models()

    @app.get("/v1/live/schema", responses=errors())
    def schema() -> dict[str, Any]:
        """JSON schema of the messages of the WebSocket `/v1/live`."""
        return json_schema()


def add_worlds(app: FastAPI, server: Server) -> None:
    file = {"schema": {"type": "string", "format": "binary"}}
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": file}}}

    @app.post("/v1/worlds", status_code=201, responses=errors(413, 503), openapi_extra=body)
    async def upload(request: Request) -> World:
        """Upload a saved world, to open or restore it."""
        return await server.receive_world(request)

    @app.get("/v1/worlds/{world}", responses=errors(404), response_class=FileResponse)
    def download(world: Id) -> FileResponse:
        """Download a saved world."""
        path = server.worlds.path(world)
        return FileResponse(path, media_type="application/octet-stream", filename=f"world-{world[:8]}{SUFFIX}")


def add_recordings(app: FastAPI, server: Server) -> None:
    @app.get("/v1/recordings/{id}/{name}", responses=errors(404), response_class=FileResponse)
    def file(id: Id, name: Annotated[str, InPath(max_length=64)]) -> FileResponse:
        """A file of a recording: `video.mp4`, or the playlist `index.m3u8` and its parts."""
        path, kind = server.recordings.file(id, name)
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})


def add_live(app: FastAPI, server: Server) -> None:
    @app.websocket("/v1/live")
    async def live(socket: WebSocket) -> None:
        await Connection(socket, server.live, server.pool).serve()


def add_webrtc(app: FastAPI, server: Server) -> None:
    sdp = {"content": {"application/sdp": {"schema": {"type": "string", "maxLength": LONGEST_SDP}}}}
    answers: dict[int | str, dict[str, Any]] = {201: {"description": "The answer", **sdp}}
    body = {"requestBody": {"required": True, **sdp}}
    refused = errors(404, 413, 501, 503)

    def answer(way: str, answered: Answered) -> Response:
        headers = {"Location": f"/v1/{way}/{answered.session}", "Inferix-Resume": answered.resume}
        return Response(answered.sdp, 201, headers, "application/sdp")

    async def offer(request: Request) -> str:
        return (await request.body()).decode("utf-8", "replace")

    @app.post(
        "/v1/whep", status_code=201, responses={**answers, **refused}, response_class=Response, openapi_extra=body
    )
    async def watch(
        request: Request,
        prompt: str | None = None,
        seed: Seed = 0,
        session: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None,
        resume: Annotated[str, Query(max_length=128)] = "",
    ) -> Response:
        """Watch a session by WebRTC (WHEP): a new one for a prompt, or one that waits, such as a fork."""
        begin: Open | Attach = Open(id=0, type="open", prompt=prompt, seed=seed)
        if session is not None:
            begin = Attach(id=0, type="attach", session=session, resume=resume or "-")
        return answer("whep", await server.webrtc.watch(await offer(request), begin))

    @app.post(
        "/v1/whip", status_code=201, responses={**answers, **refused}, response_class=Response, openapi_extra=body
    )
    async def publish(
        request: Request,
        prompt: str,
        seed: Seed = 0,
        strength: Annotated[float, Query(gt=0, le=1)] = 0.6,
    ) -> Response:
        """Send video by WebRTC (WHIP), and have a session made from it; `sendrecv` shows it on the same connection."""
        begin = Open(id=0, type="open", prompt=prompt, seed=seed)
        return answer("whip", await server.webrtc.publish(await offer(request), begin, strength))

    @app.delete("/v1/whep/{id}", responses=errors(404))
    async def end_watched(id: Id) -> dict[str, str]:
        """End a session that is watched by WebRTC."""
        server.webrtc.end("whep", id)
        return {"id": id, "object": "session.ended"}

    @app.delete("/v1/whip/{id}", responses=errors(404))
    async def end_published(id: Id) -> dict[str, str]:
        """End a session that is made from video by WebRTC."""
        server.webrtc.end("whip", id)
        return {"id": id, "object": "session.ended"}
