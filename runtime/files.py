"""Files written whole or not at all, and never over one that was read.

A new file is written under a name of its own beside its place, `<name>.<8 hex digits>.part`, and renamed when it is
complete. Of two writers of one name the later rename wins, with a whole file. While a part file is written it is
locked, so one that a killed process left can be told from one in use.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path

from ..errors import InferixError, UsageError, quoted

# Names of files that make up a model's folder, besides those with a suffix of weights.
MODEL_SUFFIXES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".gguf", ".model"}
MODEL_NAMES = re.compile(
    r"(model_index|(.*_)?config|.*\.index|tokenizer.*|special_tokens_map|added_tokens|vocab|merges)\.(json|txt)"
)


def check_output(path: str | Path) -> Path:
    """Make the folder of `path` and prove that a file can be written there; UsageError if not.

    Warns of part files that a stopped run left.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                example = quoted(str(path / "out.mp4"))
                raise UsageError(f"output {quoted(path)} is a folder; expected a file name such as {example}")
            if not stat.S_ISREG(mode):
                raise UsageError(f"output {quoted(path)} is a device or FIFO; expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # access bits do not tell about read-only file systems
            pass
        left = abandoned_parts(path)
    except (OSError, ValueError) as error:  # ValueError: a null character
        if isinstance(error, UsageError):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UsageError(f"cannot write {quoted(path)}: {reason}; choose another place") from error
    for part in left:
        warnings.warn(f"a run that was stopped left {quoted(part)}, which is not used; remove it", stacklevel=2)
    return path


def check_paths(inputs: Mapping[str, str | Path | None], outputs: Mapping[str, str | Path | None]) -> None:
    """UsageError if an output is an input, or two outputs are one file; the keys name them in the message.

    The same file by another path, a symbolic or a hard link counts. An input that is a folder stands for the files of
    a model in it; one that is a model's file stands also for the configuration beside it. None is left out.
    """
    given = {name: Path(path) for name, path in outputs.items() if path is not None}
    for (one, first), (other, second) in combinations(given.items(), 2):
        if same_file(first, second):
            raise UsageError(f"{one} and {other} are both written to {quoted(first)}; choose another name for one")
    for name, path in given.items():
        for argument, read in inputs.items():
            if read is not None and is_read(path, Path(read)):
                raise UsageError(
                    f"{name} would be written over {quoted(path)}, which {argument} is read from; "
                    "choose another name for what is written"
                )


def same_file(one: Path, other: Path) -> bool:
    """Return True if two paths are one file, or would be one once written."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there yet
        return real(one) == real(other)
    except ValueError:  # a null character
        return False


def real(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def is_read(output: Path, source: Path) -> bool:
    """Return True if writing `output` would change what is read from `source`."""
    try:
        if source.is_dir():
            return output.exists() and any(same_file(output, file) for file in model_files(source))
        beside = source.suffix in MODEL_SUFFIXES and is_model_file(output) and output.suffix not in MODEL_SUFFIXES
        return same_file(output, source) or (beside and output.exists() and real(output.parent) == real(source.parent))
    except (OSError, ValueError):  # a path that cannot be looked at is refused by its reader
        return False


def is_model_file(path: Path) -> bool:
    return path.suffix.lower() in MODEL_SUFFIXES or MODEL_NAMES.fullmatch(path.name) is not None


def model_files(folder: Path) -> Iterator[Path]:
    """Files of a model in a folder and its subfolders, two levels deep as checkpoints are."""
    for pattern in ("*", "*/*", "*/*/*"):
        yield from (path for path in folder.glob(pattern) if is_model_file(path))


class PartFile:
    """A new, empty file beside `path` that becomes `path`; made at once, removed by `discard`.

    It has the permissions that `path` has, or those of any new file of the user's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        name = os.fsencode(self.path.name)[:200].decode("utf-8", "ignore")  # names have at most 255 bytes
        self.part = self.path.with_name(f"{name}.{secrets.token_hex(4)}.part")
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        self.handle: int | None = os.open(self.part, flags, 0o666)
        lock(self.handle)
        self.mode = stat.S_IMODE(os.fstat(self.handle).st_mode)
        with suppress(FileNotFoundError):
            self.mode = stat.S_IMODE(self.path.stat().st_mode)

    def keep(self) -> None:
        """Have the content on the disk and the file under its name; OSError if that fails."""
        self.part.chmod(self.mode)
        settle_on_disk(self.part)
        self._close()
        os.replace(self.part, self.path)
        settle_on_disk(self.path.parent)

    def discard(self) -> None:
        """Remove the file; nothing once it is kept."""
        self.part.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def lock(handle: int) -> bool:
    """Lock an open file for as long as it is open; False if another process, or another handle, has it locked."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def abandoned_parts(path: Path) -> list[Path]:
    """Part files of `path` that no process is writing."""
    name = os.fsencode(path.name)[:200].decode("utf-8", "ignore")
    pattern = re.compile(re.escape(name) + r"(\.[0-9a-f]{8})?\.part")
    with os.scandir(path.parent) as entries:
        parts = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name) and entry.is_file()]
    return [part for part in sorted(parts) if not in_use(part)]


def in_use(part: Path) -> bool:
    try:
        handle = os.open(part, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # gone meanwhile, a link, or another user's
        return True
    try:
        return not lock(handle)
    finally:
        os.close(handle)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with the name of a new file beside `path`, then rename that to `path`.

    `path` is what it was, or complete, whenever the process or the machine stops. OSError becomes InferixError.
    """
    path = Path(path)
    try:
        part = PartFile(path)
        try:
            write(part.part)
            part.keep()
        finally:
            part.discard()
    except OSError as error:
        raise write_failed(path, error) from error
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


def write_failed(path: Path, error: OSError) -> InferixError:
    reason = error.strerror or error
    return InferixError(f"writing {quoted(path)} failed: {reason}; free some space or choose another place")
