"""Memory available to a process: of a GPU as its driver counts it, of the host within its cgroups' limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from ...models.random import host_memory
from ..byte_sizes import format_bytes

NO_LIMIT = 2**60  # bytes; version 1 of cgroups writes a larger number for none


@dataclass(frozen=True)
class Available:
    """Available bytes and their source."""

    count: int
    source: str

    def __str__(self) -> str:
        return f"{format_bytes(self.count)} {self.source}"


def available_memory(device: torch.device) -> Available | None:
    """Available memory of a device; None where the system reports none."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Available(free + cached, f"free on {device}")
    return host_available()


def host_available(root: Path = Path("/")) -> Available | None:
    """Available memory of the host within the limits of this process's cgroups. root: of the file system."""
    limits = list(cgroup_limits(root))
    if (count := meminfo_available(root)) is not None:
        limits.append(Available(count, "available on this machine"))
    elif (total := host_memory()) is not None and root == Path("/"):
        limits.append(Available(total, "in this machine"))
    return min(limits, key=lambda limit: limit.count, default=None)


def meminfo_available(root: Path) -> int | None:
    """MemAvailable of /proc/meminfo, in bytes."""
    for line in read_lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def cgroup_limits(root: Path) -> Iterator[Available]:
    """Bytes left by each cgroup of this process, versions 1 and 2. Reclaimable file pages count as free."""
    for line in read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            places = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            places = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        # A container may see its own group at the root of the mount, under a path that only the host has.
        group = PurePosixPath(path.lstrip("/"))
        for place in places:
            for folder in dict.fromkeys((place / group, *(place / parent for parent in group.parents), place)):
                if (left := cgroup_left(folder, *names)) is not None:
                    yield left


def cgroup_left(folder: Path, limit: str, usage: str, reclaimable: str) -> Available | None:
    """Bytes left by the limit of one cgroup; None where it has none."""
    most, used = (read_number(folder / name) for name in (limit, usage))
    if most is None or used is None or most >= NO_LIMIT:
        return None
    stat = dict(line.split() for line in read_lines(folder / "memory.stat"))
    left = most - used + int(stat.get(reclaimable, 0))
    return Available(max(0, min(left, most)), f"left by the cgroup's limit of {format_bytes(most)}")


def read_number(path: Path) -> int | None:
    lines = read_lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def read_lines(path: Path) -> list[str]:
    """Lines of a file of the system; none where it cannot be read."""
    return path.read_text("utf-8").splitlines() if os.access(path, os.R_OK) and path.is_file() else []
