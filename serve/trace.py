"""A trace of the whole path of live sessions, for Perfetto or Chrome: engine, decoder, encoders and connections."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from ..runtime.telemetry.ranges import Ranges, ranged

TRACKS = ("engine", "decoder", "encoder", "transport")
DECODER = ("decode", "drift")  # stages of a block that the decoder's thread runs
WAITING = ("queue", "emit")  # stages in which nothing of a block is computed
MOST_EVENTS = 200_000


class Trace:
    """Collects spans while `recording`; otherwise costs a look at that. Free to all threads.

    Spans are those of `time.perf_counter`, as the engine's are. ranges: also marks encoding and sending there.
    """

    def __init__(self, ranges: Ranges | None = None) -> None:
        self.recording, self.ranges = False, ranges
        self.events: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Record from now on, without what was recorded before."""
        with self._lock:
            self.events, self.recording = [], True

    def end(self) -> dict[str, Any]:
        """Stop recording; returns the trace in Chrome's format: processes are tracks, threads are sessions."""
        with self._lock:
            self.recording, events = False, self.events
        sessions = {name: number for number, name in enumerate(dict.fromkeys(event["tid"] for event in events), 1)}
        names = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": track}}
            for pid, track in enumerate(TRACKS, 1)
        ]
        names += [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": number, "args": {"name": f"session {name[:8]}"}}
            for pid in range(1, len(TRACKS) + 1) for name, number in sessions.items()
        ]  # fmt: skip
        return {
            "displayTimeUnit": "ms",
            "traceEvents": [*names, *(event | {"tid": sessions[event["tid"]]} for event in events)],
        }

    def add(self, track: str, name: str, session: str, begin: float, end: float, **facts: Any) -> None:
        """Add a span of seconds. session: the engine's id of it."""
        with self._lock:
            if not self.recording or len(self.events) >= MOST_EVENTS:
                return
            self.events.append({
                "ph": "X", "name": name, "pid": 1 + TRACKS.index(track), "tid": session, "ts": begin * 1e6,
                "dur": (end - begin) * 1e6, "args": facts,
            })  # fmt: skip

    @contextmanager
    def span(self, track: str, name: str, session: str, **facts: Any) -> Iterator[None]:
        """Add what happens inside."""
        begin = perf_counter()
        try:
            with ranged(self.ranges, f"{name} of {session[:8]}"):
                yield
        finally:
            if self.recording:
                self.add(track, name, session, begin, perf_counter(), **facts)

    def observe(self, record: Mapping[str, Any]) -> None:
        """Add the stages of a block by its record; to be given to `Engine.observe`."""
        if not self.recording or "spans" not in record:
            return
        for stage, (begin, end) in record["spans"].items():
            if stage not in WAITING:
                track = "decoder" if stage in DECODER else "engine"
                self.add(track, stage, record["session"], begin, end, block=record["block"], batch=record["batch"])
