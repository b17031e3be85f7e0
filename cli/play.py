"""`inferix play`: a world model live in the terminal; arrow keys act, a line of text changes the prompt.

Blocks are made by a thread of their own while the last ones are shown at the video's pace, two pixels to a
character. What is typed counts from the next block that begins.
"""

from __future__ import annotations

import codecs
import os
import queue
import select
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ..errors import InferixError, UsageError
from .generate import DEFAULT_PROMPT
from .options import FORCE, OFFLINE

if TYPE_CHECKING:
    from ..runtime.sessions.output_queue import Block
    from ..runtime.sessions.session import Session

ARROWS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[D": "left", "\x1b[C": "right"}
ARROWS |= {key.replace("[", "O"): action for key, action in ARROWS.items()}  # terminals in application mode
HELD = 0.6  # seconds that a key counts for, longer than the pause before a held key repeats
HELP = "arrows: walk   p: new prompt   q: leave"
LINES = 3  # below the picture


@dataclass
class Controls:
    """What the keyboard has asked for; written by the one who reads keys, taken by the one who makes blocks."""

    actions: tuple[str, ...]
    clock: Any = time.monotonic
    wanted: str = ""
    pressed: float = float("-inf")
    line: str | None = None  # the prompt being typed
    prompts: deque[str] = field(default_factory=deque)
    leave: bool = False

    def key(self, key: str) -> None:
        """Take one key: a character, or the escape sequence of an arrow."""
        if self.line is not None:
            self._edit(key)
        elif key in ("q", "\x03", "\x1b"):
            self.leave = True
        elif key == "p":
            self.line = ""
        elif ARROWS.get(key) in self.actions:
            self.wanted, self.pressed = ARROWS[key], self.clock()

    def _edit(self, key: str) -> None:
        assert self.line is not None
        if key in ("\r", "\n"):
            if self.line.strip():
                self.prompts.append(self.line.strip())
            self.line = None
        elif key in ("\x1b", "\x03"):
            self.line = None
        elif key in ("\x7f", "\b"):
            self.line = self.line[:-1]
        elif key.isprintable():
            self.line += key

    def action(self) -> str:
        """The action of a block that begins now: that of a key still held, else rest."""
        return self.wanted if self.clock() - self.pressed < HELD else self.actions[0]


def split_keys(text: str) -> list[str]:
    """Characters and three-character arrow sequences of what a terminal sent."""
    keys = []
    while text:
        size = 3 if text[:3] in ARROWS else 1
        keys.append(text[:size])
        text = text[size:]
    return keys


def half_blocks(frame: NDArray[np.uint8], scale: int) -> str:
    """A picture [H, W, 3] as rows of half-block characters, `scale` characters to a pixel's width."""
    frame = frame.repeat(scale, 0).repeat(scale, 1)
    rows = []
    for top, bottom in zip(frame[0::2].tolist(), frame[1::2].tolist(), strict=True):
        row, last = [], None
        for up, down in zip(top, bottom, strict=True):
            if (up, down) != last:
                row.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*up, *down))
                last = (up, down)
            row.append("▀")
        rows.append("".join(row) + "\x1b[0m")
    return "\r\n".join(rows)


def fitting_scale(size: tuple[int, int], terminal: os.terminal_size) -> int:
    """How many times a picture (width, height) fits into a terminal; UsageError if it does not fit once."""
    width, height = size[0], size[1] // 2 + LINES
    if terminal.columns < width or terminal.lines < height:
        raise UsageError(
            f"the terminal is {terminal.columns}x{terminal.lines} characters; play needs {width}x{height}: "
            "enlarge it or make its letters smaller"
        )
    return min(terminal.columns // width, (terminal.lines - LINES) * 2 // size[1])


def check_terminal() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("play needs a terminal for keys and pictures; to write a file use inferix generate")


@contextmanager
def raw_terminal() -> Iterator[int]:
    """The keyboard's file, keys coming as they are pressed, on a cleared screen that is put back at the end."""
    import termios
    import tty

    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    tty.setraw(file)
    sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
    try:
        yield file
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(file, termios.TCSADRAIN, before)


class Maker(threading.Thread):
    """Makes blocks ahead of the pictures shown, one waiting at most, so that keys take effect soon."""

    def __init__(self, session: Session, controls: Controls) -> None:
        super().__init__(daemon=True)
        self.session, self.controls = session, controls
        self.ready: queue.Queue[tuple[NDArray[np.uint8], float]] = queue.Queue(maxsize=1)
        self.said = ""
        self.failed: Exception | None = None

    def run(self) -> None:
        """Make blocks until the end; what goes wrong is raised where pictures are shown."""
        try:
            while not self.controls.leave:
                begun = time.perf_counter()
                block = self.make()
                assert block.frames is not None
                self.put(block.frames, len(block.frames) / (time.perf_counter() - begun))
        except (InferixError, RuntimeError, ValueError, AssertionError) as error:
            self.failed = error

    def make(self) -> Block:
        """The next block, by what was asked for until now; what became of a new prompt is said below it."""
        while self.controls.prompts:
            text = self.controls.prompts.popleft()
            self.session.prompt(text)
            self.said = f"prompt: {text}"
        self.session.act(self.controls.action())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (block,) = self.session.stream(blocks=1)
        said = [str(warning.message) for warning in caught] + [ack.refused for ack in block.acks if ack.refused]
        self.said = " ".join(said) or self.said
        return block

    def put(self, frames: NDArray[np.uint8], speed: float) -> None:
        while not self.controls.leave:
            try:
                return self.ready.put((frames, speed), timeout=0.1)
            except queue.Full:
                continue


def show(maker: Maker, controls: Controls, file: int, scale: int, fps: int, seconds: float | None) -> tuple[int, float]:
    """Show blocks at `fps` until the end is asked for; returns frames shown and the seconds that took."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="ignore").decode
    shown, speed, begun = 0, 0.0, time.monotonic()
    due = begun
    while not controls.leave and (seconds is None or shown < seconds * fps):
        if maker.failed is not None:
            raise maker.failed
        try:
            frames, speed = maker.ready.get(timeout=0.05)
        except queue.Empty:
            frames = np.empty((0, 0, 0, 3), np.uint8)
        if not shown:
            begun = due = time.monotonic()
        for frame in frames:
            due = max(due + 1 / fps, time.monotonic())
            sys.stdout.write("\x1b[H" + half_blocks(frame, scale))
            shown += 1
            pace = shown / max(time.monotonic() - begun, 1e-9)
            told = maker.said if controls.line is None else f"new prompt: {controls.line}_"
            width = os.get_terminal_size().columns
            for line in (f"{pace:.1f} FPS shown, {speed:.1f} FPS made, world {fps} FPS", told, HELP):
                sys.stdout.write(f"\r\n\x1b[K{line[: width - 1]}")
            sys.stdout.flush()
            read_keys(controls, file, due, decode)
        read_keys(controls, file, 0.0, decode)
    return shown, time.monotonic() - begun


def read_keys(controls: Controls, file: int, until: float, decode: Any) -> None:
    """Take keys until a moment of the monotonic clock, or those that are there."""
    while True:
        left = max(0.0, until - time.monotonic())
        if not select.select([file], [], [], left)[0]:
            return
        for key in split_keys(decode(os.read(file, 64))):
            controls.key(key)


def play(
    model: str = typer.Option("tinyworld", help="Checkpoint folder, or org/name, of a model that follows actions."),
    prompt: str = typer.Option(DEFAULT_PROMPT, help="What the world shows."),
    seed: int = typer.Option(0, help="Seed of the noise, and so of the land."),
    seconds: float | None = typer.Option(None, help="Leave after so many seconds of video."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    executor: str | None = typer.Option(
        None, help="How passes run: eager, fused, captured.  [default: captured on a GPU, else eager]"
    ),
    graphs: Path | None = typer.Option(None, help="Folder of stored graphs to start from, and to add to."),
    offline: bool = OFFLINE,
    force: bool = FORCE,
) -> None:
    """Walk through a world that is made as you go.

    Arrow keys walk, p asks for a new prompt, q leaves.

    Example: inferix play --prompt "a white fox in a green meadow at sunset"
    """
    check_terminal()

    from ..runtime.load import load

    checks: dict[str, Any] = {"offline": offline, "force": force}
    engine = load(model, preset="tinyworld", device=device, executor=executor, graphs=graphs, **checks)
    if not engine.spec.actions:
        raise UsageError(f"{model} follows no actions; play needs a model that does, such as tinyworld")
    controls = Controls(engine.spec.actions)
    with engine.open(prompt=prompt, seed=seed) as session, raw_terminal() as file:
        scale = fitting_scale(session.size, os.get_terminal_size())
        maker = Maker(session, controls)
        engine.hand_over()
        maker.start()
        try:
            shown, took = show(maker, controls, file, scale, engine.fps, seconds)
        finally:
            controls.leave = True
            maker.join()
    if not shown:
        raise InferixError("no picture was made before the end; give it a moment longer")
    typer.echo(f"{shown} frames in {took:.1f} s: {shown / took:.1f} FPS, the world's own is {engine.fps}")
