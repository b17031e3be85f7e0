"""Controls of one client, as they arrive: decoded, within the rate, and not wrong too often in a row."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.websockets import WebSocket, WebSocketDisconnect

from .protocol import Codec, Control
from .refusals import Refusal

MISUSED = 1008  # code that closes a WebSocket
MOST_MISTAKES = 16  # malformed or too frequent messages in a row


class Closed(Exception):
    """The connection is to be closed, with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass
class TokenBucket:
    """Allows `rate` events per second, over two seconds."""

    rate: float
    at: float = field(default_factory=time.monotonic)
    tokens: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = 2 * self.rate

    def take(self) -> bool:
        """Take one; False where there is none."""
        now = time.monotonic()
        self.tokens = min(2 * self.rate, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class ControlReader:
    """Reads the messages of one client."""

    def __init__(self, codec: Codec, messages_per_second: float) -> None:
        self.codec, self.bucket = codec, TokenBucket(messages_per_second)
        self.mistakes = 0

    async def receive(self, socket: WebSocket, refuse: Callable[[Refusal], Awaitable[None]]) -> Control | None:
        """The next control; None for a message that is refused, by `refuse`.

        WebSocketDisconnect where the client is gone, Closed after too many refused messages in a row.
        """
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | None = message.get("text")
        try:
            return self.read(message["bytes"] if text is None else text)
        except Refusal as refusal:
            await refuse(refusal)
            self.count_mistake(refusal)
            return None

    def read(self, message: str | bytes) -> Control:
        """The control in a message; Refusal for another message, which `check` is to follow."""
        if not self.bucket.take():
            limit = ("messages_per_second", self.bucket.rate)
            raise Refusal("too_many", "messages come too fast", 429, limit, retry_after=1)
        control = self.codec.read(message)
        self.mistakes = 0
        return control

    def count_mistake(self, refusal: Refusal) -> None:
        """Note a refused message; Closed after too many in a row."""
        self.mistakes += 1
        if self.mistakes >= MOST_MISTAKES:
            raise Closed(MISUSED, refusal.code)
