"""Measured times of layouts of ranks, from a JSON file, which the planner takes in place of predicted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError, quoted
from ...models.files import parse_json
from ...schemes.presets import plain_fields
from .gpus import card_named
from .links import Link, measured_link
from .planner import Workload

MEASURE = "measure here: inferix bench parallel --model MODEL --preset PRESET --out FILE"
Layout = tuple[str, int, bool]  # name, ranks, and whether they divide the weights


@dataclass(frozen=True)
class MeasuredLayouts:
    """Milliseconds of a steady block by layout, decoder included.

    file: where they are from. about: model, preset, size, dtype and device of the run; executor, kv_dtype and fields of
    the preset where the file has them. link: measured beside them.
    """

    file: str
    about: Mapping[str, Any]
    blocks: Mapping[Layout, float]
    link: Link | None = None

    def check(self, load: Workload, device: str | None = None, card: str | None = None) -> None:
        """UsageError for times of another model, preset or setting of it, size, dtype, executor or machine.

        device: as `card_of` names it. card: name of a known card, where the device is not here.
        """
        here = {
            "model": load.spec.name, "preset": load.preset.name, "size": list(load.size), "dtype": load.dtype,
        }  # fmt: skip
        there = dict(self.about)
        here |= plain_fields(load.preset)
        there |= there.pop("settings", {})
        if device is not None:  # an engine, whose settings are known
            here |= {"device": device, "executor": load.executor, "kv_dtype": load.kv_dtype}
        if card is not None:
            known = card_named(str(there["device"]))
            here["device"] = card
            there["device"] = there["device"] if known is None else known.name
        for key, value in here.items():
            if there.get(key, value) != value:
                raise UsageError(
                    f"measured {quoted(self.file)} is of {key} {quoted(str(there[key]))}, and here it is "
                    f"{quoted(str(value))}; {MEASURE}"
                )

    def block(self, layout: str, ranks: int, shard_weights: bool) -> float | None:
        """Milliseconds of a block; None where the layout was not measured."""
        return self.blocks.get((layout, ranks, shard_weights))


def read_measured(name: str) -> MeasuredLayouts:
    """Measured layouts of a file that `inferix bench parallel --model --out` wrote; UsageError for any other."""
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"measured is {quoted(name)}, which is no file; {MEASURE}")
    try:
        content = parse_json(path.read_text("utf-8"))
        about = {key: content[key] for key in ("model", "preset", "size", "dtype", "device")}
        about |= {key: content[key] for key in ("executor", "kv_dtype") if key in content}
        about["settings"] = dict(content.get("settings", {}))
        blocks = {
            (str(row["layout"]), int(row["ranks"]), flag(row["shard_weights"])): float(row["block_ms"])
            for row in content["layouts"]
        }
        link = measured_link(content, path.name) if "bandwidth" in content else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        message = f"measured is {quoted(name)}; expected model, preset, size, dtype, device and layouts in it"
        raise UsageError(f"{message}: {quoted(str(error))}; {MEASURE}") from error
    if not blocks:
        raise UsageError(f"measured is {quoted(name)}, whose layouts are an empty list; {MEASURE}")
    if wrong := [time for time in blocks.values() if not 0 < time < float("inf")]:
        raise UsageError(f"measured is {quoted(name)} with a block of {wrong[0]} ms; expected above 0")
    return MeasuredLayouts(path.name, about, blocks, link)


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"shard_weights is {value!r}; expected true or false")
    return value
