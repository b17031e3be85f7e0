"""Drift of one video: scores of its frames as they come, then VDE, corrected VDE and curves of each metric.

Frames are read once. Of each is kept one score a metric, or a few hundred numbers for the metrics with features; so
memory does not grow with the size of pictures times the length of the video.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, quoted
from .measures import (
    LAGS,
    VDE2_WEIGHTS,
    VDE_WEIGHTS,
    Drift,
    Segments,
    border_jump,
    lag_similarity,
    segment_consistency,
    segments_of,
    spans_of,
    start_end_difference,
    start_similarity,
    vde,
    vde2,
)
from .metrics import chosen_scorers
from .scorers import Scorer, View

CHUNK = 8  # frames that a scorer is given at a time
REFERENCES = (0, 1 / 3, 2 / 3)  # seconds after the start of a prompt

Frames = NDArray[np.uint8]


@dataclass
class MetricDrift:
    """The figures of one metric of one video.

    scores: the values of all segments, from which `vde2` is computed: mean scores, and for features the mean
    similarity to the first segment of the same prompt. vde_scores: the values from which `vde` is computed, of equal
    segments whatever the prompts: mean scores, and for features the consistency inside the segment. curve: one value a
    frame, NaN where there is none; for features the similarity to the mean of the first segment. lags: for features,
    similarity to the frame so many frames before. error: why there are no figures; all others are empty then.
    undefined: it is that a segment shows nothing that the metric scores, such as a still region.
    """

    scorer: Scorer
    scores: list[float] = field(default_factory=list)
    vde_scores: list[float] = field(default_factory=list)
    vde: dict[str, float] = field(default_factory=dict)
    vde2: dict[str, Drift] = field(default_factory=dict)
    start_end: float = math.nan
    curve: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    lags: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    error: str | None = None
    undefined: bool = False


@dataclass
class VideoDrift:
    """The drift of one video, metric by metric.

    size: (width, height). spans: for each prompt its segments as (start, stop) frames. border_jump: see
    `measures.border_jump`; None unless block borders were given.
    """

    frames: int
    fps: float
    size: tuple[int, int]
    spans: list[Segments]
    metrics: dict[str, MetricDrift]
    border_jump: dict[str, float] | None = None

    @property
    def segments(self) -> Segments:
        """All segments in order."""
        return [segment for span in self.spans for segment in span]


def drift(
    frames: Iterable[Frames],
    fps: float,
    metrics: Sequence[str | Scorer] | None = None,
    segments: int = 10,
    switches: Sequence[int] = (),
    block_borders: Sequence[int] = (),
    lags: Sequence[int] = LAGS,
    on_frame: Callable[[int], object] | None = None,
) -> VideoDrift:
    """Measure the drift of a video, given as an iterable of uint8 RGB frames [H, W, 3] of one size.

    fps: frames each second. metrics: names or scorers; None takes every installed one except the slow ones
    (`metrics.OPTIONAL`). segments: N of VDE. switches: frames at which the prompt changes, ascending. block_borders:
    first frames of blocks, for the jump of flow there (needs the metric motion). on_frame: called with the count of
    frames read so far. A metric that cannot be computed has the reason in its `error`; the others are there.
    Raises UsageError for arguments, for frames that are no pictures of one size, and for fewer frames than segments.
    """
    scorers = chosen_scorers(metrics)
    if not 0 < fps < math.inf:
        raise UsageError(f"fps is {fps}; expected a finite number above 0")
    if segments < 2:
        raise UsageError(f"segments is {segments}; expected 2 or more, since drift is against the first")
    if list(switches) != sorted(set(switches)) or min(switches, default=1) < 1:
        raise UsageError(f"switches is {quoted(list(switches))}; expected ascending frames, 1 or later")
    records = [Record(scorer) for scorer in scorers]
    size, count = (0, 0), 0
    views = linked_views(frames, fps, frozenset(switches))
    while chunk := list(islice(views, CHUNK)):
        if not count:
            size = (chunk[0].frame.shape[1], chunk[0].frame.shape[0])
            check_smallest(scorers, size)
        for record in records:
            record.add(chunk)
        count += len(chunk)
        if on_frame is not None:
            on_frame(count)
        for view in chunk[:-1]:  # cuts the chain of previous frames: two are enough for every scorer
            view.previous = None
    if count < segments:
        raise UsageError(f"the video has {count} frames, fewer than segments={segments}; give a longer video or fewer")
    spans = spans_of(count, segments, switches)
    measured = {record.scorer.name: record.measure(spans, segments_of(count, segments), lags) for record in records}
    jump = None
    if block_borders:
        motion = next((record for record in records if record.scorer.name == "motion"), None)
        if motion is None:
            raise UsageError("block_borders needs the metric motion; add it to metrics")
        jump = border_jump(motion.values()[1:], block_borders)
    return VideoDrift(count, fps, size, spans, measured, jump)


def linked_views(frames: Iterable[Frames], fps: float, switches: frozenset[int]) -> Iterator[View]:
    """Views of frames, each with the one before it and the references of its prompt."""
    previous: View | None = None
    references: list[View] = []
    begun, shape = 0, None
    for index, frame in enumerate(frames):
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            what = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else quoted(frame)
            raise UsageError(f"frames[{index}] is {what}; expected uint8 [H, W, 3]")
        shape = frame.shape if shape is None else shape
        if frame.shape != shape:
            raise UsageError(
                f"frames[{index}] has shape {list(frame.shape)} and the first {list(shape)}; expected one size"
            )
        if index in switches:
            begun, references = index, []
        view = View(frame, index, fps, previous)
        if index - begun in {round(second * fps) for second in REFERENCES}:
            references = [*references, view]
        view.references = references
        yield view
        previous = view


def check_smallest(scorers: Sequence[Scorer], size: tuple[int, int]) -> None:
    """Raise UsageError for a metric that is not defined for so small a picture."""
    for scorer in scorers:
        if min(size) < scorer.smallest:
            raise UsageError(
                f"metric {quoted(scorer.name)} needs frames of {scorer.smallest} pixels or more each way; "
                f"these are {size[0]}x{size[1]}: leave it out of metrics"
            )


class Record:
    """The scores of one metric, frame by frame."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.flat = array("f" if scorer.kind == "feature" else "d")
        self.width = 1

    def add(self, chunk: Sequence[View]) -> None:
        """Score consecutive frames; the first frame of a video has no pair, which is NaN."""
        views = chunk if self.scorer.kind != "pair" else [view for view in chunk if view.previous is not None]
        self.flat.extend([math.nan] * (len(chunk) - len(views)))
        if not views:
            return
        scores = np.asarray(self.scorer.score(views))
        if scores.ndim != (2 if self.scorer.kind == "feature" else 1) or len(scores) != len(views):
            raise UsageError(
                f"metric {quoted(self.scorer.name)} returned scores of shape {list(scores.shape)} for {len(views)} "
                f"frames; expected {'[n, D]' if self.scorer.kind == 'feature' else '[n]'}"
            )
        self.width = scores[0].size
        self.flat.extend(scores.ravel().tolist())

    def values(self) -> NDArray[np.float64]:
        """Scores [T], or features [T, D]."""
        values = np.array(self.flat, dtype=np.float64)
        return values.reshape(-1, self.width) if self.scorer.kind == "feature" else values

    def measure(self, spans: Sequence[Segments], equal: Segments, lags: Sequence[int]) -> MetricDrift:
        """Compute all figures, or the reason why there are none."""
        metric, values, scorer = MetricDrift(self.scorer), self.values(), self.scorer
        metric.error = self.fault(values)
        if metric.error is not None:
            return metric
        segments = [segment for span in spans for segment in span]
        if scorer.kind == "feature":
            if equal[0][1] < 2:
                metric.error = "segments of one frame have no consistency"
                return metric
            metric.scores = start_similarity(values, spans, scorer.similarity)
            metric.vde_scores = [segment_consistency(values[slice(*each)], scorer.similarity) for each in equal]
            metric.lags = lag_similarity(values, lags, scorer.similarity)
            metric.curve = scorer.similarity(values, values[slice(*spans[0][0])].mean(0))
        else:
            metric.scores = [self.mean(values, *segment) for segment in segments]
            metric.vde_scores = [self.mean(values, *segment) for segment in equal]
            metric.curve = values
            for name, means, where in (("", metric.scores, segments), ("equal ", metric.vde_scores, equal)):
                if missing := [f"{start}-{stop - 1}" for mean, (start, stop) in zip(means, where, strict=True)
                               if math.isnan(mean)]:  # fmt: skip
                    metric.error = f"no score in the {name}segment of frames {missing[0]}"
                    metric.undefined = self.scorer.partial
                    return metric
        metric.vde = {weights: vde(metric.vde_scores, weights) for weights in VDE_WEIGHTS}
        counts = [len(span) for span in spans]
        if max(counts) < 2:
            metric.error = "no prompt holds for two segments"
            return metric
        metric.vde2 = {
            weights: vde2(metric.scores, weights, scorer.better, scorer.floor, counts) for weights in VDE2_WEIGHTS
        }
        metric.start_end = start_end_difference(metric.curve[np.isfinite(metric.curve)])
        return metric

    def fault(self, values: NDArray[np.float64]) -> str | None:
        """The first score that is not a number where there has to be one."""
        bad = np.array([not np.isfinite(value).all() for value in values])
        if self.scorer.kind == "pair":
            bad[0] = False
        if self.scorer.partial:
            bad &= np.isinf(values)
        if not bad.any():
            return None
        first = int(np.argmax(bad))
        return f"{int(bad.sum())} of {len(bad)} frames have no finite score, the first is frame {first}"

    def mean(self, values: NDArray[np.float64], start: int, stop: int) -> float:
        """Mean score of a segment; pairs with a frame of the segment before are left out. NaN without any score."""
        inside = values[start + (self.scorer.kind == "pair") : stop]
        inside = inside[np.isfinite(inside)]
        return float(inside.mean()) if len(inside) else math.nan
