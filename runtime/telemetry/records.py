"""Telemetry: one record for each block, as JSON lines, and an engine's counters, gauges and histograms.

All of it is plain data. Times are in seconds of `time.perf_counter`; on a GPU they are those of CUDA events.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ..files import PartFile, check_output, write_failed
from .ranges import Ranges, ranged

BOUNDS = tuple(2.0**power for power in range(-10, 7))  # upper ends of a histogram's bins in seconds; one more above


@dataclass(frozen=True)
class Ack:
    """Acknowledgement of a control.

    block: index of the first block that shows it. seconds: latency from the control to that block's first pixel, or to
    its latents where nothing is decoded. refused: reason why it had no effect, or None.
    """

    id: int
    kind: str
    block: int
    seconds: float
    refused: str | None = None


class Stopwatch:
    """Marks on one clock: `time.perf_counter` on a CPU, CUDA events on a GPU.

    Differences are the device's; its first mark counts as made when the host asked for it, up to a block before.
    """

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
        """Convert a mark to seconds; waits for the device to reach it."""
        if isinstance(mark, float):
            return mark
        assert self.base is not None
        mark.synchronize()
        return self.zero + float(self.base.elapsed_time(mark)) / 1e3


@dataclass
class BlockRecord:
    """Record of one block.

    session: the session's id. batch: size of the batch, this session included; network stages are timed for the whole
    batch. marks: (begin, end) of each stage. pass_marks: (begin, end) of each pass, in order. pages: pages in use by
    all sessions when the block was done. slack: seconds from the end of the block to its deadline; None without a
    deadline. ranges: for stages and passes on a profiler's timeline. degradations: steps taken under overload so far.
    drift: changes against the first seconds by `drift_meter.py`; None without a meter or without pictures, empty during
    the first seconds.
    """

    session: str
    block: int
    watch: Stopwatch
    batch: int = 1
    ranges: Ranges | None = None
    marks: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    pass_marks: list[tuple[Any, Any]] = field(default_factory=list)
    pages: int = 0
    slack: float | None = None
    acks: tuple[Ack, ...] = ()
    degradations: tuple[str, ...] = ()
    drift: dict[str, float] | None = None

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        with ranged(self.ranges, f"{stage} {self.block}"):
            begin = self.watch.mark()
            yield
            self.marks[stage] = (begin, self.watch.mark())

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        with ranged(self.ranges, f"pass {len(self.pass_marks)}"):
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
            "drift": self.drift,
        }


class RecordFile:
    """Writes records as JSON lines; a context manager.

    The file gets its name when it is closed, after an error too, with the records written so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_output(path)
        self.part: PartFile | None = None
        self.lock = threading.Lock()
        self.file: FileIO | None = None
        self.written = 0  # bytes of whole lines
        self.failure: OSError | None = None

    def __enter__(self) -> Self:
        try:
            self.part = PartFile(self.path)
            self.file = self.part.part.open("wb", buffering=0)
        except OSError as error:
            raise write_failed(self.path, error) from error
        return self

    def __call__(self, record: dict[str, Any]) -> None:
        """Add a record. The blocks go on where that fails; the context manager raises it at its end."""
        assert self.file is not None
        with self.lock:
            if self.failure is not None:
                return
            try:
                line = (json.dumps(record) + "\n").encode()
                if self.file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.written += len(line)
            except OSError as error:
                self.failure = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.file is not None and self.part is not None
        try:
            self.file.truncate(self.written)
            self.file.close()
            if kind is None or self.written:
                self.part.keep()
            if self.failure is not None and kind is None:
                raise self.failure
        except OSError as failed:
            raise write_failed(self.path, failed) from failed
        finally:
            self.part.discard()


@dataclass
class Histogram:
    """Histogram of seconds. counts: values up to each of `BOUNDS`, and in a last bin those above."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.total += value

    def as_dict(self) -> dict[str, Any]:
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "sum": self.total, "count": sum(self.counts)}


class Metrics:
    """Counters and histograms of an engine; names are in snake_case with the unit at the end."""

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
        """All metrics as plain values, with the given gauges."""
        with self.lock:
            return {
                "counters": dict(self.counters),
                "gauges": dict(gauges),
                "histograms": {name: histogram.as_dict() for name, histogram in self.histograms.items()},
            }
