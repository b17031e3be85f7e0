"""Scorers of pixels that need nothing but numpy.

Sharpness and saturation are ratios, so that a fade, which dims a whole picture, changes only exposure and contrast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measures import cosine
from .scorers import FunctionScorer, View

GRID = 16  # cells of `layout` across and down
DARK, BRIGHT = 4, 251  # levels of 255 beyond which a pixel counts as clipped


def exposure(view: View) -> float:
    """Mean brightness, 0 to 1."""
    return float(view.luma.mean())


def contrast(view: View) -> float:
    """Standard deviation of brightness, 0 to 0.5 (RMS contrast)."""
    return float(view.luma.std())


def saturation(view: View) -> float:
    """Sum over pixels of the largest minus the least channel, by the sum of the largest: HSV saturation, weighted by
    value.
    """
    red, green, blue = (view.frame[..., channel] for channel in range(3))
    top = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    total = int(top.sum(dtype=np.int64))
    return int((top - low).sum(dtype=np.int64)) / total if total else 0.0


def clipping(view: View) -> float:
    """Share of pixels that are almost black or almost white."""
    level = view.luma * 255
    return float(((level < DARK) | (level > BRIGHT)).mean())


def sharpness(view: View) -> float:
    """Standard deviation of the Laplacian of brightness by that of brightness.

    The square of the numerator is the usual variance of the Laplacian (Pech-Pacheco et al. 2000); the ratio does not
    change when a picture loses contrast without losing detail.
    """
    luma = view.luma
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    spread = float(luma.std())
    return float(laplacian.std()) / spread if spread > 1 / 255 else 0.0


def colour(view: View) -> NDArray[np.float64]:
    """Shares of red, green and blue in the light of a picture, [3]; a cast moves them, a fade does not."""
    sums = view.frame.sum((0, 1), dtype=np.float64)
    total = sums.sum()
    return sums / total if total else np.full(3, 1 / 3)


def colour_similarity(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """1 - half the sum of the absolute differences of shares (total variation)."""
    return np.asarray(1 - np.abs(one - other).sum(-1) / 2)


def layout(view: View) -> NDArray[np.float64]:
    """Mean brightness of 16 x 16 cells, without its mean and divided by its standard deviation, [256].

    Their cosine, the correlation of two small pictures, is lower for another scene and unchanged by a fade.
    """
    luma = view.luma
    rows, columns = (np.linspace(0, size, GRID + 1).astype(int)[:-1] for size in luma.shape)
    sums = np.add.reduceat(np.add.reduceat(luma, rows, axis=0), columns, axis=1)
    heights, widths = (np.diff([*starts, size]) for starts, size in ((rows, luma.shape[0]), (columns, luma.shape[1])))
    cells = (sums / np.outer(heights, widths)).astype(np.float64)
    cells -= cells.mean()
    spread = cells.std()
    return (cells / spread if spread > 1e-4 else np.zeros_like(cells)).ravel()


PIXEL_SCORERS = (
    FunctionScorer("exposure", "frame", exposure, "mean brightness, 0 to 1"),
    FunctionScorer("contrast", "frame", contrast, "standard deviation of brightness"),
    FunctionScorer("saturation", "frame", saturation, "share of colour in the light"),
    FunctionScorer("clipping", "frame", clipping, "share of pixels that are black or white", "lower", 0.05),
    FunctionScorer("sharpness", "frame", sharpness, "Laplacian by contrast"),
    FunctionScorer(
        "colour", "feature", colour, "shares of red, green and blue", "higher", compare=colour_similarity
    ),
    FunctionScorer("layout", "feature", layout, "16x16 picture without brightness", "higher", compare=cosine),
)  # fmt: skip
