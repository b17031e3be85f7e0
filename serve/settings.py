"""Settings of a server: addresses aside, every limit that it keeps, with its default."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest, quoted
from ..runtime.arguments import above_zero, checked, choice, flag, integer, optional, path, text

BEHIND = ("skip", "pause")
SHORTEST_TOKEN = 16  # characters


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits and choices of a server. UsageError for a value out of range.

    token: clients have to send it; None for none. folder: holds jobs and saved worlds; None for a temporary one.
    shared: holds saved worlds and checkpoints in place of it, for several servers that go on with each other's
    sessions. checkpoint_every: blocks between two checkpoints of a session, 0 for none.
    behind: `skip` drops the oldest blocks of a viewer that is slower than the stream, `pause` makes none until it has
    caught up; a client may choose. image: first picture of sessions, for a model that begins with one. save_on_exit: at
    SIGTERM live sessions are saved as worlds.
    """

    token: str | None = None
    folder: Path | None = None
    shared: Path | None = None
    image: Path | None = None
    behind: str = "skip"
    save_on_exit: bool = False
    realtime: bool = True
    checkpoint_every: int = 0
    sessions: int = 4
    queue: int = 8
    jobs: int = 1
    jobs_waiting: int = 16
    jobs_kept: int = 100
    job_seconds: float = 60.0
    picture_pixels: int | None = None
    prompt_characters: int = 2000
    message_bytes: int = 65536
    messages_per_second: float = 60.0
    upload_bytes: int = 256 * 2**20
    upload_pixels: int = 16 * 2**20
    worlds: int = 64
    recordings: int = 4
    recordings_kept: int = 32
    recording_seconds: float = 3600.0
    push_to: str | None = None
    behind_blocks: int = 2
    start_seconds: float = 10.0
    idle_seconds: float = 1800.0
    stall_seconds: float = 30.0
    resume_seconds: float = 60.0
    drain_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name, value in checked(CHECKS, vars(self)).items():
            object.__setattr__(self, name, value)
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise UsageError(f"token has {len(self.token)} characters; expected {SHORTEST_TOKEN} or more")


MEANINGS = {
    "token": "clients send it as `Authorization: Bearer TOKEN`, browsers as a WebSocket subprotocol",
    "folder": "holds jobs and saved worlds; without one they end with the server",
    "behind": "a viewer slower than the stream skips to the newest blocks, or pauses its session",
    "save_on_exit": "live sessions are saved as worlds when the server is stopped by SIGTERM",
    "realtime": "refuse a session that would make others late, by measured blocks",
    "checkpoint_every": "blocks between two checkpoints, from which a session goes on once its server is gone; 0: none",
    "sessions": "live sessions, those of disconnected clients included",
    "queue": "clients that wait for a session",
    "jobs": "video jobs that run at a time",
    "jobs_waiting": "video jobs that wait",
    "jobs_kept": "finished video jobs that are kept; the oldest go first",
    "job_seconds": "seconds of video that a job may ask for",
    "picture_pixels": "pixels of a session's pictures; without a number those of the model's own size",
    "prompt_characters": "characters of a prompt",
    "message_bytes": "bytes of one WebSocket message of a client",
    "messages_per_second": "WebSocket messages of a client, over two seconds",
    "upload_bytes": "bytes of a request's body",
    "upload_pixels": "pixels of an uploaded picture",
    "worlds": "saved worlds that are kept; the oldest go first",
    "recordings": "recordings that run at a time",
    "recordings_kept": "finished recordings and snapshots that are kept; the oldest go first",
    "recording_seconds": "seconds of video that a recording takes",
    "push_to": "beginning of the RTMP addresses that sessions may be pushed to; none: no push",
    "behind_blocks": "blocks that wait for a viewer",
    "start_seconds": "a client has to send a request's headers, and to open or attach a session, within",
    "idle_seconds": "a session without any control ends after",
    "stall_seconds": "a viewer that takes no data is disconnected after, a request without more data refused",
    "resume_seconds": "a session waits for its client to come back, and then frees its memory, after",
    "drain_seconds": "at SIGTERM streams and the running job end within",
}


def rtmp(name: str, value: Any) -> str:
    """The beginning of an RTMP address: at least its scheme and whole host; UsageError for another text."""
    address = text(name, value)
    if re.match(r"rtmps?://[^/\s]+/", address) is None:
        raise UsageError(f"{name} is {quoted(address)}; expected the beginning of an address, such as rtmp://live.example/")
    return address


CHECKS: dict[str, Any] = {
    "token": optional(text),
    "push_to": optional(rtmp),
    **dict.fromkeys(("folder", "shared", "image"), optional(path)),
    "behind": choice(BEHIND),
    **dict.fromkeys(("save_on_exit", "realtime"), flag),
    **dict.fromkeys(("sessions", "jobs", "jobs_kept", "prompt_characters", "worlds", "behind_blocks"), integer(1)),
    **dict.fromkeys(("recordings", "recordings_kept"), integer(1)),
    "recording_seconds": above_zero("seconds"),
    **dict.fromkeys(("queue", "jobs_waiting", "checkpoint_every"), integer(0)),
    **dict.fromkeys(("message_bytes", "upload_bytes", "upload_pixels"), integer(1024)),
    "picture_pixels": optional(integer(1)),
    "messages_per_second": above_zero(),
    **dict.fromkeys(("job_seconds", "start_seconds", "idle_seconds", "stall_seconds"), above_zero("seconds")),
    **dict.fromkeys(("resume_seconds", "drain_seconds"), above_zero("seconds")),
}
FILES = ("token", "folder", "shared", "image")  # settings that are no limits
LIMITS = tuple(field.name for field in fields(ServeSettings) if field.name not in FILES)


def check_limits(given: dict[str, Any]) -> dict[str, Any]:
    """UsageError for a name that is no limit of a server."""
    for name in given:
        if name not in LIMITS:
            raise UsageError(f"limit {quoted(name)} is unknown{nearest(name, LIMITS)}; expected {', '.join(LIMITS)}")
    return given


def read_token(file: Path) -> str:
    """The token in a file: its only line."""
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token {quoted(str(file))} cannot be read: {error}; give a text file of one line") from error
    if not token or any(character.isspace() or not character.isprintable() for character in token):
        raise UsageError(f"token {quoted(str(file))} is not one line of printable characters without spaces")
    return token
