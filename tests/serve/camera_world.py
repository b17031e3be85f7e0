"""A served world with a camera, and the same stream of a library session, which its pictures are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from oracles import SIZE
from PIL import Image

import inferix
from inferix.runtime.engine import Engine
from inferix.schemes.camera import Camera, CameraMove
from inferix.serve.engine_host import engine_limits
from inferix.serve.settings import ServeSettings

ROUNDING = 1  # of 255 that pictures of two engines may differ by, on average


def camera_engine(settings: ServeSettings, **overrides: Any) -> Engine:
    return inferix.load("lingbot-tiny", device="cpu", limits=engine_limits(settings), rewind_blocks=4, **overrides)


def first_picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    """Write a picture of a few coloured squares."""
    squares = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(squares).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def replayed(
    engine: Engine, opening: dict[str, Any], moves: Mapping[int, Sequence[CameraMove]], blocks: int
) -> list[np.ndarray]:
    """Pictures [T, H, W, 3] of each block of a session that is given some moves just before a block begins."""
    made = []
    with engine.open(camera=Camera(), **opening) as session:
        for index in range(blocks):
            for move in moves.get(index, ()):
                session.move(move)
            (block,) = session.stream(1)
            made.append(block.frames)
    return made


def differences(pictures: Sequence[tuple[int, int, np.ndarray]], blocks: Sequence[np.ndarray]) -> dict[int, float]:
    """Mean difference of shown pictures (block, place in it, picture) to those of a replay, the largest by block."""
    result: dict[int, float] = {}
    for block, place, picture in pictures:
        expected = blocks[block][place].astype(int)
        assert picture.shape == expected.shape
        result[block] = max(result.get(block, 0.0), float(np.abs(picture - expected).mean()))
    return result
