"""Drift of a video from the scores of its segments: VDE as published, a corrected VDE, and measures of other suites.

Pure numbers: scores in, figures out, whatever gave the scores. A score is one number of a frame, of a pair of
neighbouring frames or of a segment; a feature is a vector of a frame.

Sources: LV-Bench and InterVBench, `vde.py` (github.com/alibaba-damo-academy/Inferix); BlockVid, where VDE was defined;
VBench-Long, `vbench2_beta_long/utils.py` (github.com/Vchitect/VBench, commit 03c285a); Helios' benchmark; VBench
issue 206; Forcing-KV (arXiv 2605.09681).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError, nearest, quoted

Better = Literal["higher", "lower", "neither"]
Similarity = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
Segments = list[tuple[int, int]]

VDE_WEIGHTS = ("linear", "log")
VDE2_WEIGHTS = ("early", "uniform", "late")
START_END_SHARE = 0.15  # of the frames, in Helios' benchmark
LAGS = (2, 5, 10, 20, 50)  # frames, in VBench issue 206


def segments_of(count: int, segments: int = 10) -> Segments:
    """Cut `count` frames into equal contiguous segments, (start, stop) each; the remainder at the end is dropped.

    This is LV-Bench's rule. Raises UsageError if there are fewer frames than segments.
    """
    if segments < 1:
        raise UsageError(f"segments is {segments}; expected 1 or more")
    length = count // segments
    if length < 1:
        raise UsageError(f"count is {count} frames, fewer than segments={segments}; give a longer video or fewer")
    return [(index * length, (index + 1) * length) for index in range(segments)]


def spans_of(count: int, segments: int = 10, switches: Sequence[int] = ()) -> list[Segments]:
    """Cut the frames between prompt switches into segments that no switch divides; one list for each prompt.

    switches: frame indices at which the prompt changes, ascending. Every segment has the length that `segments_of`
    gives the whole video, and each prompt's remainder is dropped. A prompt that is shorter is one segment.
    Without switches this is `segments_of`, in one list.
    """
    ((_, length), *_) = segments_of(count, segments)
    borders = [0, *switches, count]
    if any(later <= earlier for earlier, later in pairwise(borders)):
        raise UsageError(f"switches is {quoted(list(switches))}; expected ascending frames from 1 to {count - 1}")
    spans = []
    for start, stop in pairwise(borders):
        size = min(length, stop - start)
        spans.append([(first, first + size) for first in range(start, stop - size + 1, size)])
    if not switches:
        spans = [spans[0][:segments]]
    return spans


def vde(scores: ArrayLike, weights: str = "linear") -> float:
    """Compute LV-Bench's Video Drift Error of segment scores m [N], as its code does.

    VDE = sum over i = 2..N of w_i |m_i - m_1| / m_1, with w_i = N - i + 1 (linear) or ln(N - i + 1) (log, so that the
    last segment has no weight). The sum is not divided by the weights, and a negative m_1 gives a negative VDE.
    N < 2 gives 0, and m_1 = 0 gives infinity whatever follows. See `vde2` for a form without these properties.
    """
    if weights not in VDE_WEIGHTS:
        raise UsageError(f"weights is {quoted(weights)}{nearest(weights, VDE_WEIGHTS)}; expected linear or log")
    values = finite("scores", scores)
    count = len(values)
    if count < 2:
        return 0.0
    if values[0] == 0:
        return math.inf
    order = count - np.arange(2, count + 1) + 1.0
    factors = order if weights == "linear" else np.log(order)
    return float(np.sum(factors * np.abs(values[1:] - values[0]) / values[0]))


@dataclass(frozen=True)
class Drift:
    """Weighted mean change of segment scores against the first segment, as shares of the first.

    absolute: change whatever its direction. signed: above 0 if the scores improve (if they rise, for scores of which
    neither direction is better). loss: only what gets worse; equal to `absolute` where neither is better.
    """

    absolute: float
    signed: float
    loss: float


def vde2(
    scores: ArrayLike,
    weights: str = "uniform",
    better: Better = "neither",
    floor: float = 0.0,
    spans: Sequence[int] | None = None,
) -> Drift:
    """Compute the corrected drift error of segment scores m [N].

    d_i = (m_i - m_1) / max(|m_1|, floor), and absolute = sum over i = 2..N of w_i |d_i| / sum of w_i, with w_i = 1
    (uniform), i - 1 (late) or N - i + 1 (early). So it is a mean change, independent of N, and finite for m_1 = 0 if
    floor > 0. floor: the smallest score that counts as the first; for m_1 = 0 without it a change is infinite.
    spans: count of segments of each prompt; each is compared with its own first segment, and a prompt with one segment
    is left out. Raises UsageError if no segment has one before it to compare with.
    """
    if weights not in VDE2_WEIGHTS:
        expected = ", ".join(VDE2_WEIGHTS)
        raise UsageError(f"weights is {quoted(weights)}{nearest(weights, VDE2_WEIGHTS)}; expected one of {expected}")
    if better not in ("higher", "lower", "neither"):
        raise UsageError(f"better is {quoted(better)}; expected higher, lower or neither")
    if not 0 <= floor < math.inf:
        raise UsageError(f"floor is {floor}; expected a finite number, 0 or more")
    values = finite("scores", scores)
    sizes = [len(values)] if spans is None else list(spans)
    if sum(sizes) != len(values) or min(sizes, default=0) < 1:
        raise UsageError(f"spans is {quoted(sizes)}; expected counts that add up to the {len(values)} scores")
    if max(sizes) < 2:
        raise UsageError(f"scores has {len(values)} segments in {len(sizes)} spans; expected a span of 2 or more")
    total = np.zeros(3)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        if size > 1:
            total += (size - 1) * np.array(span_drift(values[start : start + size], weights, better, floor))
    return Drift(*(total / sum(size - 1 for size in sizes)).tolist())


def span_drift(values: NDArray[Any], weights: str, better: Better, floor: float) -> tuple[float, float, float]:
    """Absolute, signed and lost change of the segments of one prompt."""
    size = len(values)
    later = np.arange(1.0, size)
    factors = {"early": size - later, "uniform": np.ones(size - 1), "late": later}[weights]
    factors /= factors.sum()
    base = max(abs(values[0]), floor)
    moved = values[1:] - values[0]
    change = moved / base if base else np.where(moved == 0, 0.0, np.copysign(math.inf, moved))
    if better == "lower":
        change = -change
    worse = np.abs(change) if better == "neither" else np.maximum(-change, 0)
    return weighted(factors, np.abs(change)), weighted(factors, change), weighted(factors, worse)


def weighted(factors: NDArray[Any], values: NDArray[Any]) -> float:
    """Sum of products; infinite values of both signs give NaN, as they have no mean."""
    if np.isposinf(values).any() and np.isneginf(values).any():
        return math.nan
    return float(np.sum(factors * values))


def start_end_difference(scores: ArrayLike, share: float = START_END_SHARE) -> float:
    """Compute |mean of the first 15 % of frame scores - mean of the last 15 %|, as in Helios' benchmark.

    The count of frames is rounded down, to 1 at least.
    """
    values = finite("scores", scores)
    if not 0 < share <= 0.5:
        raise UsageError(f"share is {share}; expected above 0, at most 0.5")
    if len(values) < 2:
        raise UsageError(f"scores has {len(values)} values; expected 2 or more")
    count = max(1, int(len(values) * share))
    return float(abs(values[:count].mean() - values[-count:].mean()))


def cosine(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Cosine of vectors along the last axis; 0 where a vector is 0."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return np.asarray(np.sum(one * other, axis=-1) / np.where(lengths == 0, 1, lengths))


def segment_consistency(features: ArrayLike, similarity: Similarity = cosine) -> float:
    """Compute VBench's consistency of the frames of one segment, features [T, D].

    The mean over frames 2..T of (similarity to the first + similarity to the previous) / 2, each floored at 0. LV-Bench
    uses it for subject (DINO) and background (CLIP). It sees nothing of a drift between segments.
    """
    values = finite("features", features, 2)
    if len(values) < 2:
        raise UsageError(f"features has {len(values)} frames; expected 2 or more in a segment")
    first = np.maximum(similarity(values[1:], values[0]), 0)
    previous = np.maximum(similarity(values[1:], values[:-1]), 0)
    return float(np.mean((first + previous) / 2))


def start_similarity(features: ArrayLike, spans: Sequence[Segments], similarity: Similarity = cosine) -> list[float]:
    """Mean similarity of the frames of each segment to the mean feature of the first segment of its prompt.

    features: [T, D] of all frames. One value for each segment of `spans`, in order.
    """
    values = finite("features", features, 2)
    scores = []
    for span in spans:
        first = values[slice(*span[0])].mean(0)
        scores += [float(np.mean(similarity(values[start:stop], first))) for start, stop in span]
    return scores


def lag_similarity(
    features: ArrayLike, lags: Sequence[int] = LAGS, similarity: Similarity = cosine
) -> dict[int, NDArray[Any]]:
    """Compute the similarity of each frame to the one `lag` frames before: lag to curve [T - lag].

    Lags that are not shorter than the video are left out. The mean of a curve is the figure of VBench issue 206; the
    curve shows where it falls.
    """
    values = finite("features", features, 2)
    if not all(lag > 0 for lag in lags):
        raise UsageError(f"lags is {quoted(list(lags))}; expected frames, 1 or more")
    return {lag: similarity(values[lag:], values[:-lag]) for lag in lags if lag < len(values)}


def border_jump(motion: ArrayLike, borders: Sequence[int]) -> dict[str, float]:
    """Compare the jump of optical flow at block borders with that elsewhere.

    motion: mean flow of each pair of neighbouring frames [T - 1], the pair (t - 1, t) at index t - 1. borders: first
    frames of blocks, without frame 0. The jump of a pair is |f - (f before + f after) / 2|, so only pairs with two
    neighbours count. Returns `border`, `inside` and their `ratio`: above 1 if motion breaks at the borders, which
    Forcing-KV reports for pruned caches. Raises UsageError without a border or a pair elsewhere.
    """
    flow = finite("motion", motion)
    jumps = np.abs(flow[1:-1] - (flow[:-2] + flow[2:]) / 2)  # of the pairs that end at frames 2..T - 2
    at_border = np.isin(np.arange(2, len(jumps) + 2), borders)
    if not at_border.any() or at_border.all():
        raise UsageError(
            f"borders is {quoted(list(borders))}; expected first frames of blocks between 2 and {len(flow) - 1}, "
            "and frames between them"
        )
    border, inside = float(jumps[at_border].mean()), float(jumps[~at_border].mean())
    ratio = border / inside if inside else (math.inf if border else 1.0)
    return {"border": border, "inside": inside, "ratio": ratio}


@dataclass(frozen=True)
class LongScaling:
    """Stored statistics of VBench-Long for one dimension, and its weights with `dev_flag`."""

    in_clip_mean: float
    in_clip_spread: float
    clip_to_clip_mean: float
    clip_to_clip_spread: float
    weights: tuple[float, float]


# configs/slow_fast_params.yaml. The file calls the spreads standard deviations; they are the squares of the ones that
# are reported (0.0677, 0.1570; 0.0203, 0.0888), that is, variances.
VBENCH_LONG: Mapping[str, LongScaling] = {
    "subject": LongScaling(
        0.9206531487463249, 0.004580085658914342, 0.782773956831079, 0.024658268466961904, (0.7, 0.3)
    ),
    "background": LongScaling(
        0.9461633887475777, 0.00041191287498028263, 0.8817304710164493, 0.007886728751286067, (0.8, 0.2)
    ),
}


def vbench_long(
    in_clip: float,
    clip_to_clip: float,
    dimension: str,
    weights: tuple[float, float] = (0.5, 0.5),
    corrected: bool = False,
) -> float:
    """Fuse VBench-Long's two consistencies of a video, of its 2 s clips and of their first frames.

    w_1 in_clip + w_2 ((clip_to_clip - mean_c) / s_c * s_i + mean_i), where means and s are stored for `subject` and
    `background`. The published file has variances for s, and they are used as they are; corrected: takes their square
    roots, so that both consistencies have the same spread. weights: VBench-Long's own are (1, 0), and with its
    `dev_flag` those in `VBENCH_LONG`.
    """
    if dimension not in VBENCH_LONG:
        raise UsageError(f"dimension is {quoted(dimension)}; expected one of {', '.join(VBENCH_LONG)}")
    stored = VBENCH_LONG[dimension]
    ratio = stored.in_clip_spread / stored.clip_to_clip_spread
    if corrected:
        ratio = math.sqrt(ratio)
    mapped = (clip_to_clip - stored.clip_to_clip_mean) * ratio + stored.in_clip_mean
    return weights[0] * in_clip + weights[1] * mapped


def finite(name: str, values: ArrayLike, dimensions: int = 1) -> NDArray[np.float64]:
    """An array of finite numbers with so many dimensions; UsageError names the argument otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise UsageError(f"{name} has shape {list(array.shape)}; expected {dimensions} dimensions")
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise UsageError(f"{name} has {array[tuple(bad)]} at {bad}; expected finite numbers")
    return array
