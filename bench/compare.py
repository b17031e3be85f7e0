"""Comparison of two results: quantities that are faster or slower by more than chance.

The statistic is the ratio of the medians of B's and A's samples with its 95 % bootstrap interval: both sets are
resampled with replacement 4000 times from a fixed seed. A quantity is faster or slower if the whole interval lies
beyond the threshold, and the same if all of it lies within. Otherwise it is `unsure`: take more samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from .result import Result, Series

DRAWS = 4000
CONFIDENCE = 0.95
THRESHOLD = 0.03  # smallest change that counts
FEWEST = 4  # samples on each side, below which no statement is made
STATISTIC = f"ratio of medians B / A, with its {CONFIDENCE:.0%} interval from {DRAWS} bootstrap draws"
IGNORED = ("date", "command", "clocks", "load")  # they differ between any two runs


@dataclass(frozen=True)
class Change:
    """Change of one quantity from A to B. verdict: faster, slower, same, unsure, or few for too few samples."""

    name: str
    a: Series
    b: Series
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Changes from A to B. differences: settings that differ, a line each. gone, new: series only in A, only in B."""

    changes: tuple[Change, ...]
    differences: tuple[str, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    threshold: float

    @property
    def slower(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "slower")


def compare(a: Result, b: Result, threshold: float = THRESHOLD) -> Comparison:
    """Compare B with A; raises UsageError for a threshold outside [0, 1) and for results that are not comparable."""
    if not 0 <= threshold < 1:
        raise UsageError(f"threshold is {threshold}; expected a share from 0 up to 1, such as 0.03")
    for what, one, other in (
        ("kind", a.kind, b.kind),
        ("device type", a.environment["device"]["type"], b.environment["device"]["type"]),
        ("model", a.subject["model"], b.subject["model"]),
    ):
        if one != other:
            raise UsageError(f"A's {what} is {one}, B's is {other}: they cannot be compared; give two of one {what}")
    shared = [name for name in a.series if name in b.series]
    if not shared:
        raise UsageError("A and B have no quantity in common; give two runs with a candidate in both")
    return Comparison(
        changes=tuple(change(name, a.series[name], b.series[name], threshold) for name in shared),
        differences=tuple(differences(a, b)),
        gone=tuple(name for name in a.series if name not in b.series),
        new=tuple(name for name in b.series if name not in a.series),
        threshold=threshold,
    )


def change(name: str, a: Series, b: Series, threshold: float) -> Change:
    ratio = b.median / a.median if a.median else float("inf")
    if min(len(a.samples), len(b.samples)) < FEWEST or a.median <= 0:
        return Change(name, a, b, ratio, ratio, ratio, "few")
    low, high = interval(a, b)
    return Change(name, a, b, ratio, low, high, verdict_of(low, high, threshold, a.better))


def verdict_of(low: float, high: float, threshold: float, better: str = "less") -> str:
    """Verdict of the interval of a ratio B / A: faster, slower, same or unsure."""
    grew, shrank = low > 1 + threshold, high < 1 / (1 + threshold)
    if grew or shrank:
        return "slower" if grew == (better == "less") else "faster"
    return "same" if low >= 1 / (1 + threshold) and high <= 1 + threshold else "unsure"


def paired_change(name: str, a: Series, b: Series, threshold: float = THRESHOLD) -> Change:
    """Change from A to B whose samples were taken in turns: the median of the ratios of pairs, and its interval."""
    if len(a.samples) != len(b.samples) or min(a.samples) <= 0:
        raise ValueError(f"{name}: {len(a.samples)} and {len(b.samples)} samples; expected pairs of numbers above 0")
    ratios = np.asarray(b.samples) / np.asarray(a.samples)
    ratio = float(np.median(ratios))
    if len(ratios) < FEWEST:
        return Change(name, a, b, ratio, ratio, ratio, "few")
    drawn = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    low, high = quantiles(np.median(drawn, axis=1))
    return Change(name, a, b, ratio, low, high, verdict_of(low, high, threshold, a.better))


def interval(a: Series, b: Series) -> tuple[float, float]:
    """Bootstrap interval of the ratio of medians, B / A."""
    generator = np.random.default_rng(0)

    def medians(series: Series) -> np.ndarray:
        samples = np.asarray(series.samples)
        return np.median(generator.choice(samples, (DRAWS, len(samples))), axis=1)

    return quantiles(medians(b) / medians(a))


def quantiles(ratios: np.ndarray) -> tuple[float, float]:
    """Ends of the interval of bootstrapped ratios."""
    rest = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, (rest, 1 - rest))
    return float(low), float(high)


def differences(a: Result, b: Result) -> Iterator[str]:
    """Settings and environment that differ, one line each."""
    one, other = (
        {**result.environment, "settings": result.settings, "subject": result.subject, "clock": result.clock}
        for result in (a, b)
    )
    yield from uneven("", one, other)


def uneven(where: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted((one.keys() | other.keys()).difference(IGNORED)):
            yield from uneven(f"{where}.{key}".lstrip("."), one.get(key), other.get(key))
    elif one != other:
        yield f"{where}: {short(one)} in A, {short(other)} in B"


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
