"""Live drift of a session: signals of the pictures of each block, against those of its first two seconds.

Meant to cost far less than a block: brightness and motion are read from at most 128 pixels a side, sharpness from every
eighth row, and only of four frames of a block. `inferix.evaluate` measures finished videos thoroughly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BASELINE_SECONDS = 2.0
SAMPLES = 4  # frames of a block
SIDE = 128  # pixels across and down that are read, at most
ROWS = 8  # one in so many rows is read for sharpness
GRID = 8  # cells of the layout across and down
# The least level of each signal that a change is divided by.
FLOORS = {"brightness": 0.02, "contrast": 0.02, "saturation": 0.02, "sharpness": 0.02, "motion": 0.002}
SIGNALS = tuple(FLOORS)
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # BT.709

Frames = NDArray[np.uint8]


def block_signals(frames: Frames, before: NDArray[Any] | None) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Signals of a block's frames uint8 [T, H, W, 3], and its last brightness picture, `before` of the next block.

    The signals are `SIGNALS` and a layout of 64 numbers: brightness of 8 x 8 cells, its mean taken out, of length 1.
    Motion is the mean absolute difference of the last two frames, NaN for the first frame of a session.
    """
    height, width = frames.shape[1:3]
    step = max(1, -(-max(height, width) // SIDE))
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, min(SAMPLES, len(frames))).astype(int))]
    small = chosen[:, ::step, ::step]
    red, green, blue = (np.ascontiguousarray(small[..., channel]) for channel in range(3))
    luma = brightness(small)
    top, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    total = int(top.sum(dtype=np.int64))
    saturation = (total - int(low.sum(dtype=np.int64))) / max(total, 1)
    contrast = float(luma.std((1, 2)).mean())
    rows = brightness(chosen[:, ::ROWS])
    sharpness = float(np.abs(rows[..., 1:] - rows[..., :-1]).mean()) / max(contrast, 1 / 255)
    last = luma[-1]
    if len(frames) > 1:
        before = brightness(frames[-2, ::step, ::step])
    motion = np.nan if before is None or before.shape != last.shape else float(np.abs(last - before).mean())
    layout = cell_means(luma.mean(0))
    layout -= layout.mean()
    layout /= max(float(np.linalg.norm(layout)), 1e-6)
    return np.array([luma.mean(), contrast, saturation, sharpness, motion, *layout]), last


def brightness(frames: Frames) -> NDArray[np.float32]:
    """BT.709 brightness of frames [..., 3], 0 to 1; channel by channel, since numpy is slow along an axis of three."""
    red, green, blue = (frames[..., channel] * (LUMA[channel] / np.float32(255)) for channel in range(3))
    red += green
    red += blue
    return np.asarray(red)


def cell_means(picture: NDArray[np.float32]) -> NDArray[np.float64]:
    """Means of `GRID` x `GRID` cells of a picture [H, W], row by row [GRID * GRID]."""
    rows, columns = (np.linspace(0, size, GRID + 1).astype(int) for size in picture.shape)
    sums = np.add.reduceat(np.add.reduceat(picture, rows[:-1], axis=0), columns[:-1], axis=1)
    counts = np.outer(np.maximum(np.diff(rows), 1), np.maximum(np.diff(columns), 1))  # a narrow picture repeats rows
    return (sums / counts).astype(np.float64).ravel()


class DriftMeter:
    """The change of a session's pictures against its first two seconds, or the first two after a prompt change."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.before: NDArray[Any] | None = None
        self.frames = 0  # of the baseline
        self.blocks: list[NDArray[np.float64]] = []
        self.baseline: NDArray[np.float64] | None = None

    def read(self, frames: Frames) -> NDArray[np.float64]:
        """Signals of the next block, for `compare`."""
        signals, self.before = block_signals(frames, self.before)
        return signals

    def compare(self, signals: NDArray[np.float64], frames: int, restart: bool = False) -> dict[str, float]:
        """Changes of a block's signals as shares of the baseline, and of the layout as 1 - correlation.

        frames: count of the block's frames. restart: the block is the first of a new prompt. Empty while the baseline
        is measured.
        """
        if restart:
            self.frames, self.blocks, self.baseline = 0, [], None
        if self.baseline is None:
            self.blocks.append(signals)
            self.frames += frames
            if self.frames >= BASELINE_SECONDS * self.fps:
                blocks = np.array(self.blocks)
                there = np.isfinite(blocks)
                self.baseline = np.where(there, blocks, 0).sum(0) / np.maximum(there.sum(0), 1)
                self.blocks = []
            return {}
        count = len(SIGNALS)
        now, then = signals[:count], self.baseline[:count]
        moved = (now - then) / np.maximum(np.abs(then), list(FLOORS.values()))
        changes = {name: float(value) for name, value in zip(SIGNALS, moved, strict=True) if np.isfinite(value)}
        layout = self.baseline[count:]
        correlation = float(signals[count:] @ layout) / max(float(np.linalg.norm(layout)), 1e-6)
        return {**changes, "layout": 1 - correlation}
