"""Inputs run in forked processes with limits, so that a hang, a crash or a flood of memory ends one process alone.

The outcome of an input is right if the call returns, or raises one of the reader's own errors with a short message.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from time import monotonic
from types import CodeType
from typing import Any

from av.error import FFmpegError

from inferix.errors import no_memory

from .mutations import Files, mutate
from .readers import Reader

LONGEST_MESSAGE = 4000  # characters
BAD = ("raw", "hang", "memory", "file", "code")  # outcomes that are failures
BATCH = 250  # inputs of one process
FORK: Any = get_context("fork")


@dataclass(frozen=True)
class Limits:
    """Of one input. seconds: of CPU time. wall: of real time, for calls that wait. nbytes: of memory."""

    seconds: float = 5.0
    wall: float = 120.0
    nbytes: int = 1 << 30


@dataclass(frozen=True)
class Failure:
    reader: str
    number: int
    kind: str  # of BAD
    detail: str

    @property
    def cause(self) -> tuple[str, ...]:
        """Equal for failures of one fault: the last line of the message cut, and where it was raised."""
        lines = [line.strip() for line in self.detail.splitlines() if line.strip()]
        places = [line for line in lines if line.startswith('File "')]
        return self.reader, self.kind, lines[-1][:40] if lines else "", places[-1] if places else ""


@dataclass
class Tally:
    """Of one reader."""

    inputs: int = 0
    structured: int = 0
    seconds: float = 0.0  # of real time in its processes
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, ...], Failure] = field(default_factory=dict)

    def add(self, failure: Failure) -> None:
        self.outcomes[failure.kind] += 1
        self.failures.setdefault(failure.cause, failure)


@dataclass
class Sample:
    """A reader's valid files, and the folder in which each process has damaged ones."""

    reader: Reader
    files: Files
    home: Path

    @classmethod
    def make(cls, reader: Reader, home: Path) -> Sample:
        folder = home / reader.name / "case"
        reader.make(folder)
        return cls(reader, contents(folder), home / reader.name)

    def input(self, seed: int, number: int) -> tuple[Files, bool]:
        """The files of an input, and whether their structure was respected: that of every second one."""
        structured = number % 2 == 0
        random = Random(f"{seed}/{self.reader.name}/{number}")
        return mutate(self.files, self.reader.targets or tuple(sorted(self.files)), structured, random), structured


def contents(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in sorted(names_in(folder))}


def names_in(folder: Path) -> set[str]:
    """Paths of the files below a folder, relative to it."""
    return {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}


# in the process of the inputs


class Watch:
    """Files made and code run by calls, by Python's audit events; in effect between `start` and `stop`."""

    MADE = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.remove", "os.rmdir", "os.chmod")
    RUN = (
        "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
        "socket.connect",
    )  # fmt: skip

    def __init__(self) -> None:
        self.active = False
        self.events: list[tuple[str, str]] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not isinstance(path, int) and os.fspath(path) not in (os.devnull, b"/dev/null"):
                self.note("file", event, arguments)
        elif event in self.MADE:
            self.note("file", event, arguments)
        elif event in self.RUN or (event in ("exec", "compile") and made_of_text(event, arguments) and not importing()):
            self.note("code", event, arguments)

    def note(self, kind: str, event: str, arguments: tuple[Any, ...]) -> None:
        self.active = False  # `repr` may open files
        self.events.append((kind, f"{event} {str(arguments)[:300]}\n{''.join(traceback.format_stack(limit=12)[:-2])}"))
        self.active = True


def made_of_text(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether code comes from a text and not from a file of a library."""
    if event == "compile":
        source, name = arguments
        return source is not None and str(name).startswith("<")
    return isinstance(arguments[0], CodeType) and arguments[0].co_filename.startswith("<")


LIBRARY_CODE = ("/dataclasses.py", "/collections/__init__.py", "/typing.py", "importlib._bootstrap", "/re/", "/ast.py")


def importing() -> bool:
    """Whether a library is being imported, or makes a class of its own, somewhere up the stack."""
    frame = sys._getframe()
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in LIBRARY_CODE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Worker:
    """Runs inputs of one reader and sends (number, structured, outcome, detail) of each."""

    def __init__(self, sample: Sample, seed: int, limits: Limits, connection: Connection) -> None:
        self.sample, self.seed, self.limits, self.connection = sample, seed, limits, connection
        self.case, self.sentinel = sample.home / "case", sample.home / "sentinel"

    def run(self, first: int, stop: int) -> None:
        self.prepare()
        kind, detail = self.outcome()
        if kind != "accepted":
            self.connection.send((-1, False, "sample", f"the valid sample is {kind}: {detail}"))
            return
        watch = self.watch = Watch()
        self.most = peak() + self.limits.nbytes
        # Above the limit of resident memory, so that an excess is measured, and under what harms the machine.
        resource.setrlimit(resource.RLIMIT_AS, (virtual() + 2 * self.limits.nbytes,) * 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        before: Files = self.sample.files
        for number in range(first, stop):
            files, structured = self.sample.input(self.seed, number)
            for name in {*changed(before, files), *changed(self.sample.files, files)}:
                replace(self.case / name, files[name])
            before = files
            watch.events = []
            signal.setitimer(signal.ITIMER_PROF, self.limits.seconds)
            watch.active = True
            kind, detail = self.outcome()
            watch.active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            kind, detail = self.seen(files, kind, detail)
            self.connection.send((number, structured, kind, detail))
            if kind in BAD:
                return  # a new process goes on: this one's memory or modules may be damaged

    def prepare(self) -> None:
        """Quiet, in a folder of its own, in which also temporary files and caches would appear."""
        gc.freeze()  # garbage of the process that forked is not finalised here, where its threads do not exist
        self.sentinel.mkdir(exist_ok=True)
        for path in self.sentinel.iterdir():
            path.unlink()
        with open(os.devnull, "r+b", buffering=0) as nothing:
            for handle in (0, 1, 2):
                os.dup2(nothing.fileno(), handle)
        os.chdir(self.sentinel)
        for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME"):
            os.environ[name] = str(self.sentinel)
        tempfile.tempdir = None
        faulthandler.disable()
        sys.dont_write_bytecode = True
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name in names_in(self.case) - self.sample.files.keys():
            (self.case / name).unlink()
        for name, content in self.sample.files.items():
            replace(self.case / name, content)

    def outcome(self) -> tuple[str, str]:
        reader = self.sample.reader
        try:
            reader.call(self.case)
        except reader.refusals as error:
            # FFmpeg has one error for memory that ran out and for sizes that it refuses to allocate.
            if any(no_memory(cause) and not isinstance(cause, FFmpegError) for cause in causes(error)):
                return "memory", traceback.format_exc(limit=-8)
            length = len(str(error))
            return ("raw", f"a message of {length} characters") if length > LONGEST_MESSAGE else ("refused", "")
        except BaseException as error:  # Rust's panics are no Exception
            kind = "memory" if isinstance(error, Exception) and no_memory(error) else "raw"
            return kind, traceback.format_exc(limit=-8)
        return "accepted", ""

    def seen(self, files: Files, kind: str, detail: str) -> tuple[str, str]:
        """The outcome, or what else the call did."""
        names = os.listdir(self.sentinel)
        if names or names_in(self.case) != files.keys():
            return "file", f"made {names or 'a file beside the input'} {self.watch.events[:1]}"
        if self.watch.events:
            return self.watch.events[0]
        if peak() > self.most:
            return "memory", f"{(peak() - self.most + self.limits.nbytes) >> 20} MiB more than before"
        return kind, detail


def changed(one: Files, other: Files) -> list[str]:
    return [name for name in other if one.get(name) is not other[name]]


def replace(path: Path, content: bytes) -> None:
    """Write a new file: tensors of an earlier input may still be mapped from the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def causes(error: BaseException | None) -> Iterator[Exception]:
    while error is not None:
        if isinstance(error, Exception):
            yield error
        error = error.__cause__ or error.__context__


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def virtual() -> int:
    """Address space of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def work(sample: Sample, seed: int, limits: Limits, first: int, stop: int, connection: Connection) -> None:
    Worker(sample, seed, limits, connection).run(first, stop)
    connection.close()


# in the process that reports


class Job:
    """A process that runs inputs `next` to `stop` of a sample."""

    def __init__(self, sample: Sample, seed: int, limits: Limits, first: int, stop: int) -> None:
        self.sample, self.next, self.stop, self.limits = sample, first, stop, limits
        self.connection, other = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=work, args=(sample, seed, limits, first, stop, other))
        self.began = self.heard = monotonic()
        self.process.start()
        other.close()

    def end(self) -> int:
        """The exit code of the process, which is over or stuck."""
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        return int(self.process.exitcode)


def run(
    samples: Iterable[Sample], seed: int, limits: Limits, inputs: int, until: float | None, processes: int,
    report: Callable[[dict[str, Tally]], None] = lambda tallies: None,
) -> dict[str, Tally]:  # fmt: skip
    """Run `inputs` of each reader, or as many as there is time for `until` a moment of `monotonic`, evenly."""
    todo = {sample.reader.name: sample for sample in samples}
    tallies = {name: Tally() for name in todo}
    jobs: list[Job] = []
    while True:
        idle = todo.keys() - {job.sample.reader.name for job in jobs}
        for name in sorted(idle, key=lambda name: (tallies[name].inputs, name))[: processes - len(jobs)]:
            done = tallies[name].inputs
            if done < inputs and (until is None or monotonic() < until):
                jobs.append(Job(todo[name], seed, limits, done, min(inputs, done + BATCH)))
            elif done >= inputs:
                del todo[name]
        if not jobs:
            if not todo or (until is not None and monotonic() >= until):
                return tallies
            continue
        ready = wait([job.connection for job in jobs], timeout=0.2)
        for job in list(jobs):
            tally = tallies[job.sample.reader.name]
            if job.connection in ready:
                over = not receive(job, tally)
            else:
                over = monotonic() - job.heard > limits.wall
                if over:
                    job.process.kill()
            if over:
                jobs.remove(job)
                conclude(job, tally)
                report(tallies)


def receive(job: Job, tally: Tally) -> bool:
    """Take one message; False at the end of the process."""
    try:
        number, structured, kind, detail = job.connection.recv()
    except EOFError:
        return False
    if kind == "sample":
        raise RuntimeError(f"{job.sample.reader.name}: {detail}")
    job.next, job.heard = number + 1, monotonic()
    count(tally, structured)
    if kind in BAD:
        tally.add(Failure(job.sample.reader.name, number, kind, detail))
    else:
        tally.outcomes[kind] += 1
    return True


def conclude(job: Job, tally: Tally) -> None:
    """Attribute the end of a process that died or was stuck to the input that it had not reported."""
    late = monotonic() - job.heard > job.limits.wall
    code = job.end()
    tally.seconds += monotonic() - job.began
    if code == 0:
        return
    count(tally, job.next % 2 == 0)
    hung = late or code == -signal.SIGPROF
    limit = f"{job.limits.wall:g} s" if late else f"{job.limits.seconds:g} s of CPU time"
    detail = f"no answer within {limit}" if hung else f"the process ended with {code}: {signal_name(code)}"
    tally.add(Failure(job.sample.reader.name, job.next, "hang" if hung else "raw", detail))


def count(tally: Tally, structured: bool) -> None:
    tally.inputs += 1
    tally.structured += structured


def signal_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else "an error outside of the call"
