"""What is measured: one record per block, as JSON lines, and an engine's counters, gauges and histograms.

All of it is plain data. Times are seconds of `time.perf_counter`; on a GPU a stage ends when the device gets there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from ..files import check_output, part_of, write_failed

BOUNDS = tuple(2.0**power for power in range(-10, 7))  # upper ends of a histogram's bins in seconds; one more above


@dataclass(frozen=True)
class Ack:
    """What became of a control.

    block: index of the first block that shows it. seconds: from the control to that block's first pixel (to its
    latents where nothing is decoded). refused: why it had no effect; None where it had.
    """

    id: int
    kind: str
    block: int
    seconds: float
    refused: str | None = None


class Stopwatch:
    """Marks on one clock: the host's, or the device's where work is queued, counted from when it was made."""

    def __init__(self, device: torch.device) -> None:
        self.zero = time.perf_counter()
        self.base = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.base is not None:
            self.base.record()

    def mark(self) -> float | torch.cuda.Event:
        if self.base is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, mark: float | torch.cuda.Event) -> float:
        """A mark as seconds; waits for the device to get there."""
        if isinstance(mark, float):
            return mark
        assert self.base is not None
        mark.synchronize()
        return self.zero + float(self.base.elapsed_time(mark)) / 1e3


@dataclass
class BlockRecord:
    """How a block came about: (begin, end) of each stage, and what stood around it.

    batch: sessions whose blocks were made along, itself included; stages of the network are then those of all.
    passes: of each pass of the network, in order. pages: in use by all sessions when the block was done.
    slack: seconds between the block's being ready and its being due; None where nothing is. degradations: steps that
    overload has taken so far.
    """

    session: int
    block: int
    watch: Stopwatch
    batch: int = 1
    marks: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    pass_marks: list[tuple[Any, Any]] = field(default_factory=list)
    pages: int = 0
    slack: float | None = None
    acks: tuple[Ack, ...] = ()
    degradations: tuple[str, ...] = ()

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        begin = self.watch.mark()
        yield
        self.marks[stage] = (begin, self.watch.mark())

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        begin = self.watch.mark()
        yield
        self.pass_marks.append((begin, self.watch.mark()))

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        return {stage: (self.watch.read(begin), self.watch.read(end)) for stage, (begin, end) in self.marks.items()}

    @property
    def seconds(self) -> dict[str, float]:
        return {stage: end - begin for stage, (begin, end) in self.spans.items()}

    @property
    def passes(self) -> list[float]:
        return [self.watch.read(end) - self.watch.read(begin) for begin, end in self.pass_marks]

    def as_dict(self) -> dict[str, Any]:
        return {
            "session": self.session,
            "block": self.block,
            "batch": self.batch,
            "seconds": self.seconds,
            "passes": self.passes,
            "spans": self.spans,
            "pages": self.pages,
            "slack": self.slack,
            "acks": [vars(ack) for ack in self.acks],
            "overload": list(self.degradations),
        }


class RecordFile:
    """Records as JSON lines, as a context manager; the file has its name once it is complete, or interrupted."""

    def __init__(self, path: str | Path) -> None:
        self.path = check_output(path)
        self.lock = threading.Lock()
        self.file: TextIO | None = None

    def __enter__(self) -> Self:
        self.file = part_of(self.path).open("w", encoding="utf-8")
        return self

    def __call__(self, record: dict[str, Any]) -> None:
        assert self.file is not None
        try:
            with self.lock:
                self.file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_failed(self.path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.file is not None
        try:
            self.file.close()
            if kind is None or issubclass(kind, KeyboardInterrupt):
                os.replace(part_of(self.path), self.path)
        except OSError as failed:
            raise write_failed(self.path, failed) from failed
        finally:
            part_of(self.path).unlink(missing_ok=True)


@dataclass
class Histogram:
    """counts: values up to each of `BOUNDS`, and one more for those above."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.total += value

    def as_dict(self) -> dict[str, Any]:
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "sum": self.total, "count": sum(self.counts)}


class Metrics:
    """Counters and histograms of an engine; names are words with underscores, units at the end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counters: Counter[str] = Counter()
        self.histograms: dict[str, Histogram] = {}

    def count(self, name: str, by: int = 1) -> None:
        with self.lock:
            self.counters[name] += by

    def observe(self, name: str, value: float) -> None:
        with self.lock:
            self.histograms.setdefault(name, Histogram()).add(value)

    def as_dict(self, gauges: dict[str, float]) -> dict[str, Any]:
        """Everything as plain values, together with gauges read just now."""
        with self.lock:
            return {
                "counters": dict(self.counters),
                "gauges": dict(gauges),
                "histograms": {name: histogram.as_dict() for name, histogram in self.histograms.items()},
            }
