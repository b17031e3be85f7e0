"""Lowered graphs kept in a folder, so that a second start traces nothing: one file a graph key, and what they are for.

A folder is for one model, preset, precision, card and set of versions; a difference in any is one clear error. Files
are whole or not there. On a GPU the kernels that Triton compiled lie beside them.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...errors import InferixError, UsageError
from ...graphs.codec import decode_lowered, encode_lowered
from ...graphs.lowered import Lowered, digest, lower_block
from ...version import __version__
from ..files import write_atomically
from .graph_builder import GraphBuilder, GraphKey

FORMAT = 3
IDENTITY = "identity.json"
KERNELS = "triton"


def identity(graphs: GraphBuilder) -> dict[str, Any]:
    """What stored graphs are for, as plain values."""
    device = torch.device(graphs.device)
    found = {
        "format": FORMAT,
        "inferix": __version__,
        "torch": torch.__version__,
        "triton": installed("triton") if device.type == "cuda" else None,
        "card": card_of(device),
        "dtype": str(graphs.dtype).removeprefix("torch."),
        "kv_dtype": None if graphs.kv_dtype is None else str(graphs.kv_dtype).removeprefix("torch."),
        "precision": graphs.precision,
        "rewrites": list(graphs.rewrites),
        "lowp": None if graphs.lowp is None else asdict(graphs.lowp),
        "model": asdict(graphs.spec),
        "preset": {key: value for key, value in asdict(graphs.preset).items() if key != "about"},
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def card_of(device: torch.device) -> str:
    """The device that graphs and kernels are for: a GPU by name and capability, else the processor's kind."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def stored_for(folder: Path) -> tuple[str, str]:
    """Names of the model and the preset that a folder's graphs are for; UsageError for a folder that holds none."""
    if not (folder / IDENTITY).exists():
        raise no_graphs(folder)
    told = read(folder / IDENTITY)
    return told["model"]["name"], told["preset"]["name"]


def no_graphs(folder: Path) -> UsageError:
    return UsageError(f"{folder} holds no graphs; make some with inferix graph --save {folder}")


@dataclass(frozen=True)
class GraphStore:
    """The graphs in `folder`; made by `open`."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, graphs: GraphBuilder, create: bool) -> GraphStore:
        """The graphs in a folder; with `create`, a folder is made where there is none.

        On a GPU, kernels compiled from now on are kept there too, unless TRITON_CACHE_DIR says otherwise. Raises
        UsageError for a folder that holds no graphs, and InferixError for graphs of something else.
        """
        path, wanted = folder / IDENTITY, identity(graphs)
        if not path.exists():
            if not create:
                raise no_graphs(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write(path, wanted)
        if differing := difference(read(path), wanted):
            what, stored, here = differing
            raise InferixError(
                f"the graphs in {folder} are for {what} {stored!r}, and this is {here!r}; give another folder, or "
                "delete this one to have them made anew"
            )
        if graphs.device.startswith("cuda"):
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / KERNELS))
        return cls(folder)

    def find(self, key: GraphKey) -> Lowered | None:
        """The stored program of a key; InferixError for a file that cannot be read."""
        path = self.path(key)
        return decode_lowered(read(path)["lowered"]) if path.exists() else None

    def keep(self, key: GraphKey, lowered: Lowered) -> None:
        write(self.path(key), {"key": asdict(key), "lowered": encode_lowered(lowered)})

    def fill(self, graphs: GraphBuilder, keys: Iterable[GraphKey]) -> int:
        """Build and store the graphs of keys that have none; returns how many."""
        missing = [key for key in keys if not self.path(key).exists()]
        for key in missing:
            self.keep(key, lower_block(graphs(key)))
        return len(missing)

    def programs(self) -> list[tuple[GraphKey, Lowered]]:
        """All that is kept; InferixError for a file that cannot be read, or is of another version."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            if path.name != IDENTITY:
                data = read(path)
                found.append((key_of(data["key"]), decode_lowered(data["lowered"])))
        return found

    def path(self, key: GraphKey) -> Path:
        kind = "block" if key.whole else "pass"
        return self.folder / f"{kind}-{digest(repr(key))[:16]}.json"


def key_of(data: dict[str, Any]) -> GraphKey:
    """A graph key from the plain values of its file."""
    parts = tuple((rows, frames) for rows, frames in data["parts"])
    return GraphKey(**{**data, "parts": parts, "latent": tuple(data["latent"])})


def difference(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first entry that differs: its name and both values."""
    for key in {**wanted, **found}:
        here, there = found.get(key), wanted.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            if inner := difference(here, there, f"{prefix}{key}."):
                return inner
        elif here != there:
            return prefix + key, here, there
    return None


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InferixError(f"cannot read {path}: {error}; delete it, and it is made anew") from error
    return found


def write(path: Path, data: dict[str, Any]) -> None:
    write_atomically(path, lambda part: part.write_text(json.dumps(data), "utf-8"))
