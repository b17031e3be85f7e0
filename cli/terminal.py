"""Pictures in a terminal: half blocks where they fit, else quadrants; true colours, or else 256."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, quoted

Pixels = NDArray[np.uint8]  # [H, W, 3]
LEAST = (40, 20)  # characters
QUADRANTS = " ▘▝▀▖▌▞▛▗▚▐▜▄▙▟█"  # bits of the index: upper left, upper right, lower left, lower right
CUBE = np.array([0, 95, 135, 175, 215, 255])  # levels of the 6x6x6 colours from 16 on
GREYS = 8 + 10 * np.arange(24)  # levels of the greys from 232 on


def check_terminal(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError unless stdin and stdout are a terminal that can show pictures."""
    if not all(file is not None and file.isatty() for file in (sys.stdin, sys.stdout)):  # None: closed
        raise UsageError("play needs a terminal for keys and pictures; use inferix generate to write a file")
    if environment.get("TERM", "dumb") in ("dumb", ""):
        raise UsageError(f"TERM is {quoted(environment.get('TERM', ''))}; expected a terminal with colours")
    if "utf" not in (sys.stdout.encoding or "").lower():
        encoding = quoted(sys.stdout.encoding)
        raise UsageError(f"the terminal's encoding is {encoding}; expected UTF-8: set LC_ALL=C.UTF-8")
    check_size(os.get_terminal_size())


def check_size(terminal: os.terminal_size) -> None:
    """Raise UsageError for a terminal smaller than `LEAST`."""
    if terminal.columns < LEAST[0] or terminal.lines < LEAST[1]:
        raise UsageError(
            f"the terminal has {terminal.columns}x{terminal.lines} characters; play needs {LEAST[0]}x{LEAST[1]}: "
            "enlarge the window or reduce the font size"
        )


def has_true_colour(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if the environment names a terminal with 24-bit colours."""
    return environment.get("COLORTERM", "").lower() in ("truecolor", "24bit") or "direct" in environment.get("TERM", "")


@dataclass(frozen=True)
class Layout:
    """Place of a picture in a terminal. columns, rows: of characters. left: spaces before it. quadrants: 2 x 2 parts of
    a character, of two colours; else its upper and lower half.
    """

    columns: int
    rows: int
    left: int
    quadrants: bool


def layout(size: tuple[int, int], columns: int, rows: int) -> Layout:
    """Fit a picture (width, height) into characters: the largest whole scale of half blocks, else quadrants."""
    width, height = size
    scale = min(columns // width, 2 * rows // height)
    if scale:
        across, down = width * scale, -(-height * scale // 2)
    else:
        down = min(rows, max(1, columns * height // (2 * width)))
        across = min(columns, max(1, 2 * down * width // height))
    return Layout(across, down, (columns - across) // 2, not scale)


def draw(frame: Pixels, place: Layout, true_colour: bool) -> list[str]:
    """Draw a picture [H, W, 3] as rows of characters with their colours."""
    if place.quadrants:
        glyphs, front, back = quadrants(resized(frame, 2 * place.rows, 2 * place.columns))
    else:
        halves = resized(frame, 2 * place.rows, place.columns)
        front, back = halves[0::2], halves[1::2]
        glyphs = np.full(front.shape[:2], QUADRANTS.index("▀"))
    colours = np.concatenate([front, back], axis=2)
    codes = colours if true_colour else np.stack([palette_index(front), palette_index(back)], axis=2)
    pattern = "\x1b[38;2;{};{};{};48;2;{};{};{}m" if true_colour else "\x1b[38;5;{};48;5;{}m"
    lines = []
    for glyph_row, code_row in zip(glyphs.tolist(), codes.tolist(), strict=True):
        line, last = [" " * place.left], None
        for glyph, code in zip(glyph_row, code_row, strict=True):
            if code != last:
                line.append(pattern.format(*code))
                last = code
            line.append(QUADRANTS[glyph])
        lines.append("".join(line) + "\x1b[0m")
    return lines


def resized(frame: Pixels, height: int, width: int) -> Pixels:
    """Resize a picture: pixels become squares where it grows by whole numbers, and are averaged where it shrinks."""
    if frame.shape[:2] == (height, width):
        return frame
    if height % frame.shape[0] == 0 and width % frame.shape[1] == 0:
        return frame.repeat(height // frame.shape[0], 0).repeat(width // frame.shape[1], 1)
    rows, columns = averages(frame.shape[0], height), averages(frame.shape[1], width)
    mixed = np.einsum("yh,hwc,xw->yxc", rows, frame.astype(np.float32), columns, optimize=True)
    return np.rint(mixed).astype(np.uint8)


def averages(before: int, after: int) -> NDArray[np.float32]:
    """Return the weights [after, before] of resampling by area along one axis."""
    edges = np.linspace(0, before, after + 1)
    low, high = np.maximum(edges[:-1, None], np.arange(before)), np.minimum(edges[1:, None], np.arange(before) + 1)
    weights = np.clip(high - low, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def quadrants(frame: Pixels) -> tuple[NDArray[np.int64], Pixels, Pixels]:
    """Split a picture [2 R, 2 C, 3] into glyph numbers [R, C] and their two colours [R, C, 3].

    The parts of a character that are brighter than its mean have the one colour, the others the other.
    """
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    parts = frame.reshape(height, 2, width, 2, 3).transpose(0, 2, 1, 3, 4).reshape(height, width, 4, 3)
    parts = parts.astype(np.float32)
    light = parts @ np.array([0.299, 0.587, 0.114], np.float32)
    bright = light > light.mean(2, keepdims=True)
    glyphs = (bright * np.array([1, 2, 4, 8])).sum(2)
    whole = parts.mean(2)

    def mean(mask: NDArray[np.bool_]) -> Pixels:
        count = mask.sum(2)[..., None]
        colour = (parts * mask[..., None]).sum(2) / np.maximum(count, 1)
        return np.rint(np.where(count > 0, colour, whole)).astype(np.uint8)

    return glyphs, mean(bright), mean(~bright)


def palette_index(colours: Pixels) -> NDArray[np.int64]:
    """Return the nearest of xterm's colours 16 to 255 for each colour [..., 3]."""
    values = colours.astype(np.int64)
    steps = np.abs(values[..., None] - CUBE).argmin(-1)  # [..., 3]
    grey = np.abs(values.mean(-1)[..., None] - GREYS).argmin(-1)
    of_cube = ((values - CUBE[steps]) ** 2).sum(-1)
    of_grey = ((values - GREYS[grey][..., None]) ** 2).sum(-1)
    cube = 16 + steps @ np.array([36, 6, 1])
    return np.where(of_grey < of_cube, 232 + grey, cube)
