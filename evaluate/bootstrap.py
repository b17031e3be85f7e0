"""Confidence intervals over videos by the bootstrap (Efron 1979), percentile method.

The unit that is resampled is the video: frames and segments of one video are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError, quoted
from .measures import finite

RESAMPLES = 2000
CHUNK = 1 << 20  # values drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean over videos with a confidence interval; `low` and `high` are None for fewer than two videos."""

    mean: float
    low: float | None
    high: float | None
    videos: int

    @property
    def excludes_zero(self) -> bool:
        """True if the whole interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def bootstrap_mean(values: ArrayLike, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Compute the mean of values, one for each video, and its interval; the same seed gives the same interval."""
    array = finite("values", values)
    if not len(array):
        raise UsageError("values is empty; expected one value for each video")
    if not 0 < level < 1:
        raise UsageError(f"level is {level}; expected between 0 and 1, such as 0.95")
    if resamples < 1:
        raise UsageError(f"resamples is {resamples}; expected 1 or more")
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, None, None, len(array))
    low, high = np.quantile(resampled_means(array, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(array))


def bootstrap_ratio(parts: ArrayLike, totals: ArrayLike, level: float = 0.95, seed: int = 0) -> Interval:
    """Compute sum(parts) / sum(totals), each with one value for each video, and its interval.

    Videos are resampled with both of their values. Raises UsageError for other counts or totals without a positive sum.
    """
    one, other = finite("parts", parts), finite("totals", totals)
    if len(one) != len(other) or not other.sum() > 0:
        raise UsageError(f"totals is {quoted(other.tolist())} for {len(one)} parts; expected as many, above 0 in sum")
    ratio = float(one.sum() / other.sum())
    if len(one) < 2:
        return Interval(ratio, None, None, len(one))
    means = resampled_means(other, RESAMPLES, seed)
    ratios = resampled_means(one, RESAMPLES, seed)[means > 0] / means[means > 0]
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(ratio, float(low), float(high), len(one))


def bootstrap_difference(
    before: Sequence[float], after: Sequence[float], paired: bool, level: float = 0.95, seed: int = 0
) -> Interval:
    """Compute mean(after) - mean(before) and its interval.

    paired: value k of both is of the same prompt and seed, so pairs are resampled, which narrows the interval;
    otherwise each side is resampled by itself. Raises UsageError for pairs of different counts.
    """
    one, other = finite("before", before), finite("after", after)
    if paired:
        if len(one) != len(other):
            raise UsageError(f"before has {len(one)} values and after {len(other)}; expected as many for pairs")
        return bootstrap_mean(other - one, level, seed=seed)
    if not (len(one) and len(other)):
        raise UsageError(f"before has {len(one)} values and after {len(other)}; expected one for each video")
    mean = float(other.mean() - one.mean())
    if min(len(one), len(other)) < 2:
        return Interval(mean, None, None, min(len(one), len(other)))
    means = resampled_means(other, RESAMPLES, seed) - resampled_means(one, RESAMPLES, seed + 1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), min(len(one), len(other)))


def resampled_means(array: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of `resamples` draws of as many values with replacement, in bounded memory."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, CHUNK // len(array))
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        means[start:stop] = array[generator.integers(len(array), size=(stop - start, len(array)))].mean(1)
    return means
