"""Instructions of the CPU that decide whether bfloat16 pays there; reads the system's list of them, without torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}  # by flag, the faster first


def cpu_flags(listing: Path = CPUINFO) -> frozenset[str]:
    """Return the instruction flags of the first CPU; empty where the system does not list them."""
    try:
        lines = listing.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    first = next((line for line in lines if line.partition(":")[0].strip() == "flags"), "")
    return frozenset(first.partition(":")[2].split())


def bfloat16_unit(flags: Collection[str]) -> str | None:
    """Name the instructions that multiply matrices of bfloat16; None for a CPU without them."""
    return next((unit for flag, unit in BFLOAT16.items() if flag in flags), None)


def dtype_advice(dtype: str, flags: Collection[str]) -> str | None:
    """Advise another dtype for a CPU: bfloat16 where it has instructions for it, float32 where it has none."""
    unit = bfloat16_unit(flags)
    if dtype == "float32" and unit is not None:
        return f"this CPU has {unit}: dtype bfloat16 is faster here, and its pictures differ a little"
    if dtype == "bfloat16" and unit is None:
        return "this CPU has no instructions for bfloat16 (AVX-512 BF16 or AMX): dtype float32 is faster here"
    return None
