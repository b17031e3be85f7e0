"""Answers that are no result: every error of every route in one JSON form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import InferixError, cut, quoted
from .refusals import Refusal, refusal_of


class LimitInfo(BaseModel):
    """Name and value of the setting that was reached."""

    name: str
    value: bool | float | str | None


class ErrorInfo(BaseModel):
    """A refusal. code: one word for programs."""

    code: str
    message: str
    limit: LimitInfo | None = None
    retry_after: int | None = None


class ErrorBody(BaseModel):
    error: ErrorInfo


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route besides its own, for the OpenAPI document."""
    return {status: {"model": ErrorBody} for status in (400, 401, 403, 408, 422, *statuses)}


def add_error_answers(app: FastAPI) -> None:
    """Answer every error in one JSON form."""

    @app.exception_handler(InferixError)
    async def refused(request: Request, error: InferixError) -> Response:
        refusal = refusal_of(error)
        return JSONResponse({"error": refusal.as_dict()}, refusal.status, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return answer("invalid", f"{cut(place)} is {quoted(first.get('input'))}: {cut(first['msg'], 400)}", 422)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "not_allowed"}.get(error.status_code, "invalid")
        return answer(code, cut(str(error.detail)), error.status_code, dict(error.headers or {}))


def answer(code: str, message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": Refusal(code, message).as_dict()}, status, headers)
