"""Graph store: a folder of lowered graphs, one file for each graph key, so that a second start traces nothing.

A folder is for one model, preset, precision, GPU and set of versions, recorded in `identity.json`; any difference is an
error. Of several ranks it has a folder for each. Files are written atomically. On a GPU the store also has Triton's
cache of compiled kernels.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...errors import InferixError, UsageError, cut, quoted
from ...graphs.codec import decode_lowered, encode_lowered
from ...graphs.lowered import Lowered, digest
from ...graphs.shards import ALONE
from ...kernels.collectives import group_of
from ...models.files import check_file, parse_json, reason
from ...version import __version__
from ..capacity.device_name import card_of
from ..files import write_atomically
from .graph_builder import GraphBuilder, GraphKey, lowered_graph

FORMAT = 9
IDENTITY = "identity.json"
KERNELS = "triton"


def identity(graphs: GraphBuilder) -> dict[str, Any]:
    """Everything that stored graphs depend on, as plain values."""
    device = torch.device(graphs.device)
    values = {
        "format": FORMAT,
        "inferix": __version__,
        "torch": torch.__version__,
        "triton": installed("triton") if device.type == "cuda" else None,
        "card": card_of(device),
        "multiprocessors": graphs.multiprocessors,
        "dtype": str(graphs.dtype).removeprefix("torch."),
        "kv_dtype": None if graphs.kv_dtype is None else str(graphs.kv_dtype).removeprefix("torch."),
        "precision": graphs.precision,
        "rewrites": list(graphs.rewrites),
        "lowp": None if graphs.lowp is None else asdict(graphs.lowp),
        "shard": None if graphs.shard == ALONE else asdict(graphs.shard),
        "model": asdict(graphs.spec),
        "preset": {key: value for key, value in asdict(graphs.preset).items() if key != "about"},
    }
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def stored_for(folder: Path) -> tuple[str, str]:
    """Names of the model and the preset of the graphs in a folder.

    UsageError for a folder without graphs, InferixError for one whose identity cannot be read.
    """
    if not (folder / IDENTITY).exists():
        raise no_graphs(folder)
    stored = read(folder / IDENTITY)
    names = [part.get("name") if isinstance(part := stored.get(key), dict) else None for key in ("model", "preset")]
    if not all(isinstance(name, str) for name in names):
        raise InferixError(f"{folder / IDENTITY} names no model and preset; delete the folder to trace again")
    return str(names[0]), str(names[1])


def no_graphs(folder: Path) -> UsageError:
    return UsageError(f"{quoted(folder)} has no graphs; store some with `inferix graph --save {quoted(folder)}`")


@dataclass(frozen=True)
class GraphStore:
    """The graphs in `folder`; made by `open`."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, graphs: GraphBuilder, create: bool) -> GraphStore:
        """Open the store in a folder; with `create`, make a new one where there is none.

        On a GPU, sets TRITON_CACHE_DIR to a folder in the store unless it is set. UsageError for a folder without
        graphs; InferixError for graphs of another model, preset, device or version. Each of several ranks has a folder
        of its own in it, whose graphs name the groups that it communicates in.
        """
        if graphs.shard != ALONE:
            world = group_of(graphs.shard.every)
            folder = folder / f"rank-{world.rank}-of-{world.size}"
        path, expected = folder / IDENTITY, identity(graphs)
        if not path.exists():
            if not create:
                raise no_graphs(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write(path, expected)
        if differing := difference(read(path), expected):
            what, stored, here = differing
            raise InferixError(
                f"the graphs in {quoted(folder)} are for {cut(what)} {quoted(stored)}, but the engine has "
                f"{quoted(here)}; "
                "use another folder, or delete this one to trace them again"
            )
        if graphs.device.startswith("cuda"):
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / KERNELS))
        return cls(folder)

    def find(self, key: GraphKey) -> Lowered | None:
        """Return the stored program of a key, or None; a file that cannot be used counts as none, with a warning."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            stored, lowered = load_program(path)
            if stored != key:
                raise InferixError(f"{quoted(path)} is of another graph")
        except InferixError as error:
            warnings.warn(f"{error}; the graph is traced and stored again", stacklevel=2)
            return None
        return lowered

    def keep(self, key: GraphKey, lowered: Lowered) -> None:
        write(self.path(key), {"key": asdict(key), "lowered": encode_lowered(lowered)})

    def fill(self, graphs: GraphBuilder, keys: Iterable[GraphKey]) -> int:
        """Build and store the missing graphs of keys; returns their number."""
        missing = [key for key in keys if self.find(key) is None]
        for key in missing:
            self.keep(key, lowered_graph(graphs, key))
        return len(missing)

    def programs(self) -> list[tuple[GraphKey, Lowered]]:
        """Read all stored programs; InferixError for a file that cannot be read, or is of another version."""
        programs = []
        for path in sorted(self.folder.glob("*.json")):
            if path.name != IDENTITY:
                programs.append(load_program(path))
        return programs

    def path(self, key: GraphKey) -> Path:
        kind = "block" if key.whole else "pass"
        return self.folder / f"{kind}-{digest(repr(key))[:16]}.json"


def load_program(path: Path) -> tuple[GraphKey, Lowered]:
    """A stored program and its key; InferixError for a file that holds none."""
    data = read(path)
    try:
        return key_of(data["key"]), decode_lowered(data["lowered"])
    except (KeyError, TypeError, ValueError) as error:
        raise InferixError(f"cannot read {quoted(path)}: {quoted(str(error))} is missing or wrong") from error
    except InferixError as error:
        raise InferixError(f"cannot read {quoted(path)}: {error}") from error


def key_of(data: dict[str, Any]) -> GraphKey:
    """Graph key from the plain values of its file."""
    pairs = {name: tuple((one, other) for one, other in data[name]) for name in ("parts", "texts")}
    return GraphKey(**{**data, **pairs, "latent": tuple(data["latent"]), "run": tuple(data["run"])})


def difference(stored: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """First entry that differs: its dotted name, the stored and the expected value; None if all are equal."""
    for key in {**expected, **stored}:
        here, there = stored.get(key), expected.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            if inner := difference(here, there, f"{prefix}{key}."):
                return inner
        elif here != there:
            return prefix + key, here, there
    return None


def read(path: Path) -> dict[str, Any]:
    try:
        check_file(path, "graph")
        content = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InferixError(
            f"cannot read {quoted(path)}: {reason(error)}; delete it to trace the graph again"
        ) from error
    if not isinstance(content, dict):
        raise InferixError(
            f"cannot read {quoted(path)}: {quoted(content)} is no JSON object; delete it to trace the graph again"
        )
    return content


def write(path: Path, data: dict[str, Any]) -> None:
    write_atomically(path, lambda part: part.write_text(json.dumps(data), "utf-8"))
