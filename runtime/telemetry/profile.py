"""Profile of blocks: a table of time by pass and kind of work, and a trace for Chrome or Perfetto.

`fused` is timed call by call: with the host's clock on a CPU, with CUDA events on a GPU. `captured` has an event node
at each pass of the graph; its kinds of work are taken from a fused run of the same calls over equally many pages.
`eager` is timed by the calls that its model makes, under a dispatch mode. The report states the method, the overhead of
the timing, and the share of the machine's measured ceilings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...graphs.capture import Event
from ...graphs.cost import PACKED, call_cost, counts_of, known_family
from ...graphs.launch import LaunchPlan
from ...graphs.program import Call, Program, Ref
from ...graphs.rewrites.lowp import KINDS
from ...kernels.linear_lowp import pack
from ..files import write_atomically
from .call_timer import CallTimer

STAGES = ("prepare", "denoise", "commit")  # stages of a block in which passes run
TRACE, TABLE = "trace.json", "profile.txt"
OTHER = "other"  # the kind of work of an op without a cost
Result = TypeVar("Result")
HEAD_START = 2 * 10**8  # clock cycles of a GPU, about 0.1 s: longer than the host takes to launch a block call by call

RunKey = tuple[int, tuple[tuple[int, int], ...]]  # id of a program, and (call, pages it reads)


@dataclass(frozen=True)
class Ceilings:
    """Peak FLOP/s and bytes/s of the device, as measured.

    packed: FLOP/s of FP8 or INT8 matmuls, None where there are none. Operands can be widened instead, so that their
    ceiling is never below `flops`.
    """

    flops: float
    bytes: float
    packed: float | None = None

    def least(self, kind: str, flops: int, nbytes: int) -> float:
        """Least seconds for work of a kind."""
        peak = max(self.flops, self.packed or 0.0) if kind == PACKED else self.flops
        return max(nbytes / self.bytes, flops / peak)


@dataclass(frozen=True)
class Cost:
    """Seconds, bytes and FLOPs of some calls, and the least seconds for them at the ceilings."""

    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    least: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds, self.bytes + other.bytes, self.flops + other.flops, self.least + other.least
        )


@dataclass(frozen=True)
class Run:
    """One run of a program.

    begin: host clock in seconds. marks: seconds from `begin`, before each call in `at` and after the last one.
    listed: pages read through page tables, by call. how: the method of timing.
    """

    program: Program
    begin: float
    at: tuple[int, ...]
    marks: tuple[float, ...]
    listed: Mapping[int, int]
    how: str

    @property
    def seconds(self) -> float:
        return self.marks[-1] - self.marks[0]

    @property
    def by_call(self) -> bool:
        return len(self.at) == len(self.program.calls)

    @property
    def key(self) -> RunKey:
        """The program, and the number of pages that each call reads."""
        return id(self.program), tuple(sorted(self.listed.items()))


@dataclass
class BlockProfile:
    """Runs of one block, seconds of its stages, and bytes by owner.

    spent: seconds of bookkeeping for the profile. apart: seconds in its stages of extra runs for timing only.
    """

    index: int
    runs: list[Run]
    timings: dict[str, float]
    memory: dict[str, int]
    spent: float
    apart: float


class HostClock:
    """Times calls that have ended when they return."""

    how = "the host's clock before and after each call"

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> tuple[float, ...]:
        return tuple(mark - marks[0] for mark in marks)


class EventClock:
    """Times calls on the current stream of a GPU."""

    how = "events on the stream before and after each call"

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> tuple[float, ...]:
        marks[-1].synchronize()
        return elapsed(marks)


@dataclass
class Profile:
    """Collects the launcher's runs; `end_block` closes a block, `write` writes the report.

    about: model, preset and device, for the first line of the report. spent, apart: as in `BlockProfile`, for the
    current block. decodes: (block, begin, end) of each decode, on the clock of runs. feeds: (begin, end) of each time
    that sinks took frames. once: one fused run for each captured program and number of pages.
    """

    about: str
    device: torch.device
    ceilings: Ceilings
    blocks: list[BlockProfile] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    once: dict[RunKey, Run] = field(default_factory=dict)
    counts: WeakKeyDictionary[LaunchPlan, PageCounts] = field(default_factory=WeakKeyDictionary)
    spent: float = 0.0
    apart: float = 0.0
    decodes: list[tuple[int, float, float]] = field(default_factory=list)
    feeds: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock: HostClock | EventClock = EventClock() if self.device.type == "cuda" else HostClock()
        self.mark_cost = self.cost_of_a_mark()

    def launch(self, launches: LaunchPlan, replay: Callable[[], object], events: Sequence[Event] | None) -> None:
        """Run a program and record its times, from the events of a captured graph or call by call."""
        begin = time.perf_counter()
        if events is None:
            self.runs.append(self.timed(launches, begin))
            return
        replay()
        synchronise(self.device)
        at = tuple(section.first for section in launches.program.sections)
        self.runs.append(Run(launches.program, begin, at, elapsed(events), self.pages_read(launches), EVENT_NODES))
        if self.runs[-1].key not in self.once:
            self.time_calls_once(launches)

    def observe(self, run: Callable[[], Result]) -> Result:
        """Run a pass of a model without a program, and record the times of its calls."""
        timer = CallTimer(self.clock.mark)
        begin = time.perf_counter()
        with timer:
            result = run()
        marks: list[Any] = [*timer.marks, self.clock.mark()]
        seconds = self.clock.seconds(marks)
        program, at = timer.program(f"pass {len(self.runs)}"), tuple(range(len(timer.calls)))
        self.runs.append(Run(program, begin, at, seconds, timer.pages_read(), f"{self.clock.how}, {OF_A_MODEL}"))
        return result

    def time_calls_once(self, launches: LaunchPlan) -> None:
        """Time the calls of a captured program one by one; it computes again what the replay computed.

        The GPU sleeps first, so that the host can queue calls ahead and event times have no gaps of the host.
        """
        begin = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda._sleep(HEAD_START)
        run = self.timed(launches, begin)
        self.once[run.key] = run
        self.apart += time.perf_counter() - begin

    def timed(self, launches: LaunchPlan, begin: float) -> Run:
        marks: list[Any] = []
        launches.run_with(lambda _: marks.append(self.clock.mark()))
        seconds = self.clock.seconds(marks)
        at = tuple(range(len(launches.calls)))
        return Run(launches.program, begin, at, seconds, self.pages_read(launches), self.clock.how)

    def pages_read(self, launches: LaunchPlan) -> dict[int, int]:
        """Number of pages that each call with a page table reads, from the counts on the device."""
        begin = time.perf_counter()
        if launches not in self.counts:
            self.counts[launches] = page_counts(launches)
        read = ((int(counts.sum()), calls) for counts, calls in self.counts[launches])
        by_call = {call: pages for pages, calls in read for call in calls}
        self.spent += time.perf_counter() - begin
        return by_call

    def end_block(self, index: int, timings: Mapping[str, float], memory: Callable[[], dict[str, int]]) -> None:
        """Close a block with the seconds of its stages and the bytes by owner that `memory` returns."""
        begin = time.perf_counter()
        by_owner = memory()
        self.spent += time.perf_counter() - begin
        self.blocks.append(BlockProfile(index, self.runs, dict(timings), by_owner, self.spent, self.apart))
        self.drop()

    def drop(self) -> None:
        """Discard what was recorded since the end of the last block."""
        self.runs, self.spent, self.apart = [], 0.0, 0.0

    def note_decoding(self, record: Mapping[str, Any]) -> None:
        """Store when a block was decoded, from its record."""
        if (span := record.get("spans", {}).get("decode")) is not None:  # records of controls have no spans
            self.decodes.append((record["block"], *span))

    def note_feed(self, begin: float, end: float) -> None:
        """Store when sinks took the frames of a block; for `Pump(note=)`."""
        self.feeds.append((begin, end))

    def cost_of_a_mark(self) -> float:
        """Seconds of one mark on the host."""
        begin = time.perf_counter()
        for _ in range(1000):
            self.clock.mark()
        return (time.perf_counter() - begin) / 1000

    def cost_of(self, run: Run, index: int, seconds: float) -> Cost:
        """Cost of one call of a run."""
        call = run.program.calls[index]
        if (kind := kind_of(call)) == OTHER:
            return Cost(seconds)
        cost = call_cost(call, run.listed.get(index, 0))
        return Cost(seconds, cost.nbytes, cost.flops, self.ceilings.least(kind, cost.flops, cost.nbytes))

    def passes(self, block: BlockProfile) -> dict[str, float]:
        """Seconds of each pass of a block, in order."""
        seconds: dict[str, float] = {}
        for run in block.runs:
            marks = dict(zip((*run.at, len(run.program.calls)), run.marks, strict=True))
            for section in run.program.sections:
                seconds[section.name] = seconds.get(section.name, 0.0) + marks[section.stop] - marks[section.first]
        return seconds

    def families(self, block: BlockProfile) -> dict[str, Cost]:
        """Cost of each kind of work, the longest first."""
        by_kind: dict[str, Cost] = {}
        for run in block.runs:
            timed = run if run.by_call else self.once.get(run.key)
            if timed is not None:
                for index, (start, end) in enumerate(pairwise(timed.marks)):
                    kind = kind_of(run.program.calls[index])
                    by_kind[kind] = by_kind.get(kind, Cost()) + self.cost_of(timed, index, end - start)
        return dict(sorted(by_kind.items(), key=lambda item: -item[1].seconds))

    def gaps(self, block: BlockProfile) -> float:
        """Seconds in the stages with passes in which no call ran."""
        staged = sum(block.timings.get(stage, 0.0) for stage in STAGES)
        return staged - sum(run.seconds for run in block.runs) - block.apart

    def overhead(self) -> float:
        """Time for marks and bookkeeping, as a share of the time of all runs."""
        runs = [run for block in self.blocks for run in block.runs]
        marks = sum(len(run.marks) for run in runs)
        notes = sum(block.spent for block in self.blocks)
        return (marks * self.mark_cost + notes) / max(sum(run.seconds for run in runs), 1e-12)

    def text(self) -> str:
        """The report: what was measured and by which method, then each block."""
        how = {run.how for block in self.blocks for run in block.runs}
        lines = [
            f"profile of {self.about}",
            f"times from {' and '.join(sorted(how))}; marks of {self.mark_cost * 1e6:.2f} us and notes took "
            f"{self.overhead():.2%} of it",
            f"ceilings measured here: {self.ceilings.flops / 1e9:.4g} GFLOP/s, {self.ceilings.bytes / 1e9:.4g} GB/s"
            + (f", packed {self.ceilings.packed / 1e9:.4g} GFLOP/s" if self.ceilings.packed else ""),
        ]
        for block in self.blocks:
            stages = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in block.timings.items())
            lines += ["", f"block {block.index}, ms: {stages}; outside calls {self.gaps(block) * 1e3:.3g}"]
            lines += [f"  {name:<24}{seconds * 1e3:>10.3f} ms" for name, seconds in self.passes(block).items()]
            families = self.families(block)
            total = sum(cost.seconds for cost in families.values())
            lines.append(f"  {'work':<16}{'ms':>10}{'share':>8}{'GB':>10}{'GFLOP':>10}{'of ceiling':>12}")
            lines += [
                f"  {kind:<16}{cost.seconds * 1e3:>10.3f}{cost.seconds / total:>8.1%}{cost.bytes / 1e9:>10.4f}"
                f"{cost.flops / 1e9:>10.3f}{cost.least / cost.seconds:>12.1%}"
                for kind, cost in families.items()
            ]
            owned = ", ".join(f"{owner} {count / 1e6:.4g}" for owner, count in block.memory.items())
            lines.append(f"  memory, MB: {owned}")
        return "\n".join(lines) + "\n"

    def trace(self) -> dict[str, Any]:
        """The profile in Chrome's trace format: blocks, passes, calls, decodes, and sinks that take frames."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": thread, "args": {"name": name}}
            for thread, name in enumerate(("blocks", "passes", "calls", "decoder", "sinks"))
        ]
        for block in self.blocks:
            if block.runs:
                first, last = block.runs[0].begin, block.runs[-1].begin + block.runs[-1].seconds
                events.append(event(f"block {block.index}", 0, first, last - first, {"timings": block.timings}))
            for run in block.runs:
                marks = dict(zip((*run.at, len(run.program.calls)), run.marks, strict=True))
                for section in run.program.sections:
                    start, end = marks[section.first], marks[section.stop]
                    events.append(event(section.name, 1, run.begin + start, end - start, {}))
                for index, (start, end) in enumerate(pairwise(run.marks) if run.by_call else ()):
                    call, cost = run.program.calls[index], self.cost_of(run, index, end - start)
                    args = {"node": call.node, "kind": kind_of(call), "bytes": cost.bytes, "flops": cost.flops}
                    events.append(event(call.op.name(), 2, run.begin + start, end - start, args))
        events += [event(f"decode {block}", 3, begin, end - begin, {}) for block, begin, end in self.decodes]
        events += [event("take frames", 4, begin, end - begin, {}) for begin, end in self.feeds]
        return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"about": self.about}}

    def write(self, folder: Path) -> list[Path]:
        """Write the trace and the table as files into `folder`; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        trace, table = json.dumps(self.trace()), self.text()
        return [
            write_atomically(folder / TRACE, lambda part: part.write_text(trace, "utf-8")),
            write_atomically(folder / TABLE, lambda part: part.write_text(table, "utf-8")),
        ]


EVENT_NODES = "event nodes between the passes of the captured graph, kinds of work from a fused run of its calls"
OF_A_MODEL = "which lasts until the model makes the next, with the host's part of it"


def kind_of(call: Call) -> str:
    """The kind of work of a call; `OTHER` for an op of torch's that a model without a program may call."""
    return known_family(call.op) or OTHER


def elapsed(events: Sequence[Event]) -> tuple[float, ...]:
    """Seconds from the first event to each; the events must have completed."""
    return tuple(events[0].elapsed_time(event) / 1e3 for event in events)


def event(name: str, thread: int, begin: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    """A complete event of Chrome's trace format, in microseconds."""
    return {"ph": "X", "name": name, "pid": 0, "tid": thread, "ts": begin * 1e6, "dur": seconds * 1e6, "args": args}


PageCounts = list[tuple[Tensor, list[int]]]


def page_counts(launches: LaunchPlan) -> PageCounts:
    """Each page count tensor of a program, with the calls that read it."""
    calls: dict[Ref, list[int]] = {}
    for index, call in enumerate(launches.program.calls):
        if (counts := counts_of(call)) is not None:
            calls.setdefault(counts, []).append(index)
    return [(launches.view(counts), indices) for counts, indices in calls.items()]


def measure_ceilings(device: torch.device, dtype: torch.dtype, lowp: str | None = None) -> Ceilings:
    """Measure the peak of a few large matmuls in `dtype`, of copies, and with `lowp` of packed matmuls."""
    width, count = (8192, 1 << 28) if device.type == "cuda" else (768, 1 << 23)
    square = torch.ones(width, width, dtype=dtype, device=device)
    flat = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(flat)
    operations = 2 * width**3
    return Ceilings(
        operations / best(lambda: square @ square, device),
        2 * flat.nbytes / best(lambda: target.copy_(flat), device),
        None if lowp is None else operations / best(packed_matmul(lowp, square), device),
    )


def packed_matmul(lowp: str, square: Tensor) -> Callable[[], Tensor]:
    """Return torch's matmul of [N, N] with its own transpose in FP8 or INT8; N is a multiple of 16."""
    packed, _ = pack(square, KINDS[lowp], per_channel=False)
    if lowp == "int8":
        return lambda: torch._int_mm(packed, packed.T)
    one = torch.ones((), device=square.device)
    return lambda: torch._scaled_mm(packed, packed.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def best(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` runs, after one warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        begin = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
