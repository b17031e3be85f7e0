"""The HTTP routes of video jobs, in the form of the videos API that other servers and client libraries have."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..errors import quoted
from .answers import errors
from .job_store import Job
from .refusals import Refusal
from .video_jobs import VARIANTS, VideoJobs

POLL_AFTER = "500"  # milliseconds
VideoId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="32 hex digits")]


class VideoRequest(BaseModel):
    """A video to make. seconds: of video; size: WIDTHxHEIGHT, the model's own if not given."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    size: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0


class RemixRequest(BaseModel):
    """A fork of a video. at: seconds from its start up to which it is the same; the next block follows the prompt."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[str, Field(min_length=1)]
    at: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A video job. progress: in percent. seconds: as text, which clients expect."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None
    expires_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    prompt: str
    model: str
    seconds: str
    size: str
    seed: int
    remixed_from_video_id: str | None
    error: VideoError | None

    @classmethod
    def of(cls, job: Job) -> Video:
        error = None
        if job.error_code is not None:
            error = VideoError(code=job.error_code, message=job.error_message or "")
        return cls(
            id=job.id, created_at=job.created_at, completed_at=job.completed_at, status=job.status,  # type: ignore[arg-type]
            progress=job.progress, prompt=job.prompt, model=job.model, seconds=f"{job.seconds:g}",
            size=f"{job.width}x{job.height}", seed=job.seed, remixed_from_video_id=job.remixed_from, error=error,
        )  # fmt: skip


class VideoPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


def video_routes(jobs: VideoJobs) -> APIRouter:
    router = APIRouter(prefix="/v1/videos")

    @router.post("", responses=errors(404, 413, 503), openapi_extra=create_body())
    async def create(request: Request) -> Video:
        """Have a video made; poll it, then fetch its content."""
        async with read_request(request, jobs.folder) as (wanted, picture):
            size = None
            if wanted.size is not None:
                width, height = wanted.size.split("x")
                size = int(width), int(height)
            return Video.of(jobs.create(wanted.prompt, wanted.model, wanted.seconds, size, wanted.seed, picture))

    @router.get("", responses=errors(404))
    async def list_videos(
        after: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoPage:
        """List the video jobs."""
        page = jobs.page(after, limit + 1, order == "desc")
        data = [Video.of(job) for job in page[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoPage(data=data, first_id=first, last_id=last, has_more=len(page) > limit)

    @router.get("/{id}", responses=errors(404))
    async def retrieve(id: VideoId, response: Response) -> Video:
        """One video job, with its progress."""
        response.headers["openai-poll-after-ms"] = POLL_AFTER
        return Video.of(jobs.find(id))

    @router.get("/{id}/content", responses=errors(404, 409), response_class=FileResponse)
    async def content(id: VideoId, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> FileResponse:
        """The video, its thumbnail, or a sheet of pictures of it."""
        path, kind = jobs.content(id, variant)
        return FileResponse(path, media_type=kind, filename=f"video-{id[:8]}.{VARIANTS[variant][0]}")

    @router.delete("/{id}", responses=errors(404))
    async def delete(id: VideoId) -> DeletedVideo:
        """Remove a video job and its files; a running one is stopped."""
        await jobs.delete(id)
        return DeletedVideo(id=id)

    @router.post("/{id}/remix", responses=errors(404, 413))
    async def remix(id: VideoId, wanted: RemixRequest) -> Video:
        """A fork: the same video up to a time, and from there under another prompt."""
        return Video.of(jobs.remix(id, wanted.prompt, wanted.at))

    return router


@asynccontextmanager
async def read_request(request: Request, folder: Path) -> AsyncIterator[tuple[VideoRequest, Path | None]]:
    """The request and the uploaded picture, from JSON or a form. The picture is removed unless it is moved."""
    picture: Path | None = None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=16, max_part_size=65536) as form:
                values: Any = {name: value for name, value in form.items() if not isinstance(value, UploadFile)}
                uploads = {name: value for name, value in form.items() if isinstance(value, UploadFile)}
                for name, upload in uploads.items():
                    if name != "input_reference":
                        raise Refusal("invalid", f"file {quoted(name, 64)} is unknown; expected input_reference", 422)
                    with tempfile.NamedTemporaryFile(dir=folder, suffix=".upload", delete=False) as file:
                        picture = Path(file.name)
                        shutil.copyfileobj(upload.file, file)
        elif kind == "application/json":
            values = await json_of(request)
        else:
            raise Refusal("invalid", f"content-type is {quoted(kind, 64)}; expected JSON or multipart/form-data", 415)
        try:
            wanted = VideoRequest.model_validate(values)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        yield wanted, picture
    finally:
        if picture is not None:
            picture.unlink(missing_ok=True)


async def json_of(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error


def create_body() -> dict[str, Any]:
    """The two forms of a request for a video, for the OpenAPI document."""
    schema = VideoRequest.model_json_schema()
    upload = {"input_reference": {"type": "string", "format": "binary"}}
    form = {**schema, "properties": {**schema["properties"], **upload}}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
