"""The scorers of the package by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ..errors import UsageError, nearest, quoted
from .flow_scorers import FLOW_SCORERS
from .pixel_scorers import PIXEL_SCORERS
from .scorers import FunctionScorer, Scorer

SCORERS = {scorer.name: scorer for scorer in (*PIXEL_SCORERS, *FLOW_SCORERS)}
OPTIONAL = ("ms_ssim_to_start", "brisque")  # slow, or not for small pictures: only if they are asked for
INSTALL = {
    "cv2": 'the extra [eval] has it: pip install ".[eval]" in the clone',
    "brisque": "pip install brisque",
}


def available(scorer: FunctionScorer) -> bool:
    """Return True if the package that a scorer needs is installed."""
    return scorer.package is None or find_spec(scorer.package) is not None


def chosen_scorers(metrics: Sequence[str | Scorer] | None = None) -> list[Scorer]:
    """Return the scorers of `metrics`, names or scorers; without it every installed one except `OPTIONAL`.

    Raises UsageError for an unknown or repeated name, and for one whose package is not installed.
    """
    if metrics is None:
        return [scorer for name, scorer in SCORERS.items() if name not in OPTIONAL and available(scorer)]
    scorers: list[Scorer] = []
    for metric in metrics:
        if not isinstance(metric, str):
            scorers.append(metric)
            continue
        if metric not in SCORERS:
            expected = ", ".join(SCORERS)
            raise UsageError(f"metrics has {quoted(metric)}{nearest(metric, SCORERS)}; expected names of {expected}")
        scorer = SCORERS[metric]
        if scorer.package is not None and not available(scorer):
            raise UsageError(
                f"metrics has {quoted(metric)}, which needs the package {scorer.package}, and it is not installed: "
                f"{INSTALL[scorer.package]}"
            )
        scorers.append(scorer)
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"metrics is {quoted(names)}; expected one or more different names")
    return scorers
