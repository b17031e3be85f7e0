"""The two errors a user meets.

`UsageError` is bad input (exit code 2), any other `InferixError` is a run that failed (exit code 1).
Every message carries the bad value, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InferixError(Exception):
    """A run that could not be finished; the message says why."""


class UsageError(InferixError, ValueError):
    """Bad input: a value, name, file or combination that cannot be used."""


def in_a_line(error: Exception) -> str:
    """What a program says on stderr before it ends."""
    return f"error: {' '.join(str(error).split())}"


def exit_code(error: InferixError) -> int:
    return 2 if isinstance(error, UsageError) else 1


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """End a program with one line on stderr where its user or its run is at fault."""
    try:
        yield
    except InferixError as error:
        print(in_a_line(error), file=sys.stderr)
        raise SystemExit(exit_code(error)) from error


def no_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has a class of its own for that of a GPU, and none for the host's."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or no_host_memory(error)


def no_host_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def quoted(value: object, limit: int = 200) -> str:
    """A bad value for a message, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
