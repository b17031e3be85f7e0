"""YUV4MPEG2: uncompressed video that every tool reads, written with numpy alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from .files import PartFile, check_output

STDOUT = Path("-")


class Y4mWriter:
    """Writes frames to a file that ends in .y4m, or to stdout for `-`; frames written before an error stay.

    fps: whole frames per second. size: (W, H). Colours are YUV 4:4:4 of BT.601 in limited range.
    """

    def __init__(self, path: Path, fps: int, size: tuple[int, int]) -> None:
        self.part = None if path == STDOUT else PartFile(check_output(path))
        self.file: BinaryIO = sys.stdout.buffer if self.part is None else self.part.part.open("wb")
        self.file.write(f"YUV4MPEG2 W{size[0]} H{size[1]} F{fps}:1 Ip A1:1 C444\n".encode())
        self.frames = 0

    def __enter__(self) -> Self:
        return self

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Append uint8 RGB frames [T, H, W, 3]."""
        for frame in frames:
            self.file.write(b"FRAME\n" + yuv444(frame).tobytes())
        self.frames += len(frames)

    def __exit__(self, *_: object) -> None:
        self.file.flush()
        if self.part is not None:
            self.file.close()
            self.part.keep() if self.frames else self.part.discard()


def yuv444(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Planes Y, U, V, uint8 [3, H, W], of an RGB frame uint8 [H, W, 3]: BT.601, limited range."""
    r, g, b = np.moveaxis(frame.astype(np.float64) / 255, -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = np.stack((16 + 219 * y, 128 + 224 * (b - y) / 1.772, 128 + 224 * (r - y) / 1.402))
    return np.rint(planes).astype(np.uint8)
