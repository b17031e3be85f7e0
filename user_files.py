"""Small text and JSON files that a user gives, read in bounded time and memory; YAML files are in `user_yaml`.

Only regular files are opened: a FIFO would block and a device would never end. The errors are UsageError.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from .errors import UsageError, cut, quoted

LARGEST_TEXT = 1 << 20  # bytes of a text
LARGEST_JSON = 4 << 20

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def check_reachable(path: str | Path, name: str) -> Path:
    """`path`, which need not exist; UsageError for one that cannot be looked up, such as a name of 300 letters."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise unreadable(path, name, error) from error
    return Path(path)


def check_regular(path: str | Path, name: str) -> Path:
    """`path`, which is a regular file or a link to one; UsageError that calls it `name` otherwise."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise unreadable(path, name, error) from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{name} {quoted(str(path))} is {KINDS.get(stat.S_IFMT(mode), 'no file')}; expected a file")
    return Path(path)


def read_text(path: str | Path, name: str, limit: int = LARGEST_TEXT) -> str:
    """The UTF-8 text of a file of at most `limit` bytes, without a byte-order mark; UsageError otherwise."""
    try:
        with check_regular(path, name).open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UsageError(f"{name} {quoted(str(path))} has more than {limit} bytes; expected a smaller file")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, name, error) from error


def unreadable(path: str | Path, name: str, error: Exception) -> UsageError:
    reason = (isinstance(error, OSError) and error.strerror) or error
    return UsageError(f"cannot read {name} {quoted(str(path))}: {cut(str(reason))}; expected a file that can be read")


def read_json(path: str | Path, name: str) -> Any:
    """The content of a JSON file; UsageError if it cannot be read."""
    text = read_text(path, name, LARGEST_JSON)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} {quoted(str(path))} is not JSON: {cut(str(error))}; correct it") from error
