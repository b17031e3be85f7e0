"""Scorers that need OpenCV: structural similarity, optical flow and what follows from it; and BRISQUE by a package.

Flow is computed on pictures of at most 416 pixels across (`scorers.FLOW_SIDE`). Its size depends on the method: a
figure of another flow, such as Farneback's or RAFT's, is not comparable.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scorers import FunctionScorer, View

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003
SSIM_SIGMA, SSIM_WINDOW = 1.5, 11  # Wang et al. 2004
SSIM_CONSTANTS = (0.01**2, 0.03**2)  # for values from 0 to 1
STILL = 0.5  # pixels of flow up to which a region is still
LEAST_STILL = 0.01  # share of pixels below which a frame has no still region
MOVING_TOP = 0.05  # share of pixels with the most flow
MOVING_SPEED = 6 / 256 * 8  # of the short side each second: VBench's threshold, 6 of 256 pixels at 8 frames a second


def blurred(values: NDArray[Any]) -> NDArray[Any]:
    """Gaussian mean over the window of SSIM, without the border where the window leaves the picture."""
    import cv2

    edge = SSIM_WINDOW // 2
    return np.asarray(cv2.GaussianBlur(values, (SSIM_WINDOW, SSIM_WINDOW), SSIM_SIGMA)[edge:-edge, edge:-edge])


def ssim_terms(one: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[float, float]:
    """Mean SSIM of two pictures [H, W] from 0 to 1, and the mean of its contrast and structure term alone.

    Wang et al. 2004: Gaussian window of 11 with sigma 1.5, K = (0.01, 0.03), population moments.
    """
    mean_one, mean_other = blurred(one), blurred(other)
    variance_one = blurred(one * one) - mean_one**2
    variance_other = blurred(other * other) - mean_other**2
    covariance = blurred(one * other) - mean_one * mean_other
    first, second = SSIM_CONSTANTS
    structure = (2 * covariance + second) / (variance_one + variance_other + second)
    luminance = (2 * mean_one * mean_other + first) / (mean_one**2 + mean_other**2 + first)
    return float((luminance * structure).mean()), float(structure.mean())


def ms_ssim(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Multi-scale SSIM (Wang et al. 2003): five scales by means of 2 x 2 pixels; 176 pixels or more each way.

    A negative structure term counts as 0.
    """
    import cv2

    product = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        whole, structure = ssim_terms(one, other)
        product *= max(0.0, whole if scale == len(MS_SSIM_WEIGHTS) - 1 else structure) ** weight
        height, width = one.shape[0] // 2 * 2, one.shape[1] // 2 * 2
        one, other = (
            np.asarray(cv2.resize(part[:height, :width], (width // 2, height // 2), interpolation=cv2.INTER_AREA),
                       np.float32)
            for part in (one, other)
        )  # fmt: skip
    return product


def ssim_to_start(view: View) -> float:
    """SSIM to the most similar of the references, frames of the first second."""
    return max(ssim_terms(view.luma, reference.luma)[0] for reference in view.references)


def ms_ssim_to_start(view: View) -> float:
    """MS-SSIM to the most similar of the references."""
    return max(ms_ssim(view.luma, reference.luma) for reference in view.references)


def motion(view: View) -> float:
    """Mean length of flow, short sides of the picture each second."""
    return float(view.speed.mean())


def moving(view: View) -> float:
    """1 if the 5 % of pixels with the most flow move faster than VBench's threshold for a dynamic pair, else 0.

    The mean over a segment is the share of moving pairs. VBench's dynamic degree is yes or no for a whole video, by
    RAFT, so it can make VDE infinite.
    """
    count = max(1, round(MOVING_TOP * view.speed.size))
    fastest = np.partition(view.speed, view.speed.size - count, axis=None)[-count:]
    return float(fastest.mean() > MOVING_SPEED)


def warp_error(view: View) -> float:
    """Mean absolute difference of the previous frame and this frame warped back by flow, 0 to 1.

    The gain and offset that fit best are taken out first, so that a change of brightness is not an error; pixels that
    flow takes out of the picture are left out.
    """
    import cv2

    assert view.previous is not None
    height, width = view.flow_luma.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = x + view.flow[..., 0], y + view.flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if not inside.any():
        return 0.0
    back = cv2.remap(view.flow_luma.astype(np.float32), x, y, cv2.INTER_LINEAR)[inside]
    before = view.previous.flow_luma.astype(np.float32)[inside]
    back, before = back - back.mean(), before - before.mean()
    energy = float(back @ back)
    gain = float(back @ before) / energy if energy else 0.0
    return float(np.abs(gain * back - before).mean()) / 255


def flicker(view: View) -> float:
    """Mean of |L(t) - 2 L(t - 1) + L(t - 2)| / 2 where nothing moves, 0 to 1; NaN without a still region.

    A second difference, so that a fade is not flicker. Still: at most 0.5 pixels of flow in both pairs. VBench's
    temporal flickering is the mean absolute difference of neighbouring frames, motion included.
    """
    assert view.previous is not None
    if view.previous.previous is None:
        return float("nan")
    limit = STILL * view.fps / min(view.speed.shape)
    still = (view.speed <= limit) & (view.previous.speed <= limit)
    if still.mean() < LEAST_STILL:
        return float("nan")
    now, before, earlier = (
        part.flow_luma.astype(np.float32) for part in (view, view.previous, view.previous.previous)
    )
    return float(np.abs(now - 2 * before + earlier)[still].mean()) / 510


@cache
def brisque_model() -> Any:
    from brisque import BRISQUE

    return BRISQUE(url=False)


def brisque(view: View) -> float:
    """BRISQUE (Mittal et al. 2012) by the package `brisque`, whose wheel carries its SVM; 0 is best, 100 is bad."""
    return float(brisque_model().score(view.frame))


FLOW_SCORERS = (
    FunctionScorer(
        "ssim_to_start", "frame", ssim_to_start, "SSIM to the first second", "higher", 0.05, package="cv2"
    ),
    FunctionScorer(
        "ms_ssim_to_start", "frame", ms_ssim_to_start, "MS-SSIM to the first second", "higher", 0.05, smallest=176,
        package="cv2",
    ),
    FunctionScorer("motion", "pair", motion, "mean DIS flow, short sides a second", floor=0.02, package="cv2"),
    FunctionScorer("moving_share", "pair", moving, "share of moving pairs", floor=0.1, package="cv2"),
    FunctionScorer(
        "warp_error", "pair", warp_error, "difference after warping by flow", "lower", 0.01, package="cv2"
    ),
    FunctionScorer(
        "flicker", "pair", flicker, "brightness that alternates where nothing moves", "lower", 0.01, partial=True,
        package="cv2",
    ),
    FunctionScorer(
        "brisque", "frame", brisque, "BRISQUE by the package brisque", "lower", 5.0, smallest=32, package="brisque"
    ),
)  # fmt: skip
