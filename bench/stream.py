"""The stream benchmark: from a prompt to pixels on the sink, as someone who watches and steers has it.

Cold starts are processes of their own. Everything else is one engine: a stream at its full window, controls on their
way to pixels, one to N sessions, and a long run that must be as fast and as large at its end as at its beginning.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InferixError, UsageError
from ..runtime.batch_times import BatchTimes, keep_times
from ..runtime.config import default_device, default_executor
from ..runtime.engine import Engine
from ..runtime.media import VideoWriter
from ..runtime.outbox import Block
from ..runtime.session import Session
from .candidates import check_executor
from .machine import environment, measure_ceilings, process_memory
from .result import Result, Series
from .subject import ORACLE, Subject, described, open_engine, random_prompt, told_prompt
from .work import blocks_until_full

Tell = Callable[[str], None]
Frames = NDArray[np.uint8]
SINKS = ("memory", "mp4")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # where compiled kernels are kept between processes
TENTHS = 10
CLOCK = (
    "interval: host's wall clock from one block's frames on the sink to the next block's: noise, all passes, commit, "
    "decoder, conversion, copy to the host, and the sink (memory: frames are in host memory; mp4: encoded as well). "
    "first frame, cold: from the start of a process to the first block on the sink, with imports, weights, text "
    "encoder (none for random weights) and compilation. first frame, warm: from a prompt to a running engine. "
    "control: from the call to the first block on the sink that shows it, sent by another thread at moments spread "
    "over a block. Left out: network and display."
)


@dataclass(frozen=True)
class Wanted:
    """blocks: counted at a full window. starts: cold processes. controls: prompts sent at different moments.

    sessions: the curve goes from one to so many. minutes: of video in the long run; None for none. batches: file to
    keep times of sessions that run as one in; None where they only take turns.
    """

    subject: Subject
    blocks: int = 30
    starts: int = 3
    controls: int = 8
    sessions: int = 1
    minutes: float | None = None
    sink: str = "memory"
    batches: Path | None = None

    def __post_init__(self) -> None:
        for key, least in (("blocks", 2), ("starts", 0), ("controls", 0), ("sessions", 1)):
            if getattr(self, key) < least:
                raise UsageError(f"--{key} is {getattr(self, key)}; expected {least} or more")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"--minutes is {self.minutes}; expected a number above 0")
        if self.batches is not None and self.sessions < 2:
            raise UsageError(f"--batches keeps times of several sessions, and --sessions is {self.sessions}; give more")
        if self.sink not in SINKS:
            raise UsageError(f"--sink is {self.sink!r}; expected {' or '.join(SINKS)}")


class Sink(Protocol):
    """Where frames go."""

    def add(self, frames: Frames) -> None:
        """Take uint8 frames [T, H, W, 3]."""


class MemorySink:
    """Frames in host memory, looked at and let go, as a server's would be."""

    def __init__(self) -> None:
        self.frames = 0

    def add(self, frames: Frames) -> None:
        self.frames += len(frames)


@contextmanager
def open_sink(kind: str, engine: Engine, size: tuple[int, int]) -> Iterator[Sink]:
    if kind == "memory":
        yield MemorySink()
        return
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder) / "video.mp4", engine.fps, size) as writer:
        yield writer


@dataclass(frozen=True)
class Playout:
    """How a viewer fares who starts with the first block and waits whenever the next is not there.

    late: blocks that came after the last one had been shown; waited: seconds in all; longest: at once.
    """

    late: int
    waited: float
    longest: float


def play_out(arrivals: Sequence[float], seconds: Sequence[float]) -> Playout:
    """arrivals: when each block was on the sink; seconds: how long its frames are shown."""
    waits = []
    ends = arrivals[0] + seconds[0]
    for arrived, lasting in zip(arrivals[1:], seconds[1:], strict=True):
        if arrived > ends:
            waits.append(arrived - ends)
        ends = max(ends, arrived) + lasting
    return Playout(len(waits), sum(waits), max(waits, default=0.0))


def run(wanted: Wanted, tell: Tell) -> Result:
    """All parts in turn. UsageError for what cannot be measured, InferixError for a start that fails."""
    subject = wanted.subject
    subject.check()
    series: dict[str, Series] = {}
    facts: dict[str, Any] = {"sink": wanted.sink}
    engine = open_engine(subject)
    begun = environment(str(engine.device))
    tell("measuring what the machine can do")
    ceilings = measure_ceilings(str(engine.device), engine.dtype, engine.config.lowp)
    executor = engine.config.executor
    facts["check"] = check_executor(engine, subject)
    tell(f"{executor}: outputs match (off by {facts['check']['difference']:.1e})")
    for name, marks in cold_starts(wanted, tell).items():
        series |= start_series(name, marks)
    steady = watch(engine, wanted, wanted.blocks, tell)
    series[f"{executor}/interval"] = Series("s", tuple(steady.intervals))
    facts["stream"] = steady.facts(engine)
    if wanted.controls:
        series[f"{executor}/control to pixel"] = Series("s", tuple(controls(engine, wanted, tell)))
    facts["sessions"] = [several(engine, wanted, count, tell) for count in range(1, wanted.sessions + 1)]
    if wanted.batches is not None:
        facts["batches"] = batches(engine, wanted, tell)
    if wanted.minutes is not None:
        facts["long"] = long_run(engine, wanted, tell)
    about, settings = described(engine, subject)
    chosen = {key: getattr(wanted, key) for key in ("blocks", "starts", "controls", "sessions", "minutes", "sink")}
    return Result(
        kind="stream", clock=CLOCK, environment=begun, subject=about, settings=settings | chosen, ceilings=ceilings,
        series=series, facts=facts,
    )  # fmt: skip


def cold_starts(wanted: Wanted, tell: Tell) -> dict[str, list[dict[str, float]]]:
    """Marks of processes that found nothing made, and of such that found what one before them had stored."""
    executor = wanted.subject.executor or default_executor(wanted.subject.device or default_device())
    found: dict[str, list[dict[str, float]]] = {"cold": [], "stored": []}
    for turn in range(wanted.starts):
        with tempfile.TemporaryDirectory() as folder:
            for name in found:
                if name == "stored" and not any(Path(folder).iterdir()):
                    continue  # nothing was stored, so a second start is another cold one
                tell(f"start {turn + 1} of {wanted.starts}, {name}")
                graphs = None if executor == ORACLE else f"{folder}/graphs"
                found[name].append(start(replace(wanted.subject, graphs=graphs), folder))
    return {name: marks for name, marks in found.items() if marks}


def start(subject: Subject, caches: str) -> dict[str, float]:
    """Marks of one process, `asked` being the moment before it was started; InferixError if it fails."""
    given = {key: value for key, value in vars(subject).items() if key != "overrides"}
    given["overrides"] = subject.overrides
    command = [sys.executable, "-m", "inferix.bench.first_frame", json.dumps(given)]
    env = os.environ | dict.fromkeys(CACHES, caches)
    asked = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InferixError(f"a start from nothing failed: {done.stderr.strip()[-600:]}")
    marks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"asked": asked} | marks


def start_series(name: str, marks: list[dict[str, float]]) -> dict[str, Series]:
    """First frames of starts, in all and by stage."""
    stages = {
        f"first frame, {name}": ("asked", "cold shown"),
        f"first frame, {name}: process and imports": ("asked", "imported"),
        f"first frame, {name}: weights": ("imported", "loaded"),
        f"first frame, {name}: text encoder and session": ("cold asked", "cold opened"),
        f"first frame, {name}: first block": ("cold opened", "cold shown"),
    }
    if name == "cold":
        stages["first frame, warm"] = ("warm asked", "warm shown")
    return {
        f"start/{stage}": Series("s", tuple(mark[end] - mark[begin] for mark in marks))
        for stage, (begin, end) in stages.items()
    }


@dataclass(frozen=True)
class Watched:
    """A stream at its full window: when each block was on the sink, and its frames."""

    arrivals: tuple[float, ...]
    frames: tuple[int, ...]

    @property
    def intervals(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def fps(self) -> float:
        """Frames of all blocks but the first, by the time from the first block to the last."""
        return sum(self.frames[1:]) / (self.arrivals[-1] - self.arrivals[0])

    def facts(self, engine: Engine) -> dict[str, Any]:
        intervals = self.intervals
        playout = play_out(self.arrivals, [count / engine.fps for count in self.frames])
        return {
            "blocks": len(intervals), "frames": sum(self.frames[1:]), "fps": self.fps, "video_fps": engine.fps,
            "real_time_factor": self.fps / engine.fps, "jitter": statistics.pstdev(intervals),
            "late_blocks": playout.late, "waited": playout.waited, "longest_wait": playout.longest,
        }  # fmt: skip


def watch(engine: Engine, wanted: Wanted, blocks: int, tell: Tell) -> Watched:
    """Stream until the window is full, then `blocks` more."""
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    tell(f"a stream of {full} + {blocks} blocks")
    arrivals, frames = [], []
    opened = engine.open(**told_prompt(engine, subject.seed), seed=subject.seed, size=size)
    with opened as session, open_sink(wanted.sink, engine, size) as sink:
        for index, block in enumerate(session.stream(full + blocks + 1)):
            sink.add(shown(block))
            if index >= full:
                arrivals.append(time.perf_counter())
                frames.append(len(shown(block)))
    return Watched(tuple(arrivals), tuple(frames))


def controls(engine: Engine, wanted: Wanted, tell: Tell) -> list[float]:
    """Seconds from each of some controls to the first block on the sink that shows it.

    They come from another thread, one at a time, at moments spread over the making of a block.
    """
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    tell(f"{wanted.controls} controls on their way to pixels")
    asked: dict[int, float] = {}
    arrived: dict[int, float] = {}
    steps = [steering(engine, index) for index in range(wanted.controls)]
    before, sent = time.perf_counter(), 0
    opened = engine.open(**told_prompt(engine, subject.seed), seed=subject.seed, size=size)
    with opened as session, open_sink(wanted.sink, engine, size) as sink:

        def send(steer: Callable[[Session], int]) -> None:
            now = time.perf_counter()
            asked[steer(session)] = now

        for index, block in enumerate(session.stream()):
            sink.add(shown(block))
            now = time.perf_counter()
            arrived |= {ack.id: now for ack in block.acks}
            if len(arrived) == wanted.controls:
                break
            if index >= full and sent == len(arrived):
                phase = (sent + 0.5) / wanted.controls
                threading.Timer(phase * (now - before), send, (steps[sent],)).start()
                sent += 1
            before = now
    return [arrived[control] - asked[control] for control in sorted(arrived)]


def steering(engine: Engine, index: int) -> Callable[[Session], int]:
    """What tells a session an action where the model has any, else another prompt; it returns the control's id."""
    if actions := engine.spec.actions:
        return lambda session: session.act(actions[index % len(actions)])
    rows = random_prompt(engine, index)
    return lambda session: session.prompt(embeds=rows)


def shown(block: Block) -> Frames:
    """A block's frames, which a stream with pictures has."""
    assert block.frames is not None
    return block.frames


def several(engine: Engine, wanted: Wanted, count: int, tell: Tell) -> dict[str, Any]:
    """`count` sessions in turns at their full windows: frames a second of all, and each one's intervals."""
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    tell(f"{count} session{'s' if count > 1 else ''} at a time")
    prompt = told_prompt(engine, subject.seed)
    arrivals: list[list[float]] = [[] for _ in range(count)]
    frames = 0
    with ExitStack() as stack:
        opened = [engine.open(**prompt, seed=subject.seed + index, size=size) for index in range(count)]
        streams = [stack.enter_context(session).stream(full + wanted.blocks + 1) for session in opened]
        for turn in range(full + wanted.blocks + 1):
            for times, stream in zip(arrivals, streams, strict=True):
                block = next(stream)
                if turn >= full:
                    times.append(time.perf_counter())
                    frames += len(shown(block)) if turn > full else 0
    seconds = max(times[-1] for times in arrivals) - max(times[0] for times in arrivals)
    intervals = [later - earlier for times in arrivals for earlier, later in pairwise(times)]
    return {"sessions": count, "fps": frames / seconds, "intervals": intervals}


def batches(engine: Engine, wanted: Wanted, tell: Tell) -> list[dict[str, Any]]:
    """Seconds in which 1 to N sessions get a block each, in turns and as one batch.

    The seconds are of the network, without pictures, and are kept in the file. UsageError for an executor that has no
    batches.
    """
    assert wanted.batches is not None
    if not engine.executor.batches:
        executor = engine.config.executor
        raise UsageError(f"executor {executor} runs no batches; use --executor eager, or leave --batches out")
    size = wanted.subject.size or engine.default_size
    found, seconds = [], dict[int, float]()
    for count in range(1, wanted.sessions + 1):
        engine.follow_times(size, BatchTimes({1: math.inf, count: 1.0}))  # all of them, or each by itself
        seconds[count] = batch_seconds(engine, wanted, count, tell)
        found.append({"sessions": count, "turns": count * seconds[1], "batch": seconds[count]})
    times = BatchTimes(seconds)
    engine.follow_times(size, times)
    keep_times(wanted.batches, engine.timed_on, size, times)
    return found


def batch_seconds(engine: Engine, wanted: Wanted, count: int, tell: Tell) -> float:
    """Median seconds from a block's beginning to the end of its passes, at full windows, in a batch of `count`."""
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    tell(f"a batch of {count}, without pictures")
    prompt = told_prompt(engine, subject.seed)
    taken = []
    with ExitStack() as stack:
        opened = [engine.open(**prompt, seed=subject.seed + index, size=size) for index in range(count)]
        turns = full + wanted.blocks
        streams = [stack.enter_context(session).stream(turns, decode=False) for session in opened]
        for turn in range(turns):
            records = [next(stream).record for stream in streams]
            spans = [record.spans for record in records if record.batch == count and turn >= full]
            taken += [span["commit"][1] - span["encode"][0] for span in spans]
    return statistics.median(taken)


def long_run(engine: Engine, wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """So many minutes of video: each block's interval, the processor's time in it, and the memory after it, and all
    of them by tenths of the run. Processor's time is this process's alone, whatever else the machine does.
    """
    assert wanted.minutes is not None
    subject = wanted.subject
    size, blocks = subject.size or engine.default_size, engine.blocks_for(wanted.minutes * 60)
    full = blocks_until_full(engine.preset)
    if blocks - full < 2 * TENTHS:
        raise UsageError(f"--minutes {wanted.minutes:g} are {blocks} blocks; expected more than {full + 2 * TENTHS}")
    tell(f"a long run of {blocks} blocks")
    intervals, worked, process, device = [], [], [], []
    opened = engine.open(**told_prompt(engine, subject.seed), seed=subject.seed, size=size)
    with opened as session, open_sink(wanted.sink, engine, size) as sink:
        before, cpu = time.perf_counter(), time.process_time()
        for block in session.stream(blocks):
            sink.add(shown(block))
            now, cpu_now = time.perf_counter(), time.process_time()
            intervals.append(now - before)
            worked.append(cpu_now - cpu)
            before, cpu = now, cpu_now
            process.append(process_memory() or 0)
            device.append(torch.cuda.memory_allocated(engine.device) if engine.device.type == "cuda" else 0)
    steady = slice(full, None)
    return {
        "minutes": wanted.minutes, "blocks": blocks, "blocks_before_full": full, "intervals": intervals,
        "processor_seconds": worked,
        "process_memory": process, "device_memory": device if any(device) else None,
        "interval_by_tenth": [statistics.median(part) for part in tenths(intervals[steady])],
        "processor_seconds_by_tenth": [statistics.median(part) for part in tenths(worked[steady])],
        "process_memory_by_tenth": [max(part) for part in tenths(process[steady])],
        "device_memory_by_tenth": [max(part) for part in tenths(device[steady])] if any(device) else None,
    }  # fmt: skip


def tenths(values: Sequence[float]) -> list[Sequence[float]]:
    """Ten parts in order, as even as can be."""
    edges = [len(values) * part // TENTHS for part in range(TENTHS + 1)]
    return [values[begin:end] for begin, end in pairwise(edges)]
