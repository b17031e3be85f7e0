"""Byte sizes: parsed from text such as "6GB", and formatted."""

from __future__ import annotations

import re
from numbers import Integral

from ..errors import UsageError, quoted

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(given: int | str) -> int:
    """Parse bytes from 6000000000, "6GB" or "5.5 GiB"; UsageError for other text, or a number that is not above 0."""
    written = str(given).strip() if isinstance(given, Integral | str) else ""
    match = re.fullmatch(r"([0-9.]{1,30})\s*([A-Za-z]*)", written)
    if isinstance(given, bool) or match is None or match[2].upper() not in UNITS or match[1].count(".") > 1:
        raise UsageError(f"memory is {quoted(given)}; expected bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    count = int(float(match[1]) * UNITS[match[2].upper()]) if match[1] != "." else 0
    if count < 1:
        raise UsageError(f"memory is {quoted(given)}; expected more than 0 bytes")
    return count


def format_bytes(count: int) -> str:
    """Format bytes with four digits and a decimal unit."""
    for unit in ("GB", "MB", "kB"):
        scale = UNITS[unit.upper()]
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"
