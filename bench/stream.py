"""Stream benchmark: end-to-end times from a prompt or a control to pixels on the sink.

Cold starts run in processes of their own, before this one loads anything. All other parts share one engine, which one
thread runs and another reads, as in a server: a stream at its full window, the latency of controls, one to N sessions,
and a long run that shows whether speed and memory stay constant.
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
from types import TracebackType
from typing import Any, Final, Self

import torch

from ..errors import InferixError, UsageError, quoted
from ..runtime.config import EngineConfig
from ..runtime.engine import Engine
from ..runtime.executor_specs import names_with
from ..runtime.media import VideoWriter
from ..runtime.sessions.batch_profile import BatchProfile, save_profile
from ..runtime.sessions.output_queue import Block
from ..runtime.sessions.session import Session
from ..runtime.sinks import Frames, Pump, Sink
from .baseline import BlockOutput
from .candidates import block_output, check_executor, executor_candidate, make_checker
from .machine import environment, measure_ceilings, process_memory
from .result import Result, Series
from .subject import (
    Subject,
    check_memory,
    describe,
    end_ranks,
    engine_settings,
    open_engine,
    prompt_arguments,
    prompt_rows,
    random_prompt,
    uses_fewer_bits,
)
from .work import blocks_until_full

Log = Callable[[str], None]
SINKS = ("memory", "mp4")
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # folders of compiled kernels
TENTHS = 10
BLOCKS_PER_CONTROL = 8  # within which a control must show; two or three are usual
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
class Options:
    """Options of a run; raises UsageError for a value out of range.

    blocks: blocks timed at a full window. starts: cold processes. controls: prompts sent at different moments.
    sessions: the largest number of sessions; all smaller ones are timed as well. minutes: of video in the long run,
    None for no long run. batches: file to write times of batched sessions to, None to run sessions only in turns.
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
                raise UsageError(f"{key} is {getattr(self, key)}; expected {least} or more")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"minutes is {self.minutes}; expected a number above 0")
        if self.batches is not None and self.sessions < 2:
            raise UsageError(f"sessions is {self.sessions}; batches needs 2 or more to write times of")
        if self.sink not in SINKS:
            raise UsageError(f"sink is {quoted(self.sink)}; expected {' or '.join(SINKS)}")


class MemorySink:
    """Sink that counts frames in host memory and drops them."""

    when_full: Final = "wait"
    full = False

    def __init__(self) -> None:
        self.frames = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: there is no output."""

    def add(self, frames: Frames) -> None:
        self.frames += len(frames)


class TemporaryVideo(VideoWriter):
    """A video in a temporary folder, removed at the end."""

    def __init__(self, fps: float, size: tuple[int, int]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        super().__init__(Path(self.folder.name) / "video.mp4", fps, size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.folder:
            super().__exit__(kind, error, trace)


def make_sink(kind: str, engine: Engine, size: tuple[int, int]) -> Sink:
    """A sink of `SINKS` for frames of `size` (width, height)."""
    return MemorySink() if kind == "memory" else TemporaryVideo(engine.fps, size)


@dataclass(frozen=True)
class Playout:
    """Waits of a viewer who starts with the first block and stops whenever the next is not ready.

    late: blocks that arrived after the end of the one before. waited: seconds in total. longest: seconds at once.
    """

    late: int
    waited: float
    longest: float


def play_out(arrivals: Sequence[float], seconds: Sequence[float]) -> Playout:
    """Compute a viewer's waits. arrivals: time of each block on the sink, s; seconds: duration of its frames."""
    waits = []
    ends = arrivals[0] + seconds[0]
    for arrived, lasting in zip(arrivals[1:], seconds[1:], strict=True):
        if arrived > ends:
            waits.append(arrived - ends)
        ends = max(ends, arrived) + lasting
    return Playout(len(waits), sum(waits), max(waits, default=0.0))


def run(options: Options, log: Log) -> Result:
    """Run all parts.

    Raises UsageError for options that cannot be measured, InferixError for a start that fails and for wrong outputs.
    """
    subject, series = options.subject, dict[str, Series]()
    config = check(options)
    begun = environment(config.device)
    for name, marks in cold_starts(options, log).items():
        series |= start_series(name, marks)
    engine = open_engine(subject)
    try:
        return measure(engine, options, begun, series, log)
    finally:
        end_ranks(engine)


def measure(
    engine: Engine, options: Options, begun: dict[str, Any], series: dict[str, Series], log: Log
) -> Result:
    """Run all parts that share one engine. begun: environment at the beginning. series: of cold starts, to add to."""
    subject, config, executor = options.subject, engine.config, engine.config.executor
    if engine.layout_reason is not None:
        log(f"parallel={config.parallel}: {engine.layout_reason}")
    log("measuring the machine's ceilings")
    ceilings = measure_ceilings(config.device, engine.dtype, config.lowp)
    rows, first = prompt_rows(engine, subject.seed), blocks_until_full(engine.preset) + 2
    checker = make_checker(engine, rows, subject, [True] * first)
    candidate = executor_candidate(engine, executor, rows, subject)
    facts: dict[str, Any] = {"sink": options.sink, "check": check_executor(checker, candidate)}
    log(f"{executor}: outputs match (difference {facts['check']['difference']:.1e})")
    log(f"a stream, {options.blocks} blocks at its full window")
    (steady,) = time_streams(engine, options, 1, first)
    if wrong := checker.refusal(candidate, steady.first):
        raise InferixError(f"executor {quoted(executor)} is refused and its times are discarded: {wrong}")
    series[f"{executor}/interval"] = Series("s", tuple(steady.intervals))
    facts["stream"] = steady.facts(engine)
    if options.controls:
        series[f"{executor}/control to pixel"] = Series("s", tuple(time_controls(engine, options, log)))
    facts["sessions"] = [time_sessions(engine, options, count, log) for count in range(1, options.sessions + 1)]
    if options.batches is not None:
        facts["batches"] = time_batches(engine, options, log)
    if options.minutes is not None:
        facts["long"] = long_run(engine, options, log)
    about, settings = describe(engine, subject)
    chosen = {key: getattr(options, key) for key in ("blocks", "starts", "controls", "sessions", "minutes", "sink")}
    return Result(
        kind="stream", clock=CLOCK, environment=begun, subject=about, settings=settings | chosen, ceilings=ceilings,
        series=series, facts=facts,
    )  # fmt: skip


def check(options: Options) -> EngineConfig:
    """Config of the engine. Raises UsageError for options that cannot be measured, before any measurement."""
    config, preset = engine_settings(options.subject)
    blocks_until_full(preset)
    check_memory(options.subject)
    if uses_fewer_bits(config) and not config.executor_spec.fast_lowp:
        raise UsageError(
            f"executor {quoted(config.executor)} in low precision is only a slow reference; choose "
            f"{names_with(lambda spec: spec.fast_lowp)}"
        )
    if options.batches is not None and not config.executor_spec.batches:
        raise UsageError(
            f"executor {quoted(config.executor)} runs no batches; choose {names_with(lambda spec: spec.batches)}, or "
            "leave batches out"
        )
    return config


@contextmanager
def run_in_thread(engine: Engine) -> Iterator[None]:
    """Run the engine in another thread, so that this one reads blocks as soon as they are finished."""
    engine.hand_over()
    thread = threading.Thread(target=engine.run, kwargs={"keep": True}, name="inferix-bench-engine")
    thread.start()
    engine.soon(lambda: None).result()  # returns when that thread owns the engine
    try:
        yield
    finally:
        engine.halt()
        thread.join()


def cold_starts(options: Options, log: Log) -> dict[str, list[dict[str, float]]]:
    """Time stamps of processes that start with empty caches (cold), and with those of an earlier process (stored)."""
    graphs = engine_settings(options.subject)[0].executor_spec.graphs
    marks: dict[str, list[dict[str, float]]] = {"cold": [], "stored": []}
    for index in range(options.starts):
        with tempfile.TemporaryDirectory() as folder:
            for name in marks:
                if name == "stored" and not any(Path(folder).iterdir()):
                    continue  # nothing was stored, so a second start would be cold as well
                log(f"start {index + 1} of {options.starts}, {name}")
                stored = f"{folder}/graphs" if graphs else None
                marks[name].append(start(replace(options.subject, graphs=stored), folder))
    return {name: starts for name, starts in marks.items() if starts}


def start(subject: Subject, caches: str) -> dict[str, float]:
    """Start one process; return its time stamps, s, with `asked` before the start. Raises InferixError if it fails."""
    command = [sys.executable, "-m", "inferix.bench.first_frame", json.dumps(vars(subject))]
    env = os.environ | dict.fromkeys(CACHES, caches)
    asked = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InferixError(f"a cold start failed: {done.stderr.strip()[-600:]}")
    marks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"asked": asked} | marks


def start_series(name: str, marks: list[dict[str, float]]) -> dict[str, Series]:
    """Seconds to the first frame of each start, in total and by stage."""
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
class TimedStream:
    """A stream at its full window: arrival, s, and number of frames of each block. first: outputs of earlier blocks."""

    arrivals: tuple[float, ...]
    frames: tuple[int, ...]
    first: tuple[BlockOutput, ...] = ()

    @property
    def intervals(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def fps(self) -> float:
        """Frames per second: those of all blocks but the first, over the time from the first block to the last."""
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
    """Late blocks and seconds waited of all viewers in total, and the longest wait."""
    return {
        "late_blocks": sum(one.late for one in playouts), "waited": sum(one.waited for one in playouts),
        "longest_wait": max(one.longest for one in playouts),
    }  # fmt: skip


def time_streams(engine: Engine, options: Options, count: int, first: int = 0) -> list[TimedStream]:
    """Time `count` streams, each with its own sink, for `blocks` blocks after the window is full.

    The streams are endless, so the engine computes the next blocks when the clock stops. first: number of blocks from
    the beginning to return.
    """
    subject = options.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    prompt = prompt_arguments(engine, subject.seed)
    arrivals, frames, head = ([list[Any]() for _ in range(count)] for _ in range(3))
    with ExitStack() as stack:
        opened = [
            stack.enter_context(engine.open(**prompt, seed=subject.seed + index, size=size)) for index in range(count)
        ]
        streams = [
            stack.enter_context(Pump(session.stream(), make_sink(options.sink, engine, size))) for session in opened
        ]
        stack.enter_context(run_in_thread(engine))
        for number in range(full + options.blocks + 1):
            for index, stream in enumerate(streams):
                block = next(stream)
                if number >= full:
                    arrivals[index].append(time.perf_counter())
                    frames[index].append(len(frames_of(block)))
                if number < first:
                    head[index].append(block)
    return [
        TimedStream(tuple(times), tuple(counts), tuple(map(block_output, blocks)))
        for times, counts, blocks in zip(arrivals, frames, head, strict=True)
    ]


def time_controls(engine: Engine, options: Options, log: Log) -> list[float]:
    """Seconds from each of `controls` controls to the first block on the sink that shows it.

    Controls are sent one at a time, at moments spread over a block. Raises InferixError if one never shows.
    """
    subject = options.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    log(f"{options.controls} controls to pixels")
    asked, arrived = dict[int, float](), dict[int, float]()
    senders = [control_sender(engine, index) for index in range(options.controls)]
    limit = full + 1 + BLOCKS_PER_CONTROL * options.controls
    opened = engine.open(**prompt_arguments(engine, subject.seed), seed=subject.seed, size=size)
    sink = make_sink(options.sink, engine, size)
    with opened as session, Pump(session.stream(), sink) as stream, run_in_thread(engine):
        before = time.perf_counter()
        for index, block in enumerate(islice(stream, limit)):
            now = time.perf_counter()
            arrived |= {ack.id: now for ack in block.acks}
            if len(arrived) == options.controls:
                return [arrived[control] - asked[control] for control in sorted(arrived)]
            if index >= full and len(asked) == len(arrived):
                time.sleep((len(asked) + 0.5) / options.controls * (now - before))
                sent = time.perf_counter()
                control = senders[len(asked)](session)
                asked[control] = sent
            before = now
    raise InferixError(f"{len(arrived)} of {options.controls} controls showed within {limit} blocks")


def control_sender(engine: Engine, index: int) -> Callable[[Session], int]:
    """Function that sends an action, or a prompt to a model without actions, and returns the control's id."""
    if actions := engine.spec.actions:
        return lambda session: session.act(actions[index % len(actions)])
    rows = random_prompt(engine, index)
    return lambda session: session.prompt(embeds=rows)


def frames_of(block: Block) -> Frames:
    """Frames of a decoded block."""
    assert block.frames is not None
    return block.frames


def time_sessions(engine: Engine, options: Options, count: int, log: Log) -> dict[str, Any]:
    """Time `count` sessions in turns at full windows: FPS of all together, all intervals, and the viewers' waits."""
    log(f"{count} session{'s' if count > 1 else ''} at a time")
    streams = time_streams(engine, options, count)
    seconds = max(one.arrivals[-1] for one in streams) - max(one.arrivals[0] for one in streams)
    return {
        "sessions": count, "fps": sum(sum(one.frames[1:]) for one in streams) / seconds,
        "intervals": [interval for one in streams for interval in one.intervals],
        **viewers([one.playout(engine.fps) for one in streams]),
    }  # fmt: skip


def time_batches(engine: Engine, options: Options, log: Log) -> list[dict[str, Any]]:
    """Seconds for a block of each of 1 to N sessions, in turns and as one batch.

    The seconds are of the network, without decoding, and are written to the file `batches`. The curve ends before the
    first batch that memory cannot hold.
    """
    assert options.batches is not None
    size = options.subject.size or engine.default_size
    points, seconds = [], dict[int, float]()
    for count in range(1, options.sessions + 1):
        engine.follow_times(size, BatchProfile({1: math.inf, count: 1.0}))  # all of them, or each by itself
        measured = batch_seconds(engine, options, count, log)
        if engine.metrics()["counters"].get("batches_split"):
            log(f"{count} sessions did not fit as one batch; its time is left out")
            break
        seconds[count] = measured
        points.append({"sessions": count, "turns": count * seconds[1], "batch": seconds[count]})
    times = BatchProfile(seconds)
    engine.follow_times(size, times)
    save_profile(options.batches, engine.timed_on, size, times)
    return points


def batch_seconds(engine: Engine, options: Options, count: int, log: Log) -> float:
    """Median seconds from the start of a block to the end of its passes, at full windows, in a batch of `count`."""
    subject = options.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    log(f"a batch of {count}, without decoding")
    prompt = prompt_arguments(engine, subject.seed)
    seconds = []
    with ExitStack() as stack:
        opened = [engine.open(**prompt, seed=subject.seed + index, size=size) for index in range(count)]
        blocks = full + options.blocks
        streams = [stack.enter_context(session).stream(blocks, decode=False) for session in opened]
        for index in range(blocks):
            records = [next(stream).record for stream in streams]
            spans = [record.spans for record in records if record.batch == count and index >= full]
            seconds += [span["commit"][1] - span["encode"][0] for span in spans]
    return statistics.median(seconds)


def long_run(engine: Engine, options: Options, log: Log) -> dict[str, Any]:
    """Stream `minutes` minutes of video, or the least that has ten tenths at a full window.

    Returns the interval, this process's CPU seconds and its memory of each block, and all of them by tenths of the run.
    """
    assert options.minutes is not None
    subject = options.subject
    size, full = subject.size or engine.default_size, blocks_until_full(engine.preset)
    blocks = max(engine.blocks_for(options.minutes * 60), full + 2 * TENTHS)
    log(f"a long run of {blocks} blocks")
    intervals, cpu_seconds, process, device, frames = [], [], [], [], []
    opened = engine.open(**prompt_arguments(engine, subject.seed), seed=subject.seed, size=size)
    sink = make_sink(options.sink, engine, size)
    with opened as session, Pump(session.stream(), sink) as stream, run_in_thread(engine):
        before, cpu = time.perf_counter(), time.process_time()
        for block in islice(stream, blocks):
            now, cpu_now = time.perf_counter(), time.process_time()
            intervals.append(now - before)
            cpu_seconds.append(cpu_now - cpu)
            before, cpu = now, cpu_now
            frames.append(len(frames_of(block)))
            process.append(process_memory() or 0)
            device.append(torch.cuda.memory_allocated(engine.device) if engine.device.type == "cuda" else 0)
    steady = slice(full, None)
    return {
        "minutes": round(sum(frames) / engine.fps / 60, 2), "blocks": blocks, "blocks_before_full": full,
        "intervals": intervals, "processor_seconds": cpu_seconds,
        "process_memory": process, "device_memory": device if any(device) else None,
        "interval_by_tenth": [statistics.median(part) for part in tenths(intervals[steady])],
        "processor_seconds_by_tenth": [statistics.median(part) for part in tenths(cpu_seconds[steady])],
        "process_memory_by_tenth": [max(part) for part in tenths(process[steady])],
        "device_memory_by_tenth": [max(part) for part in tenths(device[steady])] if any(device) else None,
        **viewers([play_out([*accumulate(intervals)], [count / engine.fps for count in frames])]),
    }  # fmt: skip


def tenths(values: Sequence[float]) -> list[Sequence[float]]:
    """Split into ten parts of nearly equal length, in order."""
    edges = [len(values) * part // TENTHS for part in range(TENTHS + 1)]
    return [values[begin:end] for begin, end in pairwise(edges)]
