"""Links between GPUs: assumed figures by name, or measured ones of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, nearest, quoted
from ...models.files import parse_json


@dataclass(frozen=True)
class Link:
    """bandwidth: GB/s that a GPU sends. latency: microseconds of a collective. source: where they are from."""

    bandwidth: float
    latency: float
    source: str


LINKS = {
    "nvlink": Link(300, 15, "nvlink, assumed"),
    "pcie": Link(20, 30, "pcie, assumed"),
    "nodes": Link(50, 30, "two nodes, 400 Gb/s a GPU, assumed"),  # every collective as slow as between machines
}


def read_link(name: str) -> Link:
    """A link by name, or of a JSON file with `bandwidth` (GB/s) and `latency` (us); UsageError for anything else."""
    if name in LINKS:
        return LINKS[name]
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"link is {quoted(name)}{nearest(name, LINKS)}; expected {', '.join(LINKS)}, or a JSON file")
    try:
        return measured_link(parse_json(path.read_text("utf-8")), path.name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"link is {quoted(name)}; expected bandwidth and latency in it"
        raise UsageError(f"{message}: {quoted(str(error))}") from error


def measured_link(content: Mapping[str, Any], file: str) -> Link:
    """The link in a file's content; ValueError, KeyError or TypeError where it has none."""
    bandwidth, latency = float(content["bandwidth"]), float(content["latency"])
    if not (0 < bandwidth < float("inf") and 0 <= latency < float("inf")):
        raise ValueError(f"bandwidth {bandwidth} and latency {latency}; expected above 0")
    return Link(bandwidth, latency, f"{file}, measured")
