"""The errors a user meets, by kind; all are `InferixError`.

`UsageError` is bad input (exit code 2), any other `InferixError` is a run that failed (exit code 1).
Every message carries the bad value, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import PurePath


class InferixError(Exception):
    """A run that could not be finished; the message says why."""


class UsageError(InferixError, ValueError):
    """Bad input: a value, name, file or combination that cannot be used."""


class AtCapacity(InferixError):
    """No room: sessions, memory or pages are at a limit. The same call may succeed once others have ended."""


class SessionEnded(InferixError):
    """A call to a session that is closed, stopped or failed, or to an engine that no thread drives any more."""


class RankFailed(InferixError):
    """A rank of several that was killed, hung or raised; the message names it. The engine has ended with its ranks."""


class CheckpointError(InferixError):
    """Weights or a file beside them that cannot be read."""


def message_of(error: Exception) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split())


def one_line(error: Exception) -> str:
    """Format an error as one line for stderr."""
    return f"error: {message_of(error)}"


def exit_code(error: InferixError) -> int:
    return 2 if isinstance(error, UsageError) else 1


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an InferixError as one line on stderr and exit with its `exit_code`."""
    try:
        yield
    except InferixError as error:
        print(one_line(error), file=sys.stderr)
        raise SystemExit(exit_code(error)) from error


def no_memory(error: Exception) -> bool:
    """Return True for an out-of-memory error of the GPU (torch has a class for it) or of the host (it has none)."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or no_host_memory(error)


def no_host_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


LONGEST_QUOTE = 200  # characters of a value in a message

class ShortRepr(reprlib.Repr):
    """`repr` in bounded time: three levels, few entries of each."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 8
        self.maxstring = self.maxother = LONGEST_QUOTE

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()  # the digits of a huge integer take time squared in their number
        return repr(x) if bits < 256 else f"<integer of {bits} bits>"


def quoted(value: object, limit: int = LONGEST_QUOTE) -> str:
    """A user's value for a message: its repr, at most `limit` characters of it, in bounded time for any value.

    A path is quoted as its text.
    """
    value = str(value) if isinstance(value, PurePath) else value
    return cut(repr(value[: limit + 1]) if isinstance(value, str) else ShortRepr().repr(value), limit)


def quoted_all(values: Iterable[object], most: int = 4) -> str:
    """The first values of a user's, each `quoted` within 80 characters; dots for the rest."""
    first = [quoted(value, 80) for value in islice(values, most + 1)]
    return ", ".join([*first[:most], "..."] if len(first) > most else first)


def cut(text: str, limit: int = LONGEST_QUOTE) -> str:
    """The first `limit` characters of a text, the cut marked."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest(name: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(name[:LONGEST_QUOTE], list(choices), n=1, cutoff=0.5)
    return f" (did you mean {quoted(close[0])}?)" if close else ""
