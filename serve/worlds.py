"""Saved worlds: files of sessions in one folder, named by ids that nobody can guess."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from ..errors import quoted
from ..runtime.sessions.session_file import read_note
from .refusals import Refusal

SUFFIX = ".safetensors"
LARGEST_SEED = 2**53


class Worlds:
    """A folder of saved worlds, at most `most`; the oldest are removed first.

    prompt_characters: of the longest prompt that is believed of a file, which may be an upload.
    """

    def __init__(self, folder: Path, most: int, prompt_characters: int) -> None:
        self.folder, self.most, self.prompt_characters = folder, most, prompt_characters
        folder.mkdir(parents=True, exist_ok=True)

    def new(self) -> tuple[str, Path]:
        """The id and the path of a world that is not there yet."""
        world = secrets.token_hex(16)
        return world, self.folder / f"{world}{SUFFIX}"

    def path(self, world: str) -> Path:
        """The file of a world; Refusal for an id that has none."""
        path = self.folder / f"{world}{SUFFIX}"
        if re.fullmatch(r"[0-9a-f]{32}", world) is None or not path.is_file():
            raise Refusal("not_found", f"there is no world {quoted(world, 64)}; newer ones may have replaced it", 404)
        return path

    def about(self, world: str) -> tuple[str | None, int | None]:
        """The prompt and the seed of a world, as far as its file says them."""
        try:
            values = json.loads(read_note(self.path(world)) or "{}")
        except (ValueError, RecursionError):
            return None, None
        prompt, seed = (values.get(name) for name in ("prompt", "seed")) if isinstance(values, dict) else (None, None)
        known = isinstance(prompt, str) and 0 < len(prompt) <= self.prompt_characters
        numbered = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < LARGEST_SEED
        return prompt if known else None, seed if numbered else None

    def trim(self) -> None:
        """Remove the oldest worlds beyond `most`."""
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
        for file in files[: max(0, len(files) - self.most)]:
            file.unlink(missing_ok=True)


def note_of(prompt: str | None, seed: int | None) -> str:
    """The note that a world is saved with; `Worlds.about` reads it."""
    return json.dumps({"prompt": prompt, "seed": seed})
