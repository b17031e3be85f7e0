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
    small = chosen[:, ::step, ::step].astype(np.float32) / 255
    luma = small @ LUMA
    top = small.max(-1)
    saturation = (top - small.min(-1)).sum() / max(float(top.sum()), 1e-6)
    rows = chosen[:, ::ROWS].astype(np.float32) @ LUMA / 255
    contrast = float(luma.std((1, 2)).mean())
    sharpness = float(np.abs(np.diff(rows, axis=2)).mean()) / max(contrast, 1 / 255)
    last = luma[-1]
    if len(frames) > 1:
        before = frames[-2, ::step, ::step].astype(np.float32) @ LUMA / 255
    motion = np.nan if before is None or before.shape != last.shape else float(np.abs(last - before).mean())
    bands = np.array_split(luma.mean(0), GRID)
    cells = [[cell.mean() for cell in np.array_split(band, GRID, axis=1)] for band in bands]
    layout = np.asarray(cells, dtype=np.float64).ravel()
    layout -= layout.mean()
    layout /= max(float(np.linalg.norm(layout)), 1e-6)
    return np.array([luma.mean(), contrast, saturation, sharpness, motion, *layout]), last


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
