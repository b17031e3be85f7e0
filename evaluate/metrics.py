"""The scorers of the package by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError, nearest, quoted
from .flow_scorers import FLOW_SCORERS
from .pixel_scorers import PIXEL_SCORERS
from .scorers import FunctionScorer, Scorer

SCORERS = {scorer.name: scorer for scorer in (*PIXEL_SCORERS, *FLOW_SCORERS)}
OPTIONAL = ("ms_ssim_to_start", "brisque")  # slow, or not for small pictures: only if they are asked for
# Of `learned_scorers`, whose import takes torch; they read the files of a folder of weights.
LEARNED = ("clip_l14_aesthetic", "clip_b32", "dino_b16", "musiq_spaq", "raft_moving_share", "amt_s_rebuild")
# Of `tinyworld_classifiers`, for videos of the small world.
WORLD = ("tinyworld_words", "tinyworld_things")
INSTALL = {
    "cv2": 'the extra [eval] has it: pip install ".[eval]" in the clone',
    "brisque": "pip install brisque",
}


def available(scorer: FunctionScorer) -> bool:
    """Return True if the package that a scorer needs is installed."""
    return scorer.package is None or find_spec(scorer.package) is not None


def chosen_scorers(
    metrics: Sequence[str | Scorer] | None = None, weights: str | Path | None = None
) -> list[Scorer]:  # fmt: skip
    """Return the scorers of `metrics`, names or scorers; without it every installed one except `OPTIONAL`.

    weights: folder with the files of `LEARNED` scorers (`weight_files.py`); without `metrics` those whose files it has
    are added. Raises UsageError for an unknown or repeated name, and for one whose package or weights are missing.
    """
    if metrics is None:
        scorers: list[Scorer] = [
            scorer for name, scorer in SCORERS.items() if name not in OPTIONAL and available(scorer)
        ]
        if weights is not None:
            from .learned_scorers import learned_scorers

            scorers += learned_scorers(weights)
        return scorers
    scorers = [scorer_of(metric, weights) if isinstance(metric, str) else metric for metric in metrics]
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"metrics is {quoted(names)}; expected one or more different names")
    return scorers


def scorer_of(name: str, weights: str | Path | None) -> Scorer:
    """Return the scorer of a name."""
    if name in LEARNED:
        from .learned_scorers import learned_scorer

        return learned_scorer(name, None if weights is None else Path(weights))
    if name in WORLD:
        from .tinyworld_classifiers import WORLD_SCORERS

        return WORLD_SCORERS[name]
    if name not in SCORERS:
        known = (*SCORERS, *LEARNED, *WORLD)
        raise UsageError(f"metrics has {quoted(name)}{nearest(name, known)}; expected names of {', '.join(known)}")
    scorer = SCORERS[name]
    if scorer.package is not None and not available(scorer):
        raise UsageError(
            f"metrics has {quoted(name)}, which needs the package {scorer.package}, and it is not installed: "
            f"{INSTALL[scorer.package]}"
        )
    return scorer
