"""Drive one engine from many threads for minutes: `make soak MINUTES=10 SEED=0`, or this file with `--help`.

Clients open, stream, fork, rewind, save and restore sessions; others send controls; some decoders and observers fail.
Exit code 1 after a wait that does not end, an error that nobody planted, wrong page counts, or memory that grows.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tools")]

from oracles import ROWS, SIZE, make_engine  # noqa: E402

from inferix.errors import AtCapacity, InferixError, SessionEnded  # noqa: E402
from inferix.runtime.limits import Limits  # noqa: E402
from inferix.runtime.sessions.session import Session  # noqa: E402

T = TypeVar("T")

WAIT = 120.0  # seconds after which a wait is a deadlock
PROMPTS = (ROWS.float(), ROWS.flip(0).float() * 1.5)
GROWTH = 64 << 20  # bytes that memory may grow after the first tenth of the time


class Planted(Exception):
    """An error of a decoder or an observer that fails on purpose."""


@dataclass
class Figures:
    """counts: of what was done. faults: what must not happen. rss: (seconds, bytes), each second."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)

    def memory(self, share: float) -> int:
        """Bytes in use after a share of the time."""
        return self.rss[min(len(self.rss) - 1, int(share * len(self.rss)))][1]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Client:
    """One thread that works with sessions of its own, through `engine.soon`."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak, self.engine, self.figures = soak, soak.engine, soak.figures
        self.random = Random(f"{soak.seed}/{number}")
        self.path = soak.folder / f"{number}.safetensors"

    def soon(self, call: Callable[[], T]) -> T:
        future: Future[T] = self.engine.soon(call)
        return future.result(WAIT)

    def run(self) -> None:
        while not self.soak.over.is_set():
            try:
                self.life()
            except Planted:
                self.figures.count("sessions failed on purpose")
            except AtCapacity:
                self.figures.count("refused for room")
            except SessionEnded:
                self.figures.count("ended")
            except InferixError as error:
                self.figures.fault(f"{type(error).__name__}: {error}")
            except Exception:  # of any kind: it is a fault to report, and the others go on
                self.figures.fault(traceback.format_exc(limit=-6))

    def life(self) -> None:
        """One session from its opening to its end."""
        random, seed = self.random, self.random.randrange(4)
        session = self.soon(lambda: self.engine.open(prompt_embeds=PROMPTS[0], size=SIZE, seed=seed))
        sessions = [session]
        self.figures.count("sessions")
        try:
            self.soak.add(session)
            fails = random.random() < 0.2
            for _ in range(random.randint(1, 5)):
                action = random.choice(("stream", "stream", "prompt", "fork", "rewind", "save", "restore", "stop"))
                self.figures.count(action)
                if action == "stream":
                    self.stream(random.choice(sessions), fails)
                elif action == "prompt":
                    session.prompt(embeds=random.choice(PROMPTS))
                elif action == "fork":
                    sessions.append(self.soon(session.fork))
                elif action == "rewind" and session.next_block > 1:
                    self.soon(lambda: session.rewind(session.next_block - 1))
                elif action == "save":
                    self.soon(lambda: session.save(self.path))
                elif action == "restore" and self.path.exists():
                    sessions.append(self.soon(lambda: Session.restore(self.engine, self.path)))
                elif action == "stop":
                    session.stop()
                    break
        finally:
            self.soak.remove(session)
            for one in sessions:
                self.soon(partial(self.close, one))

    def close(self, session: Session) -> None:
        if not session.closed:  # one that was stopped closes itself, between two blocks
            session.close()

    def stream(self, session: Session, fails: bool) -> None:
        if fails:
            decoder = session.current.decoder

            def decode(block: int, latents: Any) -> Any:
                raise Planted

            decoder.decode = decode  # type: ignore[method-assign]
        for _ in session.stream(self.random.randint(1, 3), decode=fails or self.random.random() < 0.7):
            self.figures.count("blocks")


class Soak:
    """An engine, the thread that drives it, its clients, and a thread of controls."""

    def __init__(self, seed: int, clients: int, folder: Path) -> None:
        self.seed, self.folder, self.figures = seed, folder, Figures()
        limits = Limits(sessions=3 * clients, when_full="refuse", queue_blocks=2)
        settings = {"local_attn_size": 6, "denoising_step_list": [1000], "rewind_blocks": 2}
        self.engine: Any = make_engine("longlive", "float32", limits=limits, **settings)
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.open: list[Session] = []
        self.clients = [Client(self, number) for number in range(clients)]

    def add(self, session: Session) -> None:
        with self.lock:
            self.open.append(session)

    def remove(self, session: Session) -> None:
        with self.lock:
            if session in self.open:
                self.open.remove(session)

    def send_controls(self) -> None:
        """Prompts, pauses and resumes, for any session, and integrity checks between blocks."""
        random = Random(f"{self.seed}/controls")
        while not self.over.is_set():
            time.sleep(0.02)
            with self.lock:
                session = random.choice(self.open) if self.open else None
            try:
                if session is not None and random.random() < 0.7:
                    session.pause()
                    session.resume()
                    self.figures.count("pauses")
                elif session is not None:
                    session.prompt(embeds=random.choice(PROMPTS))
                    self.figures.count("prompts")
                if random.random() < 0.05:
                    self.engine.soon(self.engine.check_integrity).result(WAIT)
                    self.figures.count("integrity checks")
            except SessionEnded:
                self.figures.count("controls to ended sessions")
            except Exception:  # of any kind: it is a fault to report
                self.figures.fault(traceback.format_exc(limit=-6))

    def observe(self, record: dict[str, Any]) -> None:
        if record.get("block", 0) % 7 == 3:
            raise Planted

    def drive(self) -> None:
        try:
            self.engine.run(keep=True)
        except Exception:  # of any kind: it is a fault to report
            self.figures.fault(traceback.format_exc(limit=-8))

    def run(self, seconds: float, report: Callable[[Figures], None]) -> Figures:
        """Run for some time, end everything, and check that nothing is left."""
        self.engine.hand_over()
        self.engine.observe(self.observe)
        threads = [threading.Thread(target=self.drive, name="engine", daemon=True)]
        for number, client in enumerate(self.clients):
            threads.append(threading.Thread(target=client.run, name=f"client {number}", daemon=True))
        threads.append(threading.Thread(target=self.send_controls, name="controls", daemon=True))
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        while (passed := time.monotonic() - begun) < seconds:
            self.figures.rss.append((passed, resident()))
            report(self.figures)
            time.sleep(min(1.0, seconds / 20))
        self.over.set()
        for thread in threads[1:]:
            thread.join(WAIT)
        self.engine.halt()
        threads[0].join(WAIT)
        if stuck := [thread.name for thread in threads if thread.is_alive()]:
            faulthandler.dump_traceback(all_threads=True)
            self.figures.fault(f"threads that do not end: {', '.join(stuck)}")
            return self.figures
        self.engine.hand_over()
        try:
            self.engine.check_integrity()
        except InferixError as error:
            self.figures.fault(str(error))
        left = len(self.engine.manager.sessions), self.engine.manager.pages_in_use
        if any(left):
            self.figures.fault(f"{left[0]} sessions and {left[1]} pages are left")
        return self.figures


def soak(seconds: float, seed: int, clients: int, report: Callable[[Figures], None] = lambda figures: None) -> Figures:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of observers that fail on purpose
        return Soak(seed, clients, Path(folder)).run(seconds, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()

    def report(figures: Figures) -> None:
        line = f"{figures.rss[-1][0]:.0f} s, {figures.rss[-1][1] >> 20} MiB, {figures.counts['blocks']} blocks, "
        print(f"\r{line}{len(figures.faults)} faults", end="", file=sys.stderr, flush=True)

    figures = soak(60 * options.minutes, options.seed, options.clients, report)
    print(file=sys.stderr)
    for name, count in sorted(figures.counts.items()):
        print(f"{name:28}{count:9}")
    first, last = figures.memory(0.1), figures.rss[-1][1]
    print(f"{'MiB after a tenth, at the end':28}{first >> 20:9}{last >> 20:9}")
    if last - first > GROWTH:
        figures.fault(f"memory grew by {(last - first) >> 20} MiB")
    for fault in figures.faults[:20]:
        print(f"fault: {fault}", file=sys.stderr)
    print(f"{'faults':28}{len(figures.faults):9}")
    return 1 if figures.faults else 0


if __name__ == "__main__":
    sys.exit(main())
