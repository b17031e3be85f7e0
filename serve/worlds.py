"""Saved worlds: files of sessions in one folder, named by ids that nobody can guess."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from ..errors import quoted
from .refusals import Refusal

SUFFIX = ".safetensors"


class Worlds:
    """A folder of saved worlds, at most `most`; the oldest are removed first."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._about: dict[str, tuple[str | None, int | None]] = {}
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

    def note(self, world: str, prompt: str | None, seed: int | None) -> None:
        """Remember the prompt and the seed of a world that was saved here, and trim the folder."""
        self._about[world] = (prompt, seed)
        self.trim()

    def about(self, world: str) -> tuple[str | None, int | None]:
        """The prompt and the seed of a world, as far as they are known."""
        return self._about.get(world, (None, None))

    def trim(self) -> None:
        """Remove the oldest worlds beyond `most`."""
        files = sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
        for file in files[: max(0, len(files) - self.most)]:
            file.unlink(missing_ok=True)
            self._about.pop(file.stem, None)
