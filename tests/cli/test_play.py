"""`inferix play`: keys, pictures as characters, and one whole run in a terminal of its own."""

import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from oracles import write_untrained_world
from typer.testing import CliRunner

from inferix.cli import terminal
from inferix.cli.main import app
from inferix.cli.play import KEY_SECONDS, BlockThread, Controls, Recorder, split_keys, wrapped
from inferix.cli.terminal import LEAST, Layout, check_size, draw, has_true_colour, layout, palette_index, resized
from inferix.errors import UsageError

ACTIONS = ("stay", "up", "down", "left", "right")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_arrow_acts_until_its_key_press_expires():
    clock = Clock()
    controls = Controls(ACTIONS, clock)
    assert controls.action() == "stay"
    for key in split_keys("\x1b[C\x1bOA"):
        controls.key(key)
    assert controls.action() == "up"
    clock.now += KEY_SECONDS
    assert controls.action() == "stay"


def test_a_prompt_is_typed_corrected_sent_or_dropped():
    controls = Controls(ACTIONS)
    for key in "pa q\x7ffox\r":
        controls.key(key)
    assert list(controls.requests) == [("prompt", "a fox")]
    assert not controls.quit
    for key in ("p", "x", "\x1b"):
        controls.key(key)
    assert controls.line is None
    assert len(controls.requests) == 1
    controls.key("q")
    assert controls.quit


def test_letters_walk_and_ask_for_what_they_stand_for():
    controls = Controls(ACTIONS)
    for key, action in zip("wsad", ("up", "down", "left", "right"), strict=True):
        controls.key(key)
        assert controls.action() == action
    for key in "Slu":
        controls.key(key)
    assert [kind for kind, _ in controls.requests] == ["save", "load", "rewind"]
    controls.key("r")
    assert controls.recording
    controls.key("r")
    controls.key("?")
    assert controls.page and not controls.recording
    controls.key("q")  # any key leaves the page
    assert not controls.page and not controls.quit


@pytest.mark.parametrize(("answer", "quits"), [("y", True), ("n", False), ("\x1b", False)])
def test_escape_asks_before_it_quits(answer, quits):
    controls = Controls(ACTIONS)
    controls.key("\x1b")
    assert controls.asking and not controls.quit
    controls.key(answer)
    assert controls.quit == quits and not controls.asking


def test_two_pixels_make_a_character():
    frame = np.zeros((4, 3, 3), np.uint8)
    frame[0] = (255, 0, 0)
    text = "".join(draw(frame, Layout(3, 2, 0, False), true_colour=True))
    assert text.count("▀") == 6
    assert "\x1b[38;2;255;0;0;48;2;0;0;0m" in text
    assert "".join(draw(frame, Layout(6, 4, 5, False), True)).count("▀") == 24
    assert all(line.startswith(" " * 5) for line in draw(frame, Layout(3, 2, 5, False), True))


def test_quadrants_keep_two_colours_of_four_pixels():
    frame = np.zeros((2, 4, 3), np.uint8)
    frame[0, 0] = frame[1, 1] = (200, 100, 0)  # a diagonal, and a uniform part beside it
    frame[:, 2:] = (7, 8, 9)
    (line,) = draw(frame, Layout(2, 1, 0, True), True)
    assert "▚" in line and "38;2;200;100;0;48;2;0;0;0m" in line and "48;2;7;8;9m " in line


def test_a_large_picture_is_averaged_and_a_small_one_repeated():
    frame = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    halved = resized(frame, 2, 3)
    assert np.allclose(halved, frame.reshape(2, 2, 3, 2, 3).mean((1, 3)), atol=0.51)
    assert (resized(frame, 8, 12) == frame.repeat(2, 0).repeat(2, 1)).all()
    assert resized(np.full((5, 7, 3), 9, np.uint8), 3, 4).tolist() == np.full((3, 4, 3), 9).tolist()


def test_256_colours_are_the_nearest_ones():
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [128, 128, 128], [95, 135, 175]], np.uint8)
    assert palette_index(colours).tolist() == [16, 231, 196, 244, 16 + 36 + 12 + 3]
    (line,) = draw(np.full((2, 1, 3), (255, 0, 0), np.uint8), Layout(1, 1, 0, False), true_colour=False)
    assert line.startswith("\x1b[38;5;196;48;5;196m▀")
    for environment, expected in (({"COLORTERM": "truecolor"}, True), ({"TERM": "xterm-direct"}, True), ({}, False)):
        assert has_true_colour(environment) == expected


def test_a_picture_fits_every_terminal_from_the_least_on():
    size = os.terminal_size
    assert layout((64, 64), 64, 32) == Layout(64, 32, 0, False)
    assert layout((64, 64), 200, 76) == Layout(128, 64, 36, False)
    for columns, rows in ((40, 16), (80, 20), (63, 60), (300, 31)):
        place = layout((64, 64), columns, rows)
        assert place.quadrants and place.columns <= columns and place.rows <= rows
        assert place.columns == 2 * place.rows  # characters are twice as high as wide
        assert len(draw(np.zeros((64, 64, 3), np.uint8), place, True)) == place.rows
    check_size(size(LEAST))
    for columns, lines in ((39, 20), (40, 19)):
        with pytest.raises(UsageError, match=rf"{columns}x{lines}.*40x20"):
            check_size(size((columns, lines)))


def test_messages_wrap_and_are_cut():
    lines = wrapped("one two three four five six", 9, 2)
    assert lines == ["one two", "three ..."] and wrapped("", 9, 2) == []


class Stub:
    """A session that records what it is asked, and fails to load."""

    next_block = 10

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_requests_go_to_the_session_and_failures_into_the_message(tmp_path):
    session, loaded, dropped = Stub(), Stub(), []
    blocks = BlockThread(
        session, Controls(ACTIONS), None, tmp_path / "a.world", lambda path: loaded, lambda: dropped.append(1)
    )
    assert "a.world" in blocks.follow("save", "") and session.calls == [("save", tmp_path / "a.world")]
    assert "6" in blocks.follow("rewind", "") and session.calls[-1] == ("rewind", 6)
    blocks.follow("load", "")
    assert blocks.session is loaded and session.calls[-1] == ("close",) and len(dropped) == 2
    blocks.follow("prompt", "a fox")
    assert loaded.calls == [("prompt", "a fox")]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_recording_has_the_frames_between_two_keys(tmp_path, suffix):
    import av

    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    (tmp_path / f"walk-1{suffix}").write_bytes(b"mine")
    recorder = Recorder(tmp_path / f"walk{suffix}", 8)
    for recording, shown in ((False, frames), (True, frames), (True, frames[:0]), (True, frames), (False, frames[:0])):
        recorder.follow(recording, shown)
    assert recorder.writer is None and recorder.stop() is None
    with av.open(str(tmp_path / f"walk-2{suffix}")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 8
    assert (tmp_path / f"walk-1{suffix}").read_bytes() == b"mine"


@pytest.mark.parametrize("closed", [False, True])
def test_without_a_terminal_it_is_refused(monkeypatch, closed):
    if closed:  # a process that is started without a standard input
        monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdin=None, stdout=sys.stdout))
    done = CliRunner().invoke(app, ["play"])
    assert done.exit_code == 2
    assert "terminal" in done.stderr and "inferix generate" in done.stderr


@pytest.mark.parametrize(("term", "encoding"), [("dumb", "utf-8"), ("", "utf-8"), ("xterm", "latin-1")])
def test_a_terminal_without_colours_or_characters_is_refused(monkeypatch, term, encoding):
    file = SimpleNamespace(isatty=lambda: True, encoding=encoding)
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdin=file, stdout=file))
    with pytest.raises(UsageError, match=term if term == "dumb" else ("TERM" if not term else encoding)):
        terminal.check_terminal({"TERM": term})


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_walk_in_a_terminal(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    model = write_untrained_world(tmp_path / "world")
    pid, file = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        os.environ.update(TERM="xterm-256color", LC_ALL="C.UTF-8")
        os.execv(sys.executable, [sys.executable, "-m", "inferix", "play", "--model", str(model), "--seconds", "2"])
    shown, pressed = b"", False
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            part = os.read(file, 1 << 16)
        except OSError:  # the other side has ended
            break
        shown += part
        if not pressed and b"FPS shown" in shown:
            os.write(file, b"\x1b[C\x1b[C")
            pressed = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown[-500:]
    text = shown.decode(errors="replace")
    assert re.search(r"1[67] frames .* 8 FPS", text)
    assert text.count("▀") >= 16 * 64 * 32
    assert "wasd walk" in text
