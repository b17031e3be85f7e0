"""Arithmetic between the programs of an engine, in numpy: noise, and the rotation of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MASK = (1 << 32) - 1


def rotated(keys: Array, angles: Array, half: int | None = None) -> Array:
    """Rotate the first pairs of channels (2j, 2j + 1) of keys [..., channels] by these angles.

    half: pairs are channels (j, j + half) instead.
    """
    cos, sin = np.cos(angles), np.sin(angles)
    if half is not None:
        turned, own = keys.copy(), len(angles)
        one, other = keys[..., :own].astype(np.float64), keys[..., half : half + own].astype(np.float64)
        turned[..., :own], turned[..., half : half + own] = one * cos - other * sin, one * sin + other * cos
        return turned
    pairs = keys[..., : 2 * len(angles)].astype(np.float64)
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    turned = np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(pairs.shape)
    return np.concatenate((turned.astype(keys.dtype), keys[..., 2 * len(angles) :]), -1)


def quantised(x: Array) -> tuple[Array, Array]:
    """Keys or values [..., P, n, c] as int8, and their scales float32 [..., n], as the programs make them."""
    scale = np.maximum(np.abs(x).max((-3, -1)), np.float32(1e-12)) / np.float32(127)
    return np.rint(x / scale[..., None, :, None]).astype(np.int8), scale.astype(np.float32)


def normals(seed: int, frames: Sequence[int], draw: int, shape: tuple[int, ...]) -> Array:
    """Normals float32 [F, *shape] of absolute frames by Philox4x32-10; see `noise` in the plan."""
    count = math.prod(shape)
    quads = np.arange((count + 3) // 4, dtype=np.uint64)
    words: list[Array] = [np.broadcast_to(quads, (len(frames), len(quads))), np.asarray(frames, np.uint64)[:, None],
             np.array(draw, np.uint64), np.array(0, np.uint64)]  # fmt: skip
    key, low = [seed & MASK, seed >> 32], np.uint64(MASK)
    for _ in range(10):
        first: Array = words[0] * np.uint64(0xD2511F53)
        second: Array = words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]), second & low,
            (first >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]), first & low,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    uniform = np.stack(np.broadcast_arrays(*words), -1).astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    u = uniform.astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0::2])), 2 * math.pi * u[..., 1::2]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1).astype(np.float32)
    return pairs.reshape(len(frames), -1)[:, :count].reshape(len(frames), *shape)
