"""`inferix play`: a world model live in the terminal; keys are actions, a line of text changes the prompt.

One thread makes blocks while the main thread shows the last ones at the video's frame rate. Input takes effect with the
next block that begins.
"""

from __future__ import annotations

import codecs
import os
import queue
import select
import sys
import textwrap
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import typer

from ..errors import InferixError, UsageError, quoted
from ..runtime.executor_specs import AUTO
from ..runtime.media import CONTAINERS, VideoWriter
from ..runtime.sinks import Frames, Pump, Sink
from ..schemes.camera import Camera, CameraMove
from .generate import DEFAULT_PROMPT, SEEN
from .options import (
    EXECUTOR,
    FORCE,
    GPUS,
    OFFLINE,
    PARALLEL,
    advise_cached,
    check_beside_engine,
    check_start,
    known_spec,
    note_choices,
    ranks_of_launcher,
)
from .terminal import Layout, check_size, check_terminal, draw, has_true_colour, layout

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from ..runtime.sessions.output_queue import Block
    from ..runtime.sessions.session import Session

WALK = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[D": "left", "\x1b[C": "right"}
WALK |= {key.replace("[", "O"): action for key, action in WALK.items()}  # terminals in application mode
LONGEST_KEY = 3  # characters of an arrow's sequence
WALK |= {"w": "up", "s": "down", "a": "left", "d": "right"}
MOVES = {
    "w": CameraMove(forward=1), "s": CameraMove(forward=-1), "d": CameraMove(right=1), "a": CameraMove(right=-1),
    "\x1b[C": CameraMove(yaw=1), "\x1b[D": CameraMove(yaw=-1), "\x1b[A": CameraMove(pitch=1),
    "\x1b[B": CameraMove(pitch=-1),
}  # fmt: skip
MOVES |= {key.replace("[", "O"): move for key, move in MOVES.items() if "[" in key}
REQUESTS = {"S": "save", "l": "load", "L": "load", "u": "rewind"}  # of the thread that makes blocks
KEY_SECONDS = 0.6  # duration of a key press, longer than the delay before a terminal repeats a key
REWIND_BLOCKS = 8  # that `u` goes back by at most, four seconds of the small world
KEYS = (
    "w a s d or arrows: walk; arrows turn a camera", "p: type a new prompt, Enter sends it", "u: go back a few seconds",
    "S: save the world   l: load it", "r: start or stop recording", "?: this page   q: quit   Esc: ask",
)  # fmt: skip
HELP = "wasd walk  p prompt  ? keys  q quit"
RECORDING = Path("play.mp4")
WORLD = Path("play.world")
MESSAGE_LINES = 2
LINES = 2 + MESSAGE_LINES  # below the picture


@dataclass
class Controls:
    """Keyboard state: written by the thread that reads keys, read by the thread that makes blocks."""

    actions: tuple[str, ...]
    clock: Any = time.monotonic
    camera: bool = False  # keys move a camera, in place of actions
    last_action: str = ""
    pressed: float = float("-inf")
    line: str | None = None  # the prompt being typed
    requests: deque[tuple[str, str]] = field(default_factory=deque)  # (kind, prompt)
    asking: bool = False  # whether to quit
    page: bool = False  # the page of keys is shown
    recording: bool = False
    quit: bool = False

    def key(self, key: str) -> None:
        """Handle one key: a character, or the escape sequence of an arrow."""
        if self.line is not None:
            self._edit(key)
        elif key == "\x03":
            self.quit = True
        elif self.asking:
            self.asking, self.quit = False, key in ("y", "Y", "q", "\r")
        elif self.page:
            self.page = False
        else:
            self._command(key)

    def _command(self, key: str) -> None:
        if key == "q":
            self.quit = True
        elif key == "\x1b":
            self.asking = True
        elif key == "?":
            self.page = True
        elif key == "p":
            self.line = ""
        elif key == "r":
            self.recording = not self.recording
        elif key in REQUESTS:
            self.requests.append((REQUESTS[key], ""))
        elif self.camera and key in MOVES:
            self.last_action, self.pressed = key, self.clock()
        elif WALK.get(key) in self.actions:
            self.last_action, self.pressed = WALK[key], self.clock()

    def _edit(self, key: str) -> None:
        assert self.line is not None
        if key in ("\r", "\n"):
            if self.line.strip():
                self.requests.append(("prompt", self.line.strip()))
            self.line = None
        elif key in ("\x1b", "\x03"):
            self.line = None
        elif key in ("\x7f", "\b"):
            self.line = self.line[:-1]
        elif key.isprintable():
            self.line += key

    def steer(self, session: Session) -> None:
        """Have a session follow the key that is pressed as a block begins: with its camera, or with an action."""
        if self.camera:
            session.move(MOVES[self.last_action] if self.clock() - self.pressed < KEY_SECONDS else CameraMove())
        else:
            session.act(self.action())

    def action(self) -> str:
        """Return the action for a block that begins now: that of a pressed key, else the first action, rest."""
        return self.last_action if self.clock() - self.pressed < KEY_SECONDS else self.actions[0]


def split_keys(text: str) -> list[str]:
    """Split terminal input into characters and three-character arrow sequences."""
    keys = []
    while text:
        size = LONGEST_KEY if text[:LONGEST_KEY] in WALK else 1
        keys.append(text[:size])
        text = text[size:]
    return keys


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Wrap a message to at most `most` lines, the last one cut with dots."""
    return textwrap.wrap(text, width, max_lines=most, placeholder=" ...") if text else []


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

    def clear(self) -> None:
        """Drop frames that have not been shown."""
        with suppress(queue.Empty):
            self.ready.get_nowait()


class BlockThread(threading.Thread):
    """Makes blocks for a sink. saved: file of `S` and `l`. speed: frames per second of the last block."""

    def __init__(
        self,
        session: Session,
        controls: Controls,
        sink: Sink,
        saved: Path,
        restore: Callable[[Path], Session] | None = None,
        dropped: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(daemon=True)
        self.session, self.controls, self.sink, self.saved = session, controls, sink, saved
        self.restore, self.dropped = restore, dropped
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
        """Make the next block with the current controls; sets `status` to what was done or its warnings."""
        while self.controls.requests:
            kind, text = self.controls.requests.popleft()
            try:
                self.status = self.follow(kind, text)
            except InferixError as error:
                self.status = str(error)
        self.controls.steer(self.session)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (block,) = self.session.stream(blocks=1)
        messages = [str(warning.message) for warning in caught] + [ack.refused for ack in block.acks if ack.refused]
        self.status = " ".join(messages) or self.status
        return block

    def follow(self, kind: str, text: str) -> str:
        """Do what a key asked for; returns the message for it. Raises InferixError where it cannot be done."""
        if kind == "prompt":
            self.session.prompt(text)
            return f"prompt: {text}"
        if kind == "save":
            self.session.save(self.saved)
            return f"saved to {self.saved}; l loads it"
        if kind == "rewind":
            first = max(0, self.session.next_block - REWIND_BLOCKS // 2)
            self.session.rewind(first)
            self.dropped()
            return f"back to block {first}"
        assert kind == "load" and self.restore is not None
        loaded = self.restore(self.saved)
        self.session.close()
        self.session = loaded
        self.dropped()
        return f"loaded {self.saved}"


@dataclass
class Recorder:
    """Writes shown frames to a file of its own for each recording. pattern: its name; a number is added to it."""

    pattern: Path
    fps: float
    writer: VideoWriter | None = None

    def follow(self, recording: bool, frames: Frames) -> str | None:
        """Start or stop as asked and write frames; returns a message about a change."""
        message = None
        if recording and self.writer is None and len(frames):
            size = (frames.shape[2], frames.shape[1])
            self.writer = VideoWriter(self.free_name(), self.fps, size, max(1, SEEN // max(size))).__enter__()
            message = f"recording to {self.writer.path}"
        if not recording and self.writer is not None:
            message = self.stop()
        if self.writer is not None and len(frames):
            self.writer.add(frames)
        return message

    def free_name(self) -> Path:
        """Return the first name with a number that no file has."""
        names = (self.pattern.with_stem(f"{self.pattern.stem}-{number}") for number in count(1))
        return next(name for name in names if not name.exists())

    def stop(self) -> str | None:
        """Finish the file; returns a message, None if there is none."""
        if self.writer is None:
            return None
        writer, self.writer = self.writer, None
        writer.__exit__(None, None, None)
        return f"recorded {writer.frames} frames to {writer.path}"


@dataclass
class Screen:
    """Draws pictures, messages and the page of keys in the terminal. words: that prompts may have."""

    size: tuple[int, int]
    words: str
    true_colour: bool
    terminal: os.terminal_size | None = None
    place: Layout | None = None

    def show(self, frame: Frames, lines: list[str], page: bool) -> None:
        """Draw a picture [H, W, 3], or the page of keys, and lines of text below it."""
        terminal = os.get_terminal_size()
        if terminal != self.terminal:
            check_size(terminal)
            self.terminal, self.place = terminal, layout(self.size, terminal.columns, terminal.lines - LINES)
            sys.stdout.write("\x1b[2J")
        assert self.place is not None
        if page:
            texts = (*KEYS, "", self.words)
            rows = [line for text in texts for line in wrapped(text, terminal.columns - 1, 99) or [""]]
            rows = rows[: terminal.lines - LINES]
        else:
            rows = draw(frame, self.place, self.true_colour)
        rows += [""] * (terminal.lines - LINES - len(rows))
        text = "".join(f"{row}\x1b[K\r\n" for row in rows) + "\r\n".join(f"{line}\x1b[K" for line in lines)
        sys.stdout.write(f"\x1b[H{text}")
        sys.stdout.flush()

    def message(self, text: str) -> list[str]:
        """Wrap a message to the lines that are kept for it."""
        lines = wrapped(text, (self.terminal or os.get_terminal_size()).columns - 1, MESSAGE_LINES)
        return lines + [""] * (MESSAGE_LINES - len(lines))


def show(
    blocks: BlockThread,
    sink: TerminalSink,
    controls: Controls,
    file: int,
    screen: Screen,
    recorder: Recorder,
    seconds: float | None,
) -> tuple[int, float]:
    """Show blocks at the frame rate until `controls.quit` or for `seconds`; returns frames and seconds."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="ignore").decode
    shown, start, fps = 0, time.monotonic(), recorder.fps
    due = start
    while not controls.quit and (seconds is None or shown < seconds * fps):
        if blocks.failed is not None:
            raise blocks.failed
        frames, speed = sink.take(), blocks.speed
        if not shown:
            start = due = time.monotonic()
        try:
            blocks.status = recorder.follow(controls.recording, frames) or blocks.status
        except InferixError as error:
            controls.recording, blocks.status = False, str(error)
        for frame in frames:
            due = max(due + 1 / fps, time.monotonic())
            shown += 1
            pace = shown / max(time.monotonic() - start, 1e-9)
            status = f"new prompt: {controls.line}_" if controls.line is not None else blocks.status
            status = "quit? y: yes, any other key: no" if controls.asking else status
            dot = "REC " if controls.recording else ""
            facts = f"{dot}{pace:.1f} FPS shown, {speed:.1f} made, world {fps:g}"
            screen.show(frame, [facts, *screen.message(status), HELP], controls.page)
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


def words_of(engine: Engine) -> str:
    """Return the words that a prompt may have, as a sentence."""
    from ..models.family import TableEncoder

    encoder = engine.parts.text() if engine.parts.text is not None else None
    if not isinstance(encoder, TableEncoder):
        return "A prompt may have any words."
    return f"Words of a prompt: {', '.join(encoder.table()[0])}."


def play(
    model: str | None = typer.Option(
        None,
        help="Checkpoint folder, or org/name, of a model that follows actions or a camera.  [default: tinyworld]",
    ),
    exported: Path | None = typer.Option(
        None, "--engine", metavar="DIR", help="Folder that inferix export wrote, in place of a model."
    ),
    preset: str | None = typer.Option(None, help="Decoding scheme.  [default: the model's own]"),
    base: Path | None = typer.Option(None, help="Folder with VAE and text encoder, if not with the model."),
    prompt: str = typer.Option(DEFAULT_PROMPT, help="Content of the world, as text."),
    image: Path | None = typer.Option(None, help="First picture, for models that begin with one."),
    seed: int = typer.Option(0, help="Seed of the noise, which determines the land."),
    seconds: float | None = typer.Option(None, help="Quit after this many seconds of video."),
    record: Path = typer.Option(
        RECORDING, help="Name of recordings, to which a number is added: .mp4, .mov, .mkv, .webm or .gif."
    ),
    save: Path = typer.Option(WORLD, help="File that S saves the world to and l loads it from."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    executor: str | None = EXECUTOR,
    gpus: int | None = GPUS,
    parallel: str | None = PARALLEL,
    graphs: Path | None = typer.Option(None, help="Folder of stored graphs to read, and to add new ones to."),
    offline: bool = OFFLINE,
    force: bool = FORCE,
) -> None:
    """Walk through a generated world, live in the terminal.

    The terminal has 40x20 characters or more. w a s d or the arrow keys walk, or move and turn a camera, p starts a new
    prompt, u goes back, S saves and l loads, r records, ? shows keys and words, q quits.

    Example: inferix play --prompt "a white fox in a green meadow at sunset"
    """
    check_terminal()
    if record.suffix.lower() not in CONTAINERS:
        raise UsageError(f"--record {quoted(str(record))} must end in one of {', '.join(CONTAINERS)}")

    from ..models.registry import MODELS, PRESETS
    from ..runtime.load import load
    from ..runtime.sessions.session import Session

    given: dict[str, object] = {"--model": model, "--device": device, "--executor": executor, "--graphs": graphs}
    given |= {"--gpus": gpus, "--parallel": parallel, "--base": base}
    check_beside_engine(exported, given)
    checks: dict[str, Any] = {"offline": offline, "force": force, "rewind_blocks": REWIND_BLOCKS}
    if exported is not None:
        engine = load(engine=exported, rewind_blocks=REWIND_BLOCKS)
    else:
        named = model or "tinyworld"
        ranks: dict[str, Any] = {"gpus": gpus or ranks_of_launcher(), "parallel": parallel}
        if preset is None and named not in (*MODELS, *PRESETS):
            spec = known_spec(named)
            preset = "tinyworld" if spec is None or spec.actions else None
        check_start(named, preset, {"--image": image})
        parts: dict[str, Any] = {"base": base, "device": device, "executor": executor or AUTO, "graphs": graphs}
        engine = load(named, preset=preset, **parts, **ranks, **checks)
        note_choices(engine)
        advise_cached(engine, executor)
    has_camera = engine.spec.camera_channels is not None
    if not engine.spec.actions and not has_camera:
        raise UsageError(
            f"{quoted(engine.parts.source)} follows no actions and no camera; --model must be one that does, such as "
            "tinyworld"
        )
    controls = Controls(engine.spec.actions, camera=has_camera)
    first = engine.open(prompt=prompt, seed=seed, image=image, camera=Camera() if has_camera else None)
    screen = Screen(first.size, words_of(engine), has_true_colour())
    recorder, sink = Recorder(record, engine.fps), TerminalSink(controls)
    blocks = BlockThread(first, controls, sink, save, lambda path: Session.restore(engine, path), sink.clear)
    with raw_terminal() as file:
        engine.hand_over()
        blocks.start()
        try:
            shown, took = show(blocks, sink, controls, file, screen, recorder, seconds)
        finally:
            controls.quit = True
            blocks.join()
            blocks.session.close()
            recorded = recorder.stop()
    if not shown:
        raise InferixError("no picture was made before the end; wait longer before you quit")
    if recorded:
        typer.echo(recorded)
    typer.echo(f"{shown} frames in {took:.1f} s: {shown / took:.1f} FPS; the world's frame rate is {engine.fps} FPS")
