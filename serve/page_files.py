"""The files of the page, and the routes that serve them."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {  # by path: file and media type
    "/": ("index.html", "text/html; charset=utf-8"),
    "/live.css": ("live.css", "text/css; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/player.js": ("player.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'"
)


def add_page(app: FastAPI) -> None:
    """The page: files that lie in the package."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}

    def add(path: str, name: str, kind: str) -> None:
        @app.get(path, include_in_schema=False)
        def file() -> Response:
            return FileResponse(PAGE / name, media_type=kind, headers=headers)

    for path, (name, kind) in PAGE_FILES.items():
        add(path, name, kind)
