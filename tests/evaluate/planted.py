"""A small world whose statistics are the same in every second, and drifts that are planted in it.

A textured square goes around a circle once a second before a textured background.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

FPS = 12
SIZE = 64
SECONDS = 6
LUMA = np.array([0.2126, 0.7152, 0.0722])
DRIFTS = ("none", "fade", "colour cast", "blur", "freeze", "scene change", "flicker")


def texture(seed: int, size: int) -> np.ndarray:
    """Smooth random colours around grey, float [size, size, 3]."""
    generator = np.random.default_rng(seed)
    picture = np.full((size, size, 3), 118.0)
    for cells, depth in ((size // 8, 48), (size // 4, 32), (size // 2, 24)):
        grey, hue = generator.uniform(-1, 1, (cells, cells, 1)), generator.uniform(-0.5, 0.5, (cells, cells, 3))
        picture += depth * cv2.resize(grey + hue, (size, size), interpolation=cv2.INTER_CUBIC)
    return picture


def world(seed: int, count: int) -> Iterator[np.ndarray]:
    background, square = texture(seed, SIZE), texture(100, 16) * 0.8
    for frame in range(count):
        angle = 2 * np.pi * frame / FPS
        row, column = round(24 + 16 * np.sin(angle)), round(24 + 16 * np.cos(angle))
        picture = background.copy()
        picture[row : row + 16, column : column + 16] = square
        yield picture


def planted(drift: str, seconds: int = SECONDS) -> Iterator[np.ndarray]:
    """Frames uint8 [64, 64, 3] with a drift that grows from the first frame on, or starts in the middle."""
    count = seconds * FPS
    still = None
    for index, (picture, other) in enumerate(zip(world(0, count), world(5, count), strict=True)):
        part, late = index / (count - 1), index >= count // 2
        if drift == "fade":
            picture = picture * (1 - 0.5 * part)
        elif drift == "colour cast":
            tint = np.array([1 + 0.3 * part, 1.0, 1 - 0.5 * part])
            picture = picture * tint / (tint @ LUMA)
        elif drift == "blur" and index:
            picture = cv2.GaussianBlur(picture, (0, 0), 1.5 * part)
        elif drift == "scene change" and late:
            picture = other
        elif drift == "flicker":
            picture = picture * (1 + 0.15 * part * (-1) ** index)
        if drift != "freeze" or not late or still is None:
            still = picture
        yield np.clip(np.rint(still), 0, 255).astype(np.uint8)
