"""How long a block takes that several sessions make as one: measured seconds, and the file that keeps them.

A file is a list of measurements, each with what it was made on; an engine uses those that were made on its like.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InferixError, UsageError
from ..files import write_atomically


@dataclass(frozen=True)
class BatchTimes:
    """seconds: by number of sessions, how long it takes to give each a block; 1 is a session that runs alone."""

    seconds: Mapping[int, float]

    def __post_init__(self) -> None:
        counts = all(type(count) is int and count >= 1 for count in self.seconds)
        if not counts or 1 not in self.seconds or not all(seconds > 0 for seconds in self.seconds.values()):
            raise UsageError(
                f"measured times are {dict(self.seconds)}; expected seconds above 0 by number of sessions, 1 among them"
            )

    def best(self, most: int, within: float = math.inf) -> int:
        """With how many sessions, `most` at the most, each has its block soonest; 1 where turns are as fast.

        Where a session alone would be done `within` so many seconds, so is the batch.
        """
        in_time = [count for count, seconds in self.seconds.items() if count <= most and seconds <= within]
        counts = in_time or [count for count in self.seconds if count <= most]
        return min(counts, key=lambda count: (self.seconds[count] / count, count))


def read_times(path: Path, about: Mapping[str, Any]) -> dict[tuple[int, int], BatchTimes]:
    """What was measured on the like of `about`, by size of pictures; InferixError for a file that cannot be read."""
    return {size_of(entry): times_of(entry) for entry in entries(path) if entry["about"] == plain(about)}


def keep_times(path: Path, about: Mapping[str, Any], size: tuple[int, int], times: BatchTimes) -> None:
    """Add a measurement to a file, which is made where there is none; one of the same is replaced."""
    new = {"about": plain(about), "size": list(size), "seconds": {str(n): s for n, s in times.seconds.items()}}
    found = entries(path) if path.exists() else []
    kept = [entry for entry in found if (entry["about"], entry["size"]) != (new["about"], new["size"])]
    write_atomically(path, lambda part: part.write_text(json.dumps([*kept, new], indent=1) + "\n", "utf-8"))


def entries(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        said = f"cannot read {path}: {error}; make it with inferix bench stream --batches {path}"
        raise InferixError(said) from error
    if not isinstance(found, list) or not all(map(is_entry, found)):
        raise InferixError(f"{path} holds no measured times of batches; give another file, or delete it")
    return found


def is_entry(found: Any) -> bool:
    try:
        _ = found["about"], size_of(found), times_of(found)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def size_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    width, height = entry["size"]
    return int(width), int(height)


def times_of(entry: Mapping[str, Any]) -> BatchTimes:
    return BatchTimes({int(count): float(seconds) for count, seconds in entry["seconds"].items()})


def plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after a way through a file."""
    found: dict[str, Any] = json.loads(json.dumps(about))
    return found
