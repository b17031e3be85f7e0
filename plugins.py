"""Presets, checkpoint formats and ops of installed packages, from the entry points `inferix.presets` and so on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TypeVar

from .errors import UsageError, one_line, quoted

Value = TypeVar("Value")


def installed(group: str, kind: type[Value]) -> Iterator[tuple[str, Value]]:
    """Yield (name, object) of each entry point of a group. UsageError for one that is no `kind` or fails to load."""
    for point in entry_points(group=group):
        package = point.dist.name if point.dist is not None else point.value
        where = f"entry point {quoted(point.name)} of {group}, in {quoted(package)}"
        try:
            value = point.load()
        except (ImportError, AttributeError) as error:
            reason = one_line(error).removeprefix("error: ")
            raise UsageError(f"{where}, cannot be loaded: {reason}; repair or uninstall the package") from error
        if not isinstance(value, kind):
            raise UsageError(f"{where}, is {quoted(value)}; expected a {kind.__name__}")
        yield point.name, value
