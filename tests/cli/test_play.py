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

from inferix.cli import play
from inferix.cli.main import app
from inferix.cli.play import KEY_SECONDS, Controls, fitting_scale, half_blocks, split_keys
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
    assert list(controls.prompts) == ["a fox"]
    assert not controls.quit
    for key in ("p", "x", "\x1b"):
        controls.key(key)
    assert controls.line is None
    assert len(controls.prompts) == 1
    controls.key("q")
    assert controls.quit


def test_two_pixels_make_a_character():
    frame = np.zeros((4, 3, 3), np.uint8)
    frame[0] = (255, 0, 0)
    text = half_blocks(frame, 1)
    assert text.count("▀") == 6
    assert "\x1b[38;2;255;0;0;48;2;0;0;0m" in text
    assert half_blocks(frame, 2).count("▀") == 24


def test_a_terminal_may_be_too_small_or_large_enough_for_more():
    size = os.terminal_size
    assert fitting_scale((64, 64), size((64, 35))) == 1
    assert fitting_scale((64, 64), size((200, 80))) == 2
    with pytest.raises(UsageError, match=r"80x24.*64x35"):
        fitting_scale((64, 64), size((80, 24)))


@pytest.mark.parametrize("closed", [False, True])
def test_without_a_terminal_it_is_refused(monkeypatch, closed):
    if closed:  # a process that is started without a standard input
        monkeypatch.setattr(play, "sys", SimpleNamespace(stdin=None, stdout=sys.stdout))
    done = CliRunner().invoke(app, ["play"])
    assert done.exit_code == 2
    assert "terminal" in done.stderr and "inferix generate" in done.stderr


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
        os.execv(sys.executable, [sys.executable, "-m", "inferix", "play", "--model", str(model), "--seconds", "2"])
    shown, pressed = b"", False
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            part = os.read(file, 1 << 16)
        except OSError:  # the other side has ended
            break
        shown += part
        if not pressed and b"FPS made" in shown:
            os.write(file, b"\x1b[C\x1b[C")
            pressed = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown[-500:]
    text = shown.decode(errors="replace")
    assert re.search(r"1[67] frames .* 8 FPS", text)
    assert text.count("▀") >= 16 * 64 * 32
    assert "arrows: walk" in text
