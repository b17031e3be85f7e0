"""Refusals: answers to requests that a server does not fulfil, as JSON that names the limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import AtCapacity, InferixError, SessionEnded, UsageError, cut, message_of

RETRY_AFTER = 5  # seconds, where nothing better is known
LONGEST_MESSAGE = 2000


class Refusal(InferixError):
    """A request that is refused.

    code: one word for programs. status: of HTTP. limit: name and value of the setting that was reached. retry_after:
    seconds after which there may be room. close: code that ends a WebSocket, None where it goes on.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int = 400,
        limit: tuple[str, Any] | None = None,
        retry_after: int | None = None,
        close: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.status, self.limit = code, status, limit
        self.retry_after, self.close = retry_after, close

    def as_dict(self) -> dict[str, Any]:
        """The fields of the JSON answer."""
        fields: dict[str, Any] = {"code": self.code, "message": cut(str(self), LONGEST_MESSAGE)}
        if self.limit is not None:
            fields["limit"] = {"name": self.limit[0], "value": self.limit[1]}
        if self.retry_after is not None:
            fields["retry_after"] = self.retry_after
        return fields

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


@dataclass(frozen=True)
class ErrorKind:
    code: str
    status: int
    retry_after: int | None = None


KINDS: tuple[tuple[type[InferixError], ErrorKind], ...] = (
    (UsageError, ErrorKind("invalid", 400)),
    (AtCapacity, ErrorKind("at_capacity", 503, RETRY_AFTER)),
    (SessionEnded, ErrorKind("ended", 410)),
    (InferixError, ErrorKind("failed", 500)),
)


def refusal_of(error: InferixError) -> Refusal:
    """The refusal that answers an error of the library."""
    if isinstance(error, Refusal):
        return error
    kind = next(kind for cause, kind in KINDS if isinstance(error, cause))
    message = message_of(error)
    return Refusal(kind.code, message, kind.status, retry_after=kind.retry_after)
