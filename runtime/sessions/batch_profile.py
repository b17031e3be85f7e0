"""Measured times of batched blocks, and the file that stores them.

A file is a list of measurements, each with the configuration it was made on; an engine uses those of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InferixError, UsageError, cut, quoted
from ..files import write_atomically


@dataclass(frozen=True)
class BatchProfile:
    """seconds: time to make one block of each session, by number of sessions; 1 is a session that runs alone."""

    seconds: Mapping[int, float]

    def __post_init__(self) -> None:
        counts = all(type(count) is int and count >= 1 for count in self.seconds)
        if not counts or 1 not in self.seconds or not all(seconds > 0 for seconds in self.seconds.values()):
            raise UsageError(
                f"measured times are {dict(self.seconds)}; expected seconds above 0 by number of sessions, 1 among them"
            )

    def best(self, most: int, within: float = math.inf) -> int:
        """The batch size <= `most` with the least measured time per block.

        Sizes that would miss a deadline of `within` seconds are skipped if size 1 meets it.
        """
        in_time = [count for count, seconds in self.seconds.items() if count <= most and seconds <= within]
        counts = in_time or [count for count in self.seconds if count <= most]
        return min(counts, key=lambda count: (self.seconds[count] / count, count))


def read_profiles(path: Path, about: Mapping[str, Any]) -> dict[tuple[int, int], BatchProfile]:
    """Measured profiles for configuration `about`, by (width, height); InferixError for a file that cannot be read."""
    return {size_of(entry): profile_of(entry) for entry in entries(path) if entry["about"] == plain(about)}


def save_profile(path: Path, about: Mapping[str, Any], size: tuple[int, int], times: BatchProfile) -> None:
    """Add a measurement to a file, in place of one of the same configuration and size; create a missing file."""
    new = {"about": plain(about), "size": list(size), "seconds": {str(n): s for n, s in times.seconds.items()}}
    before = entries(path) if path.exists() else []
    others = [entry for entry in before if (entry["about"], entry["size"]) != (new["about"], new["size"])]
    write_atomically(path, lambda part: part.write_text(json.dumps([*others, new], indent=1) + "\n", "utf-8"))


def entries(path: Path) -> list[dict[str, Any]]:
    try:
        measurements = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        again = f"inferix bench stream --batches {quoted(path)}"
        message = f"cannot read {quoted(path)}: {cut(str(error))}; make it with {again}"
        raise InferixError(message) from error
    if not isinstance(measurements, list) or not all(map(is_entry, measurements)):
        raise InferixError(f"{quoted(path)} holds no measured times of batches; give another file, or delete it")
    return measurements


def is_entry(value: Any) -> bool:
    try:
        _ = value["about"], size_of(value), profile_of(value)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return False
    return True


def size_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    width, height = entry["size"]
    return int(width), int(height)


def profile_of(entry: Mapping[str, Any]) -> BatchProfile:
    return BatchProfile({int(count): float(seconds) for count, seconds in entry["seconds"].items()})


def plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as a file gives it back: lists for tuples."""
    read: dict[str, Any] = json.loads(json.dumps(about))
    return read
