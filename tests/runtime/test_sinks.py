"""Sinks and the pump: what each sink gets, how it ends, and that a failed run keeps what was finished."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pytest
from oracles import ROWS, SIZE, make_engine

from inferix.errors import InferixError, UsageError
from inferix.media import Pump, Sink, VideoWriter, read_video

HEIGHT, WIDTH = 32, 48


@dataclass
class Picture:
    """A block of three frames of one grey, as far as a pump needs it."""

    grey: int

    @property
    def frames(self) -> np.ndarray:
        return np.full((3, HEIGHT, WIDTH, 3), self.grey, np.uint8)


class Notebook:
    """A third party's sink: it writes down what happens to it. room: blocks that it takes before it is full."""

    def __init__(self, when_full: Literal["wait", "drop"] = "wait", room: int = 99, fails_at: str = "") -> None:
        self.when_full, self.room, self.fails_at = when_full, room, fails_at
        self.events: list[Any] = []

    @property
    def full(self) -> bool:
        return sum(isinstance(event, int) for event in self.events) >= self.room

    def note(self, event: Any) -> None:
        if event == self.fails_at:
            raise InferixError(f"no {event}")
        self.events.append(event)

    def __enter__(self) -> Self:
        self.note("open")
        return self

    def add(self, frames: np.ndarray) -> None:
        self.note("add") if self.fails_at == "add" else self.note(int(frames[0, 0, 0, 0]))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.note("close" if kind is None else kind.__name__)


def greys(*values: int, error: BaseException | None = None) -> Iterator[Picture]:
    yield from map(Picture, values)
    if error is not None:
        raise error


def test_sinks_get_the_first_frames_and_each_block_before_its_reader() -> None:
    one, two = Notebook(), Notebook()
    sinks: list[Sink] = [one, two]
    with Pump(greys(10, 20), *sinks, first=Picture(5).frames) as stream:
        assert one.events == ["open", 5]
        for block in stream:
            assert one.events[-1] == two.events[-1] == block.grey
    assert one.events == two.events == ["open", 5, 10, 20, "close"]


@pytest.mark.parametrize("error", [InferixError("full"), KeyboardInterrupt()])
def test_every_sink_ends_with_the_error_of_the_run(error: BaseException) -> None:
    one, two = Notebook(), Notebook()
    with pytest.raises(type(error)), Pump(greys(10, error=error), one, two) as stream:
        list(stream)
    assert one.events == two.events == ["open", 10, type(error).__name__]


@pytest.mark.parametrize("place", ["open", "add", "close"])
def test_a_sink_that_fails_ends_the_others_and_is_named(place: str) -> None:
    sound, broken = Notebook(), Notebook(fails_at=place)
    with pytest.raises(InferixError, match=f"no {place}"), Pump(greys(10), sound, broken) as stream:
        list(stream)
    assert sound.events == ["open", *([] if place == "open" else [10]), "InferixError"]


def test_blocks_are_left_out_only_where_a_sink_declares_it() -> None:
    live, file = Notebook("drop", room=1), Notebook("wait", room=1)
    with Pump(greys(10, 20, 30), live, file) as stream:
        assert [block.grey for block in stream] == [10, 20, 30]
    assert live.events == ["open", 10, "close"] and file.events == ["open", 10, 20, 30, "close"]
    assert stream.dropped == [2, 0]


def test_the_stream_is_closed_first() -> None:
    order: list[str] = []

    def stream() -> Iterator[Picture]:
        try:
            yield from greys(10, 20)
        finally:
            order.append("stream")

    class Last(Notebook):
        def __exit__(self, *error: Any) -> None:
            order.append("sink")

    with Pump(stream(), Last()) as blocks:
        next(blocks)
    assert order == ["stream", "sink"]


@pytest.mark.parametrize("finished", [0, 2])
def test_a_file_keeps_finished_blocks_of_a_failed_run_and_is_whole(tmp_path: Path, finished: int) -> None:
    path = tmp_path / "video.mp4"
    stream = greys(*(40 * (index + 1) for index in range(finished)), error=InferixError("planted"))
    writer = VideoWriter(path, 8, (WIDTH, HEIGHT))
    with pytest.raises(InferixError, match="planted"), Pump(stream, writer) as blocks:
        list(blocks)
    assert [file.name for file in tmp_path.iterdir()] == (["video.mp4"] if finished else [])
    if finished:
        frames = read_video(path, (WIDTH, HEIGHT), 8)
        assert len(frames) == 3 * finished
        assert abs(frames.mean(axis=(1, 2, 3)) - np.repeat([40, 80], 3)).max() < 3


def test_a_session_feeds_a_third_partys_sink(tmp_path: Path) -> None:
    engine = make_engine(dtype="float32", denoising_step_list=[1000])
    sink, writer = Notebook(), VideoWriter(tmp_path / "video.mp4", engine.fps, SIZE)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session, Pump(session.stream(2), sink, writer) as stream:
        firsts = [int(block.frames[0, 0, 0, 0]) for block in stream]
    assert sink.events == ["open", *firsts, "close"] and writer.frames == 9 + 12


def test_a_stream_without_frames_is_refused() -> None:
    engine = make_engine(dtype="float32", denoising_step_list=[1000])
    sink = Notebook()
    session = engine.open(prompt_embeds=ROWS.float(), size=SIZE)
    with pytest.raises(UsageError, match="decode"), Pump(session.stream(1, decode=False), sink) as stream:
        next(stream)
    assert sink.events == ["open", "UsageError"]
