"""Result of a benchmark run: one JSON file with one schema for every kind, versioned and checked on reading.

The file has all samples, not only their medians, so that two files can be compared later by any statistic.
`docs/benchmarks.md` documents every field.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError, cut, nearest, quoted
from ..runtime.files import check_output, write_atomically
from ..user_files import check_reachable, read_json

SCHEMA = 3  # 1 was only of the kernel benchmark, 2 had no low-precision layers and pages
KINDS = ("kernels", "block", "stream", "pairs", "serve", "churn")


@dataclass(frozen=True)
class Series:
    """Samples of one quantity in the order of measurement. better: `less` or `more`, the direction of improvement."""

    unit: str
    samples: tuple[float, ...]
    better: str = "less"

    def __post_init__(self) -> None:
        if not self.samples or not all(math.isfinite(sample) for sample in self.samples):
            raise ValueError(f"samples {self.samples[:4]}... must be at least one, and finite")
        if self.better not in ("less", "more"):
            raise ValueError(f"better is {self.better!r}; expected less or more")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples) if self.better == "less" else max(self.samples)

    @property
    def worst(self) -> float:
        return max(self.samples) if self.better == "less" else min(self.samples)

    def quantile(self, share: float) -> float:
        """Quantile of the samples, interpolated linearly."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def tail(self, share: float) -> float | None:
        """High quantile; None with so few samples that it would only be the worst of them."""
        return self.quantile(share) if round(len(self.samples) * (1 - share), 6) >= 1 else None


@dataclass(frozen=True)
class Result:
    """One run.

    clock: text about the time that the clock covers and leaves out. environment: see `machine.environment`. subject:
    model and checkpoint. settings: every option. ceilings: measured limits of the machine in this run. series: samples
    by name, `candidate/quantity`. facts: everything that is no sample.
    """

    kind: str
    clock: str
    environment: dict[str, Any]
    subject: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, Series]
    series: dict[str, Series]
    facts: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def on_gpu(self) -> bool:
        return bool(self.environment["device"]["type"] != "cpu")

    @property
    def gpus(self) -> int:
        """Ranks that share each pass."""
        return int(self.subject.get("ranks", {}).get("count", 1))

    @property
    def matmul_flops(self) -> float:
        """Measured matmul of all ranks, FLOP/s. Ranks on a CPU share the processor that was measured."""
        ranks = 1 if self.environment["device"]["type"] == "cpu" else self.gpus
        return self.ceilings["matmul_flops"].best * ranks

    @property
    def device_name(self) -> str:
        """Name of the device, with the layout of several ranks on as many."""
        name = str(self.environment["device"]["name"])
        return name if self.gpus == 1 else f"{self.gpus} x {name}, {self.subject['ranks']['layout']}"

    def of(self, candidate: str) -> dict[str, Series]:
        """Series of one candidate by quantity."""
        start = candidate + "/"
        return {name.removeprefix(start): series for name, series in self.series.items() if name.startswith(start)}

    def work_of(self, candidate: str) -> dict[str, Any]:
        """FLOPs and bytes of a candidate's block: `facts["work"]`, with its `fewer_bits` part in low precision."""
        work: dict[str, Any] = self.facts["work"]
        packed = self.facts["candidates"][candidate].get("fewer_bits", False)
        return work | work.get("fewer_bits", {}) if packed else work

    def text(self) -> str:
        """Content of the file: indented JSON with every list of numbers in one line."""
        text = json.dumps(asdict(self), indent=1, default=str, allow_nan=False)
        return re.sub(r"\[[-+.,\d\seE]+\]", lambda match: " ".join(match[0].split()), text) + "\n"


def as_in_a_file(value: Any) -> Any:
    """Convert a value as writing and reading JSON does: tuples become lists."""
    return json.loads(json.dumps(value))


def write_result(result: Result, path: Path) -> Path:
    """Write a result's file atomically."""
    text = result.text()
    return write_atomically(check_output(path), lambda part: part.write_text(text, "utf-8"))


CHECK = "check"  # a key of files of gpu_check without measurements
FAILED = ".failed.txt"  # suffix of the file of a gpu_check unit that failed
ENVELOPE: dict[str, type] = {
    "kind": str, "clock": str, "environment": dict, "subject": dict, "settings": dict, "ceilings": dict,
    "series": dict, "facts": dict,
}  # fmt: skip
ENVIRONMENT = ("date", "command", "commit", "device", "host", "driver", "clocks", "versions")


def read_result(path: str | Path) -> Result:
    """Read a result's file. Raises UsageError for another format or schema and for a missing or damaged field."""
    where = f"result {quoted(path)}"
    content = read_json(path, "result")
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int) or "kind" not in content:
        raise UsageError(f"{where} was not written by inferix bench: it has no schema and kind; leave it out")
    if content["schema"] != SCHEMA:
        other = "older: run its command again" if content["schema"] < SCHEMA else "newer: update inferix"
        schema = quoted(content["schema"])
        raise UsageError(f"{where} has schema {schema}, this version reads {SCHEMA}; the file is {other}")
    if content["kind"] not in KINDS:
        known = f"{nearest(str(content['kind']), KINDS)}; expected one of {', '.join(KINDS)}"
        raise UsageError(f"{where} is of kind {quoted(content['kind'])}{known}")
    for key, kind in ENVELOPE.items():
        if not isinstance(content.get(key), kind):
            value = quoted(content.get(key), 60)
            raise UsageError(f"{where}: {key} is {value}; expected a {kind.__name__}: run it again")
    if unknown := content.keys() - ENVELOPE.keys() - {"schema"}:
        raise UsageError(f"{where} has {quoted(min(unknown))}, which schema {SCHEMA} does not; run it again")
    if missing := [key for key in ENVIRONMENT if key not in content["environment"]]:
        raise UsageError(f"{where}: its environment lacks {', '.join(missing)}; run it again")
    for group in ("ceilings", "series"):
        items = content[group].items()
        content[group] = {name: read_series(value, f"{where}: {group} {quoted(name)}") for name, value in items}
    return Result(**content)


def is_check(path: Path) -> bool:
    """Return True for a file that `gpu_check` wrote without measurements."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and CHECK in content


def read_series(value: Any, where: str) -> Series:
    if not isinstance(value, Mapping) or not isinstance(value.get("samples"), list):
        raise UsageError(f"{where} is {quoted(value, 60)}; expected unit, samples and better: run it again")
    try:
        samples = tuple(float(sample) for sample in value["samples"])
        return Series(str(value["unit"]), samples, str(value["better"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{where} is damaged: {cut(str(error))}; run it again") from error


def is_foreign(path: Path) -> bool:
    """Return True for the JSON of another program, without the schema and kind of a result."""
    content = read_json(path, "result")
    return not isinstance(content, dict) or "schema" not in content or "kind" not in content


def foreign_files(folder: Path) -> list[Path]:
    """JSON files below a folder that are no results and were not written by `gpu_check`."""
    paths = sorted(check_reachable(folder, "folder").rglob("*.json"))
    return [path for path in paths if not is_check(path) and is_foreign(path)]


def read_folder(folder: Path) -> dict[str, Result]:
    """Read every result below a folder, by relative path, sorted. Raises UsageError if there is none.

    Files of `gpu_check` without measurements and JSON of other programs are skipped.
    """
    if not check_reachable(folder, "folder").is_dir():
        raise UsageError(f"no folder {quoted(folder)}; expected one with results of inferix bench")
    paths = [path for path in sorted(folder.rglob("*.json")) if not is_check(path) and not is_foreign(path)]
    results = {str(path.relative_to(folder)): read_result(path) for path in paths}
    if not results:
        example = folder / "block.json"
        raise UsageError(f"folder {quoted(folder)} has no results; write one: inferix bench block --out {example}")
    return results


def read_failures(folder: Path) -> dict[str, str]:
    """Failed units of `gpu_check`, by relative path, with the last line of their output."""
    failures = {}
    for path in sorted(folder.rglob(f"*{FAILED}")):
        lines = path.read_text("utf-8", "replace").split("\n")
        output = [line.strip() for line in lines if line.strip()]
        failures[str(path.relative_to(folder)).removesuffix(FAILED)] = output[-1] if output else "no output"
    return failures
