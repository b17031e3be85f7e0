"""Access: one check of token, host and origin before every route and every WebSocket.

Only the page's own files are open: a browser has to load them before it can send a token. Without a token the server
is for this machine only, so requests that reached it under another name (DNS rebinding) are refused, and so are those
that a page of another site makes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from .refusals import Refusal

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_PROTOCOL = "inferix.token."  # of WebSockets; the token follows in URL-safe base64 without padding


class Access:
    """Refuses requests without the token, from other sites, and with bodies that are too long or do not end.

    open_paths: paths that need no token. upload_bytes: longest body; stall_seconds: for its next part to come.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, open_paths: Collection[str], upload_bytes: int, stall_seconds: float
    ) -> None:
        self.app, self.token, self.open_paths = app, token, open_paths
        self.upload_bytes, self.stall_seconds = upload_bytes, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refusal = self.refusal(scope)
        if refusal is None:
            return await self.app(scope, limited(receive, self.upload_bytes, self.stall_seconds, scope), send)
        response = JSONResponse({"error": refusal.as_dict()}, refusal.status, refusal.headers)
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(response)
        else:
            await response(scope, receive, send)

    def refusal(self, scope: Scope) -> Refusal | None:
        """The reason to refuse a request or a WebSocket; None for one that may pass."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.token is None and host_name(f"//{host}") not in LOOPBACK:
            return Refusal("wrong_host", "this server has no token and answers on this machine only", 403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Refusal("wrong_origin", "requests of other sites' pages are refused", 403)
        if scope["type"] == "http" and scope["path"] in self.open_paths:
            return None
        if self.token is not None and not any(equal(token, self.token) for token in sent_tokens(headers)):
            return Refusal("no_token", "a token is required: Authorization: Bearer TOKEN", 401)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.upload_bytes:
            return too_long(self.upload_bytes)
        return None


def host_name(address: str) -> str | None:
    """The host of an address; None for what is no address."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def equal(one: str, other: str) -> bool:
    """Compare in a time that depends neither on where two tokens differ nor on their lengths: hashes are compared."""
    hashes = (hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest() for token in (one, other))
    return hmac.compare_digest(*hashes)


def sent_tokens(headers: Headers) -> list[str]:
    """The tokens of a request: of its Authorization header, and of the subprotocols of a WebSocket."""
    tokens = []
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        tokens.append(token.strip())
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(TOKEN_PROTOCOL):
            tokens.append(from_base64(protocol.strip().removeprefix(TOKEN_PROTOCOL)))
    return tokens


def from_base64(text: str) -> str:
    """Decode URL-safe base64 without padding; an empty text for what is none."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode("utf-8")
    except ValueError:
        return ""


def limited(receive: Receive, most: int, seconds: float, scope: Scope) -> Receive:
    """The body of a request, of at most `most` bytes; Refusal once there are more, whatever its header says.

    seconds: that the next part may take; Refusal after them.
    """
    if scope["type"] != "http":
        return receive
    seen, whole = 0, False

    async def counted() -> Message:
        nonlocal seen, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(seconds):
                message = await receive()
        except TimeoutError:
            limit = ("stall_seconds", seconds)
            raise Refusal("too_late", f"no more of the body came within {seconds:g} s", 408, limit) from None
        whole = not message.get("more_body", False)
        seen += len(message.get("body", b""))
        if seen > most:
            raise too_long(most)
        return message

    return counted


def too_long(most: int) -> Refusal:
    return Refusal("too_long", f"the body is longer than {most} bytes", 413, limit=("upload_bytes", most))
