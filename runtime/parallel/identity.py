"""Identity of what a rank is about to load; all ranks of a world must have the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...models.spec import ModelSpec
from ...schemes.presets import Preset
from ...version import __version__
from ..capacity.device_name import card_of

SAMPLES, SAMPLE = 64, 1 << 16  # parts of a file that are read, and bytes of each


def identity(spec: ModelSpec, preset: Preset, files: Sequence[Path], device: torch.device) -> dict[str, Any]:
    """Versions, kind of device, sizes, preset and weights, as plain values."""
    values = {
        "inferix": __version__,
        "torch": torch.__version__,
        "device": card_of(device),
        "model": asdict(spec),
        "preset": {key: value for key, value in asdict(preset).items() if key != "about"},
        "checkpoint": [sampled(path) for path in files],
    }
    plain: dict[str, Any] = json.loads(json.dumps(values, default=repr))
    return plain


def sampled(path: Path) -> str:
    """Hash of a file's size and of parts of it at equal distances, its begin and end among them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for part in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * part // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first entry that differs: its dotted name and both values; None where all are equal."""
    for key in {**mine, **theirs}:
        here, there = mine.get(key), theirs.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            if inner := difference(here, there, f"{prefix}{key}."):
                return inner
        elif here != there:
            return prefix + key, here, there
    return None
