"""The stream benchmark: from a prompt to pixels on the sink, as someone who watches and steers has it.

Cold starts are processes of their own, before this one loads anything. Everything else is one engine, driven by a
thread of its own and read by another, as a server does it: a stream at its full window, controls on their way to
pixels, one to N sessions, and a long run that must be as fast and as large at its end as at its beginning.
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
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InferixError, UsageError
from ..runtime.config import EngineConfig
from ..runtime.engine import Engine
from ..runtime.execution.executors import EagerExecutor, GraphExecutor
from ..runtime.media import VideoWriter
from ..runtime.sessions.batch_profile import BatchProfile, save_profile
from ..runtime.sessions.output_queue import Block
from ..runtime.sessions.session import Session
from .baseline import Made
from .candidates import check_executor, executor_candidate, judge_of, made_of
from .machine import environment, measure_ceilings, process_memory
from .result import Result, Series
from .subject import (
    ORACLE,
    Subject,
    check_memory,
    described,
    in_fewer_bits,
    open_engine,
    planned,
    random_prompt,
    told_prompt,
    told_rows,
)
from .work import blocks_until_full

Tell = Callable[[str], None]
Frames = NDArray[np.uint8]
SINKS = ("memory", "mp4")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # where compiled kernels are kept between processes
TENTHS = 10
BLOCKS_PER_CONTROL = 8  # within which one must show; two or three are usual
CLOCK = (
    "interval: host's wall clock from one block's frames on the sink to the next block's, in a stream that goes on: "
    "noise, all passes, commit, decoder, conversion, copy to the host, and the sink (memory: frames are in host "
    "memory; mp4: encoded as well). first frame, cold: from the start of a process to the first block in host memory, "
    "with imports, weights, text encoder (none for random weights) and compilation; random weights are drawn on the "
    "device, and files of a checkpoint may be in the system's memory, so no disk is in this. first frame, warm: from a "
    "prompt to a running engine. control: from the call to the first block on the sink that shows it, given at moments "
    "spread over a block by another thread than the one that makes blocks. Left out: network and display."
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
    subject, series = wanted.subject, dict[str, Series]()
    config = check(wanted)
    begun = environment(config.device)
    for name, marks in cold_starts(wanted, tell).items():
        series |= start_series(name, marks)
    engine, executor = open_engine(subject), config.executor
    tell("measuring what the machine can do")
    ceilings = measure_ceilings(config.device, engine.dtype, config.lowp)
    rows, first = told_rows(engine, subject.seed), blocks_until_full(engine.preset) + 2
    judge = judge_of(engine, rows, subject, [True] * first)
    ours = executor_candidate(engine, executor, rows, subject)
    facts: dict[str, Any] = {"sink": wanted.sink, "check": check_executor(judge, ours)}
    tell(f"{executor}: outputs match (off by {facts['check']['difference']:.1e})")
    tell(f"a stream, {wanted.blocks} blocks at its full window")
    (steady,) = watch(engine, wanted, 1, first)
    if wrong := judge.refusal(ours, steady.first):
        raise InferixError(f"executor {executor} is refused, and what was timed thrown away: {wrong}")
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


def check(wanted: Wanted) -> EngineConfig:
    """How the engine will be made; UsageError for what cannot be measured, before anything is."""
    config, preset = planned(wanted.subject)
    blocks_until_full(preset)
    check_memory(wanted.subject)
    if config.executor == ORACLE and in_fewer_bits(config):
        raise UsageError(
            f"executor {ORACLE} in fewer bits is a slow reference, which others are held against; use --executor fused "
            "(on a GPU captured)"
        )
    if wanted.batches is not None and not (EagerExecutor if config.executor == ORACLE else GraphExecutor).batches:
        raise UsageError(f"executor {config.executor} runs no batches; use --executor eager, or leave --batches out")
    return config


@contextmanager
def driven(engine: Engine) -> Iterator[None]:
    """Have another thread drive the engine, so that this one reads blocks the moment they are there."""
    engine.hand_over()
    thread = threading.Thread(target=engine.run, kwargs={"keep": True}, name="inferix-bench-driver")
    thread.start()
    engine.soon(lambda: None).result()  # from here on the engine is that thread's
    try:
        yield
    finally:
        engine.halt()
        thread.join()


def cold_starts(wanted: Wanted, tell: Tell) -> dict[str, list[dict[str, float]]]:
    """Marks of processes that found nothing made, and of such that found what one before them had stored."""
    executor = planned(wanted.subject)[0].executor
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
    command = [sys.executable, "-m", "inferix.bench.first_frame", json.dumps(vars(subject))]
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
    """A stream at its full window: when each block was on the sink, and its frames. first: its blocks before that."""

    arrivals: tuple[float, ...]
    frames: tuple[int, ...]
    first: tuple[Made, ...] = ()

    @property
    def intervals(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def fps(self) -> float:
        """Frames of all blocks but the first, by the time from the first block to the last."""
        return sum(self.frames[1:]) / (self.arrivals[-1] - self.arrivals[0])

    def playout(self, fps: float) -> Playout:
        return play_out(self.arrivals, [count / fps for count in self.frames])

    def facts(self, engine: Engine) -> dict[str, Any]:
        intervals = self.intervals
        return {
            "blocks": len(intervals), "frames": sum(self.frames[1:]), "fps": self.fps, "video_fps": engine.fps,
            "real_time_factor": self.fps / engine.fps, "jitter": statistics.pstdev(intervals),
            **viewers([self.playout(engine.fps)]),
        }  # fmt: skip


def viewers(playouts: Sequence[Playout]) -> dict[str, Any]:
    """How all of them fare: late blocks and seconds waited in all, and the longest wait."""
    return {
        "late_blocks": sum(one.late for one in playouts), "waited": sum(one.waited for one in playouts),
        "longest_wait": max(one.longest for one in playouts),
    }  # fmt: skip


def watch(engine: Engine, wanted: Wanted, count: int, first: int = 0) -> list[Watched]:
    """`count` streams, each on a sink of its own, until the window is full, then `blocks` more.

    They have no end: the clock stops while the next blocks are being made. first: how many blocks are kept.
    """
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    prompt = told_prompt(engine, subject.seed)
    arrivals, frames, begun = ([list[Any]() for _ in range(count)] for _ in range(3))
    with ExitStack() as stack:
        opened = [
            stack.enter_context(engine.open(**prompt, seed=subject.seed + index, size=size)) for index in range(count)
        ]
        sinks = [stack.enter_context(open_sink(wanted.sink, engine, size)) for _ in opened]
        streams = [session.stream() for session in opened]
        stack.enter_context(driven(engine))
        for turn in range(full + wanted.blocks + 1):
            for index, (stream, sink) in enumerate(zip(streams, sinks, strict=True)):
                block = next(stream)
                sink.add(shown(block))
                if turn >= full:
                    arrivals[index].append(time.perf_counter())
                    frames[index].append(len(shown(block)))
                if turn < first:
                    begun[index].append(block)
    parts = zip(arrivals, frames, begun, strict=True)
    return [Watched(tuple(times), tuple(counts), tuple(map(made_of, blocks))) for times, counts, blocks in parts]


def controls(engine: Engine, wanted: Wanted, tell: Tell) -> list[float]:
    """Seconds from each of some controls to the first block on the sink that shows it.

    They are given one at a time, at moments spread over the making of a block. InferixError if one never shows.
    """
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    tell(f"{wanted.controls} controls on their way to pixels")
    asked, arrived = dict[int, float](), dict[int, float]()
    steps = [steering(engine, index) for index in range(wanted.controls)]
    most = full + 1 + BLOCKS_PER_CONTROL * wanted.controls
    opened = engine.open(**told_prompt(engine, subject.seed), seed=subject.seed, size=size)
    with opened as session, open_sink(wanted.sink, engine, size) as sink, driven(engine):
        before = time.perf_counter()
        for index, block in enumerate(islice(session.stream(), most)):
            sink.add(shown(block))
            now = time.perf_counter()
            arrived |= {ack.id: now for ack in block.acks}
            if len(arrived) == wanted.controls:
                return [arrived[control] - asked[control] for control in sorted(arrived)]
            if index >= full and len(asked) == len(arrived):
                time.sleep((len(asked) + 0.5) / wanted.controls * (now - before))
                given = time.perf_counter()
                control = steps[len(asked)](session)
                asked[control] = given
            before = now
    raise InferixError(f"{len(arrived)} of {wanted.controls} controls showed within {most} blocks")


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
    """`count` sessions in turns at their full windows: frames a second of all, each one's intervals, and how those
    fare who watch.
    """
    tell(f"{count} session{'s' if count > 1 else ''} at a time")
    seen = watch(engine, wanted, count)
    seconds = max(one.arrivals[-1] for one in seen) - max(one.arrivals[0] for one in seen)
    return {
        "sessions": count, "fps": sum(sum(one.frames[1:]) for one in seen) / seconds,
        "intervals": [interval for one in seen for interval in one.intervals],
        **viewers([one.playout(engine.fps) for one in seen]),
    }  # fmt: skip


def batches(engine: Engine, wanted: Wanted, tell: Tell) -> list[dict[str, Any]]:
    """Seconds in which 1 to N sessions get a block each, in turns and as one batch.

    The seconds are of the network, without pictures, and are kept in the file. The curve ends before a batch that
    memory does not suffice for.
    """
    assert wanted.batches is not None
    size = wanted.subject.size or engine.default_size
    found, seconds = [], dict[int, float]()
    for count in range(1, wanted.sessions + 1):
        engine.follow_times(size, BatchProfile({1: math.inf, count: 1.0}))  # all of them, or each by itself
        taken = batch_seconds(engine, wanted, count, tell)
        if engine.metrics()["counters"].get("batches_split"):
            tell(f"{count} sessions did not fit as one batch; no time of it is kept")
            break
        seconds[count] = taken
        found.append({"sessions": count, "turns": count * seconds[1], "batch": seconds[count]})
    times = BatchProfile(seconds)
    engine.follow_times(size, times)
    save_profile(wanted.batches, engine.timed_on, size, times)
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
    """So many minutes of video, or as much as tenths at a full window take: each block's interval, the processor's time
    in it, and the memory after it, and all of them by tenths of the run. Processor's time is this process's alone,
    whatever else the machine does.
    """
    assert wanted.minutes is not None
    subject = wanted.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    blocks = max(engine.blocks_for(wanted.minutes * 60), full + 2 * TENTHS)
    tell(f"a long run of {blocks} blocks")
    intervals, worked, process, device, frames = [], [], [], [], []
    opened = engine.open(**told_prompt(engine, subject.seed), seed=subject.seed, size=size)
    with opened as session, open_sink(wanted.sink, engine, size) as sink, driven(engine):
        before, cpu = time.perf_counter(), time.process_time()
        for block in islice(session.stream(), blocks):
            sink.add(shown(block))
            now, cpu_now = time.perf_counter(), time.process_time()
            intervals.append(now - before)
            worked.append(cpu_now - cpu)
            before, cpu = now, cpu_now
            frames.append(len(shown(block)))
            process.append(process_memory() or 0)
            device.append(torch.cuda.memory_allocated(engine.device) if engine.device.type == "cuda" else 0)
    steady = slice(full, None)
    return {
        "minutes": round(sum(frames) / engine.fps / 60, 2), "blocks": blocks, "blocks_before_full": full,
        "intervals": intervals, "processor_seconds": worked,
        "process_memory": process, "device_memory": device if any(device) else None,
        "interval_by_tenth": [statistics.median(part) for part in tenths(intervals[steady])],
        "processor_seconds_by_tenth": [statistics.median(part) for part in tenths(worked[steady])],
        "process_memory_by_tenth": [max(part) for part in tenths(process[steady])],
        "device_memory_by_tenth": [max(part) for part in tenths(device[steady])] if any(device) else None,
        **viewers([play_out([*accumulate(intervals)], [count / engine.fps for count in frames])]),
    }  # fmt: skip


def tenths(values: Sequence[float]) -> list[Sequence[float]]:
    """Ten parts in order, as even as can be."""
    edges = [len(values) * part // TENTHS for part in range(TENTHS + 1)]
    return [values[begin:end] for begin, end in pairwise(edges)]
