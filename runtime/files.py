"""Files written whole or not at all.

Every output is written to `<path>.part` and moved to its place when it is complete.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import InferixError, UsageError


def check_output(path: str | Path) -> Path:
    """Make the folder of `path` and prove that a file can be written there; UsageError if not."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"output {str(path)!r} is a folder; expected a file name such as {path / 'out.mp4'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # access bits do not tell about read-only file systems
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write to folder {str(path.parent)!r}: {reason}; choose another") from error
    return path


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with `<path>.part`, then move that to `path`; OSError becomes InferixError.

    `path` is what it was, or complete, whenever the process or the machine stops.
    """
    path = Path(path)
    part = part_of(path)
    try:
        write(part)
        settle_on_disk(part)
        os.replace(part, path)
        settle_on_disk(path.parent)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def settle_on_disk(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk; on systems where that can be asked for so."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part_of(path: Path) -> Path:
    """The name under which `path` is written until it is complete."""
    return path.with_name(path.name + ".part")


def write_failed(path: Path, error: OSError) -> InferixError:
    reason = error.strerror or error
    return InferixError(f"writing {str(path)!r} failed: {reason}; free some space or choose another place")
