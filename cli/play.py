"""`inferix play`: a world model live in the terminal; arrow keys are actions, a line of text changes the prompt.

One thread makes blocks while the main thread shows the last ones at the video's frame rate, two pixels per character.
Input takes effect with the next block that begins.
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
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import typer
from numpy.typing import NDArray

from ..errors import InferixError, UsageError, quoted
from ..runtime.sinks import Frames, Pump, Sink
from .generate import DEFAULT_PROMPT
from .options import EXECUTOR, FORCE, OFFLINE, check_beside_engine

if TYPE_CHECKING:
    from ..runtime.sessions.output_queue import Block
    from ..runtime.sessions.session import Session

ARROWS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[D": "left", "\x1b[C": "right"}
ARROWS |= {key.replace("[", "O"): action for key, action in ARROWS.items()}  # terminals in application mode
KEY_SECONDS = 0.6  # duration of a key press, longer than the delay before a terminal repeats a key
HELP = "arrows: walk   p: new prompt   q: quit"
LINES = 3  # below the picture


@dataclass
class Controls:
    """Keyboard state: written by the thread that reads keys, read by the thread that makes blocks."""

    actions: tuple[str, ...]
    clock: Any = time.monotonic
    last_action: str = ""
    pressed: float = float("-inf")
    line: str | None = None  # the prompt being typed
    prompts: deque[str] = field(default_factory=deque)
    quit: bool = False

    def key(self, key: str) -> None:
        """Handle one key: a character, or the escape sequence of an arrow."""
        if self.line is not None:
            self._edit(key)
        elif key in ("q", "\x03", "\x1b"):
            self.quit = True
        elif key == "p":
            self.line = ""
        elif ARROWS.get(key) in self.actions:
            self.last_action, self.pressed = ARROWS[key], self.clock()

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
        """Return the action for a block that begins now: that of a pressed key, else the first action, rest."""
        return self.last_action if self.clock() - self.pressed < KEY_SECONDS else self.actions[0]


def split_keys(text: str) -> list[str]:
    """Split terminal input into characters and three-character arrow sequences."""
    keys = []
    while text:
        size = 3 if text[:3] in ARROWS else 1
        keys.append(text[:size])
        text = text[size:]
    return keys


def half_blocks(frame: NDArray[np.uint8], scale: int) -> str:
    """Draw a picture [H, W, 3] as rows of half-block characters, `scale` characters per pixel of width."""
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
    """Return the largest whole scale of a picture (width, height) in a terminal.

    Raises UsageError if the terminal is too small for scale 1.
    """
    width, height = size[0], size[1] // 2 + LINES
    if terminal.columns < width or terminal.lines < height:
        raise UsageError(
            f"the terminal has {terminal.columns}x{terminal.lines} characters; play needs {width}x{height}: "
            "enlarge the window or reduce the font size"
        )
    return min(terminal.columns // width, (terminal.lines - LINES) * 2 // size[1])


def check_terminal() -> None:
    if not all(file is not None and file.isatty() for file in (sys.stdin, sys.stdout)):  # None: closed
        raise UsageError("play needs a terminal for keys and pictures; use inferix generate to write a file")


@contextmanager
def raw_terminal() -> Iterator[int]:
    """Yield the keyboard's file descriptor in raw mode, on a cleared screen; restores the terminal at the end."""
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


class TerminalSink:
    """Sink of frames that the main thread shows; nothing more is added after `controls.quit`.

    At most one block is ahead of the pictures, so that keys take effect soon.
    """

    when_full: Final = "wait"

    def __init__(self, controls: Controls) -> None:
        self.controls = controls
        self.ready: queue.Queue[Frames] = queue.Queue(maxsize=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the main thread shows what is still there."""

    @property
    def full(self) -> bool:
        return self.ready.full()

    def add(self, frames: Frames) -> None:
        while not self.controls.quit:
            try:
                return self.ready.put(frames, timeout=0.1)
            except queue.Full:
                continue

    def take(self) -> Frames:
        """The next frames [T, H, W, 3]; none after a short wait."""
        try:
            return self.ready.get(timeout=0.05)
        except queue.Empty:
            return np.empty((0, 0, 0, 3), np.uint8)


class BlockThread(threading.Thread):
    """Makes blocks for a sink. speed: frames per second of the last block."""

    def __init__(self, session: Session, controls: Controls, sink: Sink) -> None:
        super().__init__(daemon=True)
        self.session, self.controls, self.sink = session, controls, sink
        self.status, self.speed = "", 0.0
        self.failed: Exception | None = None

    def run(self) -> None:
        """Make blocks until `controls.quit`; stores an error in `failed`, which the showing thread raises."""
        try:
            with Pump(self.blocks(), self.sink) as stream:
                deque(stream, maxlen=0)
        except (InferixError, RuntimeError, ValueError, AssertionError) as error:
            self.failed = error

    def blocks(self) -> Iterator[Block]:
        """Blocks until `controls.quit`, each made with the controls of its beginning."""
        while not self.controls.quit:
            start = time.perf_counter()
            block = self.make()
            assert block.frames is not None
            self.speed = len(block.frames) / (time.perf_counter() - start)
            yield block

    def make(self) -> Block:
        """Make the next block with the current controls; sets `status` to the new prompt or its warnings."""
        while self.controls.prompts:
            text = self.controls.prompts.popleft()
            self.session.prompt(text)
            self.status = f"prompt: {text}"
        self.session.act(self.controls.action())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (block,) = self.session.stream(blocks=1)
        messages = [str(warning.message) for warning in caught] + [ack.refused for ack in block.acks if ack.refused]
        self.status = " ".join(messages) or self.status
        return block


def show(
    blocks: BlockThread, sink: TerminalSink, controls: Controls, file: int, scale: int, fps: int, seconds: float | None
) -> tuple[int, float]:
    """Show blocks at `fps` until `controls.quit` or for `seconds`; returns the frames shown and the seconds it took."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="ignore").decode
    shown, start = 0, time.monotonic()
    due = start
    while not controls.quit and (seconds is None or shown < seconds * fps):
        if blocks.failed is not None:
            raise blocks.failed
        frames, speed = sink.take(), blocks.speed
        if not shown:
            start = due = time.monotonic()
        for frame in frames:
            due = max(due + 1 / fps, time.monotonic())
            sys.stdout.write("\x1b[H" + half_blocks(frame, scale))
            shown += 1
            pace = shown / max(time.monotonic() - start, 1e-9)
            status = blocks.status if controls.line is None else f"new prompt: {controls.line}_"
            width = os.get_terminal_size().columns
            for line in (f"{pace:.1f} FPS shown, {speed:.1f} FPS made, world {fps} FPS", status, HELP):
                sys.stdout.write(f"\r\n\x1b[K{line[: width - 1]}")
            sys.stdout.flush()
            read_keys(controls, file, due, decode)
        read_keys(controls, file, 0.0, decode)
    return shown, time.monotonic() - start


def read_keys(controls: Controls, file: int, until: float, decode: Any) -> None:
    """Handle keys until a time of the monotonic clock; with a time in the past, only those already pressed."""
    while True:
        left = max(0.0, until - time.monotonic())
        if not select.select([file], [], [], left)[0]:
            return
        for key in split_keys(decode(os.read(file, 64))):
            controls.key(key)


def play(
    model: str | None = typer.Option(
        None, help="Checkpoint folder, or org/name, of a model that follows actions.  [default: tinyworld]"
    ),
    exported: Path | None = typer.Option(
        None, "--engine", metavar="DIR", help="Folder that inferix export wrote, in place of a model."
    ),
    prompt: str = typer.Option(DEFAULT_PROMPT, help="Content of the world, as text."),
    seed: int = typer.Option(0, help="Seed of the noise, which determines the land."),
    seconds: float | None = typer.Option(None, help="Quit after this many seconds of video."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    executor: str | None = EXECUTOR,
    graphs: Path | None = typer.Option(None, help="Folder of stored graphs to read, and to add new ones to."),
    offline: bool = OFFLINE,
    force: bool = FORCE,
) -> None:
    """Walk through a generated world, live in the terminal.

    Arrow keys walk, p starts a new prompt, q quits.

    Example: inferix play --prompt "a white fox in a green meadow at sunset"
    """
    check_terminal()

    from ..runtime.load import load

    given = {"--model": model, "--device": device, "--executor": executor, "--graphs": graphs}
    check_beside_engine(exported, given)
    checks: dict[str, Any] = {"offline": offline, "force": force}
    if exported is not None:
        engine = load(engine=exported)
    else:
        named = model or "tinyworld"
        engine = load(named, preset="tinyworld", device=device, executor=executor, graphs=graphs, **checks)
    if not engine.spec.actions:
        model = quoted(engine.parts.source)
        raise UsageError(f"{model} follows no actions; --model must be one that does, such as tinyworld")
    controls = Controls(engine.spec.actions)
    with engine.open(prompt=prompt, seed=seed) as session, raw_terminal() as file:
        scale = fitting_scale(session.size, os.get_terminal_size())
        sink = TerminalSink(controls)
        blocks = BlockThread(session, controls, sink)
        engine.hand_over()
        blocks.start()
        try:
            shown, took = show(blocks, sink, controls, file, scale, engine.fps, seconds)
        finally:
            controls.quit = True
            blocks.join()
    if not shown:
        raise InferixError("no picture was made before the end; wait longer before you quit")
    typer.echo(f"{shown} frames in {took:.1f} s: {shown / took:.1f} FPS; the world's frame rate is {engine.fps} FPS")
