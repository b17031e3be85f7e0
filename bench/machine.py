"""The machine a benchmark runs on: what it is and how it was found, what it can do at most, and its clock.

Nothing is changed: clocks, power limits and modes are written down as they are. The ceilings are measured in the
same run as what is held against them.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.telemetry.profile import packed_matmul
from ..version import __version__
from .nvml import Card, find_card
from .result import Series

LIBRARIES = ("torch", "triton", "numpy", "transformers", "safetensors", "flash-attn", "sageattention")
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
MATMUL_WIDTH = {"cpu": 1024, "cuda": 8192}
HEAD_START = 10**6  # clocks of a GPU, about half a millisecond: longer than the host takes for a few launches
CEILING_REPEATS = {"cpu": 7, "cuda": 30}


def environment(device: str) -> dict[str, Any]:
    """When, where and with what: date, command, commit, device, host, driver, clocks as found, versions."""
    card = card_of(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": commit(),
        "device": device_facts(device),
        "host": {
            "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "system": platform.platform(),
        },
        "driver": card.driver() if card else None,
        "clocks": card.state() if card else None,
        "versions": versions(),
    }  # fmt: skip


def command() -> str:
    """What started this process, so that it can be typed again; a module by `python -m`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*name, *sys.argv[1:]])


def device_facts(device: str) -> dict[str, Any]:
    """What is computed on: type, name and, for a GPU, capability and bytes of memory."""
    if torch.device(device).type == "cpu":
        return {"type": "cpu", "name": processor()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": torch.device(device).type, "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}", "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }  # fmt: skip


@cache
def processor() -> str:
    """The host's processor by name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the code, with `+changes` where files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"inferix": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "cudnn": cudnn()}


def cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version is None else str(version)


def card_of(device: str) -> Card | None:
    """The management library's view of a device; None for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return find_card(str(torch.cuda.get_device_properties(device).uuid))


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def stopwatch(device: str) -> Iterator[Callable[[], float]]:
    """Yields what tells the seconds the block took, on the device's own clock.

    A GPU is given something to do first: else it would wait for the host to launch the block, and that be timed.
    """
    if torch.device(device).type == "cpu":
        begun = time.perf_counter()
        ended = begun
        yield lambda: ended - begun
        ended = time.perf_counter()
        return
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START)
    start.record()
    yield lambda: start.elapsed_time(end) / 1000
    end.record()
    torch.cuda.synchronize(device)


def measure_ceilings(device: str, dtype: torch.dtype, lowp: str | None = None) -> dict[str, Series]:
    """Bytes a second of a large copy (read and written), and FLOPs a second of a large matmul, here and now; of one of
    FP8 or INT8 numbers too, if asked.
    """
    kind = torch.device(device).type
    source = torch.empty(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    width = MATMUL_WIDTH[kind]
    a = torch.randn(width, width, device=device).to(dtype)
    out = torch.empty_like(a)
    found = {
        "copy_bytes": rate(lambda: target.copy_(source), 2 * source.nbytes, "B/s", device),
        "matmul_flops": rate(lambda: torch.mm(a, a, out=out), 2 * width**3, "FLOP/s", device),
    }
    if lowp is not None:
        found["packed_flops"] = rate(packed_matmul(lowp, a), 2 * width**3, "FLOP/s", device)
    return found


def rate(call: Callable[[], Tensor], amount: int, unit: str, device: str) -> Series:
    """`amount` by the seconds of single calls, after three that are not counted."""
    samples = []
    for turn in range(3 + CEILING_REPEATS[torch.device(device).type]):
        with stopwatch(device) as elapsed:
            call()
        if turn >= 3:
            samples.append(amount / elapsed())
    return Series(unit, tuple(samples), "more")


def process_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else None
