"""Checkpoints of live sessions: files from which a server goes on after it, or another one, has ended.

A checkpoint is a saved session and beside it a JSON file with what the session's client has: id, resume token (its
hash), prompt and seed. Servers that share the folder can go on with each other's sessions. Each file is written whole
or not at all, and the JSON file last: it names the saved session that belongs to it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..runtime.files import write_atomically

LOG = logging.getLogger("inferix.serve")
SESSION = ".safetensors"
KEPT_SECONDS = 86400.0  # that a checkpoint is kept for a client that may come back


def token_hash(resume: str) -> str:
    return hashlib.sha256(resume.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A live session between two blocks.

    resume: SHA-256 of its resume token. owner: the server that runs it; another one that goes on with it takes it over.
    block: the next one. file: name of the saved session.
    """

    session: str
    resume: str
    owner: str
    prompt: str | None
    seed: int | None
    behind: str
    paused: bool
    rollout: int
    block: int
    file: str


TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("session", "resume", "owner", "behind", "file"), str), "prompt": (str, type(None)),
    "seed": (int, type(None)), "paused": bool, "rollout": int, "block": int,
}  # fmt: skip


class Checkpoints:
    """The checkpoints in a folder, one for each session. owner: this server's name in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.owner = folder, secrets.token_hex(16)
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, session: str, block: int) -> Path:
        """Where a session is to be saved before `block`; a name that no other server and no earlier save has."""
        return self.folder / f"{session}-{block}-{secrets.token_hex(4)}{SESSION}"

    def add(self, checkpoint: Checkpoint) -> None:
        """Make a saved session the one to go on from, and remove what was saved before it."""
        text = json.dumps(asdict(checkpoint))
        write_atomically(self._about(checkpoint.session), lambda part: part.write_text(text, "utf-8"))
        self._remove_files(checkpoint.session, but=checkpoint.file)

    def find(self, session: str) -> Checkpoint | None:
        """The checkpoint of a session; None where there is none that can be read."""
        if re.fullmatch(r"[0-9a-f]{32}", session) is None:
            return None
        try:
            values = json.loads(self._about(session).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            LOG.warning("the checkpoint of session %s cannot be read: %s", session, error)
            return None
        checkpoint = checked(values)
        if checkpoint is None or checkpoint.session != session or not self.path(checkpoint).is_file():
            LOG.warning("the checkpoint of session %s is not whole", session)
            return None
        return checkpoint

    def path(self, checkpoint: Checkpoint) -> Path:
        """The saved session of a checkpoint."""
        return self.folder / checkpoint.file

    def owns(self, session: str) -> bool:
        """True unless another server has taken the session over."""
        checkpoint = self.find(session)
        return checkpoint is None or checkpoint.owner == self.owner

    def remove(self, session: str) -> None:
        """Remove the checkpoint of a session that has ended."""
        self._about(session).unlink(missing_ok=True)
        self._remove_files(session)

    def trim(self) -> None:
        """Remove files older than a day."""
        before = time.time() - KEPT_SECONDS
        for file in self.folder.iterdir():
            try:
                if file.stat().st_mtime < before:
                    file.unlink(missing_ok=True)
            except FileNotFoundError:  # another server removed it
                continue

    def _about(self, session: str) -> Path:
        return self.folder / f"{session}.json"

    def _remove_files(self, session: str, but: str | None = None) -> None:
        for file in self.folder.glob(f"{session}-*{SESSION}"):
            if file.name != but:
                file.unlink(missing_ok=True)


def checked(values: Any) -> Checkpoint | None:
    """A checkpoint of values from a file; None for values that are none."""
    names = {field.name for field in fields(Checkpoint)}
    if not isinstance(values, dict) or values.keys() != names:
        return None
    if not all(isinstance(values[name], TYPES[name]) for name in names):
        return None
    if re.fullmatch(re.escape(values["session"]) + r"-[0-9]{1,10}-[0-9a-f]{8}\.safetensors", values["file"]) is None:
        return None
    return Checkpoint(**values)


def knows(checkpoint: Checkpoint, resume: str) -> bool:
    """True for the resume token of the checkpoint's session; compared in constant time."""
    return hmac.compare_digest(checkpoint.resume, token_hash(resume))


