"""Counter-based normal noise: Philox4x32-10 words, and Box-Muller normals from them.

Noise is a function of (seed, frame, draw, stream), not a stream that is consumed: a frame has the same noise
whatever was drawn before it, in blocks of any size, on any device.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of `counter` int64 [..., 4], each entry a 32-bit word; returns words of the same form."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; int64 wraps round, which leaves the bits of both words as they are."""
    product = words * factor
    return (product >> 32) & MASK, product & MASK


def normals(words: Tensor) -> Tensor:
    """Standard normals, float32 [..., 4], from words int64 [..., 4].

    Words (0, 1) give elements 0 and 1, words (2, 3) give 2 and 3: radius from the first of a pair, angle
    from the second. A word w becomes the float32 number fl(w) / 2^32 + 2^-33, in (0, 1].
    """
    uniform = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = 2.0 * math.pi * uniform[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2).float()


def philox_normals(
    seed: int, frames: range, draw: int, shape: tuple[int, int, int], stream: int = 0, device: str = "cpu"
) -> Tensor:
    """Normals, float32 [F, C, H, W], for absolute latent frames `frames`, each of `shape` (C, H, W).

    The counter is (element // 4 in the frame, absolute frame, draw, stream) and the key is the 64-bit seed.
    """
    elements = math.prod(shape)
    quads = torch.arange((elements + 3) // 4, device=device)
    counters = torch.empty(len(frames), len(quads), 4, dtype=torch.int64, device=device)
    counters[..., 0] = quads
    counters[..., 1] = torch.arange(frames.start, frames.stop, frames.step, device=device)[:, None]
    counters[..., 2] = draw
    counters[..., 3] = stream
    words = philox4x32(counters, (seed & MASK, (seed >> 32) & MASK))
    return normals(words).flatten(1)[:, :elements].reshape(len(frames), *shape)
