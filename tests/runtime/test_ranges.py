"""Ranges for a profiler's timeline: names, nesting in time, and none where nobody asked. A fake takes NVTX's place."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
import torch
from oracles import ROWS, SIZE, make_engine

from inferix.errors import UsageError
from inferix.runtime.telemetry.ranges import NvtxRanges, ranged
from inferix.serve.trace import Trace


@dataclass
class FakeRanges:
    """Notes the order in which ranges begin and end. spans: (begin, end) of each by its number."""

    names: list[str] = field(default_factory=list)
    spans: dict[int, tuple[int, int | None]] = field(default_factory=dict)
    clock: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str) -> int:
        with self.lock:
            self.clock += 1
            self.names.append(name)
            self.spans[len(self.names) - 1] = (self.clock, None)
            return len(self.names) - 1

    def end(self, handle: int) -> None:
        with self.lock:
            self.clock += 1
            begin, ended = self.spans[handle]
            assert ended is None
            self.spans[handle] = (begin, self.clock)

    def inside(self, name: str) -> list[str]:
        """Names of the ranges that begin and end within the first one of a name, in order."""
        begin, end = self.spans[self.names.index(name)]
        assert end is not None
        return [
            other for number, other in enumerate(self.names)
            if begin < self.spans[number][0] and (self.spans[number][1] or end) < end
        ]  # fmt: skip


def test_ranges_nest_as_sessions_blocks_stages_and_passes() -> None:
    engine, ranges = make_engine(), FakeRanges()
    engine.start_ranges(ranges)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        name = session.id[:8]
        list(session.stream(2))
    assert all(end is not None for _, end in ranges.spans.values())
    assert ranges.names[0] == f"session {name}"
    assert len(ranges.inside(f"session {name}")) == len(ranges.names) - 1
    steps = len(engine.preset.sampler.denoising_step_list)
    for block in range(2):
        inside = ranges.inside(f"block {block} of {name}")
        stages = [f"{stage} {block}" for stage in ("encode", "prepare", "denoise", "commit")]
        assert [one for one in inside if one in stages] == stages
        assert ranges.inside(f"denoise {block}") == [f"pass {index}" for index in range(steps)]
        assert ranges.inside(f"commit {block}") == [f"pass {steps}"]
    assert {f"decode {block}" for block in range(2)} <= set(ranges.names)


def test_blocks_of_two_sessions_interleave_and_all_ranges_end() -> None:
    engine, ranges = make_engine(), FakeRanges()
    engine.start_ranges(ranges)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as one, engine.open(prompt_embeds=ROWS, size=SIZE, seed=1) as other:
        streams = [one.stream(1, decode=False), other.stream(1, decode=False)]
        for stream in streams:
            next(stream)
    names = [f"block 0 of {session.id[:8]}" for session in (one, other)]
    assert all(ranges.names.count(name) == 1 for name in names)
    assert all(end is not None for _, end in ranges.spans.values())


def test_a_block_that_fails_ends_its_ranges() -> None:
    engine, ranges = make_engine(), FakeRanges()
    engine.start_ranges(ranges)

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of luck")

    engine.executor.forward = fails  # type: ignore[attr-defined]
    session = engine.open(prompt_embeds=ROWS, size=SIZE)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(session.stream(1))
    assert ranges.names and all(end is not None for _, end in ranges.spans.values())


def test_nothing_is_marked_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("a range was begun")

    monkeypatch.setattr(torch.cuda.nvtx, "range_start", refused)
    engine = make_engine()
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(1))
    with ranged(None, "a name"):
        pass


def test_nvtx_is_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cpu"):
        make_engine().start_ranges()
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_start", lambda name: seen.append(name) or 5)
    monkeypatch.setattr(torch.cuda.nvtx, "range_end", seen.append)
    with ranged(NvtxRanges(), "block 3"):
        pass
    assert seen == ["block 3", 5]


def test_a_servers_trace_marks_encoding_and_sending() -> None:
    ranges = FakeRanges()
    with Trace(ranges).span("transport", "send mp4", "0123456789", block=1):
        pass
    assert ranges.names == ["send mp4 of 01234567"] and ranges.spans[0] == (1, 2)
