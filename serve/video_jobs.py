"""Video jobs: they wait, run one after the other beside the live sessions, and survive a restart of the server."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import AtCapacity, InferixError, SessionEnded, UsageError, message_of, quoted
from ..runtime.media import VideoWriter, contact_sheet
from ..runtime.sessions.output_queue import Block
from ..runtime.sessions.session import Session
from ..runtime.sinks import Frames, Pump
from .engine_host import EngineHost
from .job_store import COMPLETED, FAILED, IN_PROGRESS, QUEUED, Job, JobStore
from .live_session import begins_with, check_prompt, check_size
from .refusals import RETRY_AFTER, Refusal, refusal_of
from .settings import ServeSettings

LOG = logging.getLogger("inferix.serve")
RETRY_SECONDS = 1.0  # between two tries to open a job's session
SHEET_CELLS = 24  # pictures on a spritesheet, at most
VARIANTS = {"video": ("mp4", "video/mp4"), "thumbnail": ("webp", "image/webp"), "spritesheet": ("png", "image/png")}
INPUT = "input"  # suffix of the picture that a job starts from


class VideoJobs:
    """The jobs of a server. They belong to the event loop; each running one writes its file in a thread.

    unfinished: jobs that wait or run.
    """

    def __init__(self, host: EngineHost, settings: ServeSettings, folder: Path) -> None:
        self.host, self.settings, self.folder = host, settings, folder
        self._running: dict[str, asyncio.Task[None]] = {}
        self._sessions: dict[str, Session] = {}
        self._changed = asyncio.Event()
        self._stopping = False
        self.unfinished = 0
        self._store: JobStore | None = None

    # Running

    @property
    def store(self) -> JobStore:
        assert self._store is not None, "the server is not running"
        return self._store

    def start(self) -> None:
        """Go on with the jobs that were there when the server was stopped."""
        self._store = JobStore(self.folder)
        self.store.requeue()
        self._note_change()
        self._dispatcher = asyncio.create_task(self._dispatch())

    async def stop(self) -> None:
        """Stop the running jobs; they begin again with the next server of the same folder."""
        self._stopping = True
        self._dispatcher.cancel()
        for session in self._sessions.values():
            with suppress(SessionEnded):
                session.stop()
        for task in self._running.values():
            if task.get_name() not in self._sessions:
                task.cancel()
        await asyncio.gather(self._dispatcher, *self._running.values(), return_exceptions=True)
        self.store.requeue()
        self.store.close()

    async def _dispatch(self) -> None:
        """Start waiting jobs as running ones end."""
        while True:
            self._changed.clear()
            while len(self._running) < self.settings.jobs and (job := self.store.next_queued()) is not None:
                job.status = IN_PROGRESS
                self.store.update(job)
                self._running[job.id] = asyncio.create_task(self._run(job), name=job.id)
            await self._changed.wait()

    async def _run(self, job: Job) -> None:
        """Make one video, and note how it ended."""
        try:
            await self._make(job)
            if self._stopping or self.store.get(job.id) is None:
                return
            job.status, job.progress, job.completed_at = COMPLETED, 100, int(time.time())
        except asyncio.CancelledError:
            return
        except InferixError as error:
            refusal = refusal_of(error)
            job.status, job.error_code, job.error_message = FAILED, refusal.code, str(refusal)
        except Exception as error:  # of any kind: the job fails, and the server goes on
            LOG.exception("job %s failed", job.id)
            job.status, job.error_code, job.error_message = FAILED, "failed", message_of(error)
        finally:
            self._running.pop(job.id, None)
            self._changed.set()
        self.store.update(job)
        self._note_change()
        for old in self.store.finished_beyond(self.settings.jobs_kept):
            self.store.remove(old)
        LOG.info("job %s %s", job.id, job.status)

    async def _make(self, job: Job) -> None:
        session = await self._open(job)
        self._sessions[job.id] = session
        try:
            await asyncio.to_thread(self._write, job, session, asyncio.get_running_loop())
        finally:
            del self._sessions[job.id]
            await self.host.close(session)

    async def _open(self, job: Job) -> Session:
        """A session for a job, as soon as there is room."""
        if job.model != self.host.engine.parts.source:
            raise Refusal("not_found", f"model {quoted(job.model)} is not served any more", 404)
        given = self.store.file(job.id, INPUT)
        opening = begins_with(self.host.engine, self.settings) | ({"image": given} if given.is_file() else {})
        size = (job.width, job.height)
        make = partial(self.host.engine.open, job.prompts[0][1], seed=job.seed, size=size, **opening)
        while True:
            try:
                return await self.host.make(make)
            except AtCapacity:
                await asyncio.sleep(RETRY_SECONDS)

    def _write(self, job: Job, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        """Write the video, its thumbnail and its spritesheet; called in a thread. The stream ends if it is stopped."""
        from PIL import Image

        engine, store = self.host.engine, self.store
        count = engine.blocks_for(job.seconds)
        pictures: list[Frames] = []
        video = VideoWriter(store.file(job.id, "mp4"), engine.fps, session.size)
        with Pump(stream_of(job, session, count), video, first=session.prefix_frames) as blocks:
            for block in blocks:
                assert block.frames is not None
                pictures.append(block.frames[0].copy())
                loop.call_soon_threadsafe(self._note_progress, job, 100 * len(pictures) // (count + 1))
        if len(pictures) < count:
            return  # it was stopped, and is not kept
        Image.fromarray(pictures[0]).save(store.file(job.id, "webp"), "WEBP")
        step = -(-len(pictures) // SHEET_CELLS)
        contact_sheet(pictures[::step], store.file(job.id, "png"))

    def _note_progress(self, job: Job, progress: int) -> None:
        if job.id in self._sessions and self._store is not None:
            job.progress = progress
            self.store.update(job)

    # Requests

    def create(
        self,
        prompt: str,
        model: str | None,
        seconds: float,
        size: tuple[int, int] | None,
        seed: int,
        image: Path | None,
    ) -> Job:
        """Add a job. image: an uploaded file, which is moved. Refusal where it cannot be made."""
        engine = self.host.engine
        size = engine.default_size if size is None else size
        check_prompt(prompt, self.settings)
        engine.manager.check_prompt(prompt)
        check_size(size, engine, self.settings)
        if size[0] % 2 or size[1] % 2:
            raise Refusal("invalid", f"size is {size[0]}x{size[1]}; video needs even width and height")
        if model not in (None, engine.parts.source):
            message = f"there is no model {quoted(model)}; there is {quoted(engine.parts.source)}"
            raise Refusal("not_found", message, 404)
        if seconds > self.settings.job_seconds:
            limit = ("job_seconds", self.settings.job_seconds)
            raise Refusal("too_long", f"seconds is {seconds:g}; expected at most {limit[1]:g}", 400, limit)
        if self.store.count(QUEUED) >= self.settings.jobs_waiting:
            limit = ("jobs_waiting", self.settings.jobs_waiting)
            raise Refusal("at_capacity", f"{limit[1]:g} jobs wait already", 503, limit, RETRY_AFTER)
        if image is not None:
            check_picture(image, self.settings)
        job = Job(
            id=secrets.token_hex(16), created_at=int(time.time()), prompt=prompt, model=engine.parts.source,
            seconds=seconds, width=size[0], height=size[1], seed=seed,
        )  # fmt: skip
        if image is not None:
            image.rename(self.store.file(job.id, INPUT))
        return self._add(job)

    def remix(self, id: str, prompt: str, at: float = 0.0) -> Job:
        """Add a job that is an earlier one up to `at` seconds and has another prompt from the next block on: a fork.

        Refusal for a time after its end.
        """
        source = self.find(id)
        if at >= source.seconds:
            raise Refusal("invalid", f"at is {at:g}; expected less than the {source.seconds:g} s of video {id}")
        block = self.host.engine.blocks_for(at) if at > 0 else 0
        check_prompt(prompt, self.settings)
        self.host.engine.manager.check_prompt(prompt)
        job = replace(
            source, id=secrets.token_hex(16), created_at=int(time.time()), prompt=prompt, status=QUEUED, progress=0,
            completed_at=None, error_code=None, error_message=None, remixed_from=id,
            earlier=source.prompts_before(block),
        )  # fmt: skip
        given = self.store.file(id, INPUT)
        if given.is_file():
            self.store.file(job.id, INPUT).write_bytes(given.read_bytes())
        return self._add(job)

    def _add(self, job: Job) -> Job:
        self.store.add(job)
        self._note_change()
        return job

    def _note_change(self) -> None:
        """Have waiting jobs looked for, and count those that are not finished."""
        self.unfinished = self.store.count(QUEUED, IN_PROGRESS)
        self._changed.set()

    def find(self, id: str) -> Job:
        """A job; Refusal where there is none."""
        job = self.store.get(id)
        if job is None:
            raise Refusal("not_found", f"there is no video {quoted(id, 64)}", 404)
        return job

    def page(self, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        if after is not None:
            self.find(after)
        return self.store.page(after, limit, newest_first)

    async def delete(self, id: str) -> None:
        """Remove a job and its files; a running one is stopped first."""
        self.find(id)
        task, session = self._running.get(id), self._sessions.get(id)
        if session is not None:
            with suppress(SessionEnded):
                session.stop()
        elif task is not None:
            task.cancel()
        if task is not None:
            self.store.remove(id)  # so that its end is not noted
            await asyncio.wait({task})
        self.store.remove(id)
        self._note_change()

    def content(self, id: str, variant: str) -> tuple[Path, str]:
        """File and media type of a finished job; Refusal for another one."""
        job = self.find(id)
        if job.status != COMPLETED:
            raise Refusal("not_ready", f"video {id} is {job.status}", 409)
        suffix, kind = VARIANTS[variant]
        path = self.store.file(id, suffix)
        if not path.is_file():
            raise Refusal("not_found", f"the {variant} of video {id} is gone", 404)
        return path, kind


def stream_of(job: Job, session: Session, count: int) -> Iterator[Block]:
    """The blocks of a job, `count` in all, each prompt from its block on; fewer where the session is stopped."""
    made = 0
    with suppress(SessionEnded):
        for number, (end, text) in enumerate(job.prompts):
            if number:
                session.prompt(text)
            part = min(count, count if end is None else end) - made
            if part > 0:
                yield from session.stream(part)
                made += part


def check_picture(path: Path, settings: ServeSettings) -> None:
    """Refusal for a file that is no picture, or too large a one; its pixels are not decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            width, height = picture.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError("input_reference is no picture; expected PNG, JPEG or WebP") from error
    if width * height > settings.upload_pixels:
        limit = ("upload_pixels", settings.upload_pixels)
        raise Refusal("too_long", f"the picture has {width}x{height} pixels", 413, limit)
