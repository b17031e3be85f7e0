"""The machine of a benchmark: its description, its measured ceilings, and a stopwatch.

Clocks, power limits and modes are recorded and never changed. Ceilings are measured in the same run as the figures that
are compared with them.
"""

from __future__ import annotations

import hashlib
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
    """Date, command, commit, device, host, driver, current clocks and versions of a run."""
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
    """Command line that started this process, quoted for a shell; `python -m` for a module."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = [Path(sys.argv[0]).name] if module is None else ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*name, *sys.argv[1:]])


def device_facts(device: str) -> dict[str, Any]:
    """Type and name of a device; for a GPU also compute capability, bytes of memory and multiprocessors."""
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
    """Name of the host's processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the code, with `+changes` if files differ from it.

    Outside a repository: `INFERIX_COMMIT`, else `sources` and a digest of the code, which `digest_of_sources` gives for
    the same files in a repository. None if git fails.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("INFERIX_COMMIT") or f"sources {digest_of_sources(root)}"
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def digest_of_sources(root: Path) -> str:
    """The first 12 digits of a SHA-256 over the names and contents of the Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not name.parts[0].startswith((".", "outputs", "build")):
            digest.update(f"{name.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> dict[str, str | None]:
    """Versions of Inferix, Python and libraries; None for a library that is not installed."""
    installed: dict[str, str | None] = {"inferix": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed | {"cuda": torch.version.cuda, "cudnn": cudnn()}


def cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version is None else str(version)


def card_of(device: str) -> Card | None:
    """NVML handle of a device; None for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return find_card(str(torch.cuda.get_device_properties(device).uuid))


def cache_bytes(device: str) -> int:
    """Size of the largest cache: of a GPU as the driver says, of a CPU as Linux does; a large one if unknown."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [size.read_text("ascii").strip() for size in sizes]
    return max((int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in texts if text[-1:] in "KM"), default=1 << 26)


def synchronize(device: str) -> None:
    """Wait until a GPU is idle; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def stopwatch(device: str) -> Iterator[Callable[[], float]]:
    """Time a `with` block on the device's clock; yields a function that returns the seconds after the block.

    A GPU is kept busy first, so that the time the host takes for the launches is not counted.
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
    """Measure bytes/s of a large copy (read plus written) and FLOP/s of a large matmul in `dtype`.

    With `lowp`, `fp8` or `int8`, also FLOP/s of a matmul in that precision.
    """
    kind = torch.device(device).type
    source = torch.empty(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    width = MATMUL_WIDTH[kind]
    a = torch.randn(width, width, device=device).to(dtype)
    out = torch.empty_like(a)
    ceilings = {
        "copy_bytes": rate(lambda: target.copy_(source), 2 * source.nbytes, "B/s", device),
        "matmul_flops": rate(lambda: torch.mm(a, a, out=out), 2 * width**3, "FLOP/s", device),
    }
    if lowp is not None:
        ceilings["packed_flops"] = rate(packed_matmul(lowp, a), 2 * width**3, "FLOP/s", device)
    return ceilings


def rate(call: Callable[[], Tensor], amount: int, unit: str, device: str) -> Series:
    """`amount` per second of single calls, after three warm-up calls."""
    samples = []
    for index in range(3 + CEILING_REPEATS[torch.device(device).type]):
        with stopwatch(device) as elapsed:
            call()
        if index >= 3:
            samples.append(amount / elapsed())
    return Series(unit, tuple(samples), "more")


def process_memory() -> int | None:
    """Resident bytes of this process; None on a system without /proc."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else None
