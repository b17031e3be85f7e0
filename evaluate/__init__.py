"""Evaluation: drift of any video, and of the small world against its simulator.

`drift` scores a video given as frames. The names are loaded when first used, since some need optional packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bootstrap import Interval, bootstrap_difference, bootstrap_mean
    from .measures import Drift, vde, vde2
    from .scorers import Scorer, View
    from .video_drift import MetricDrift, VideoDrift, drift

MODULES = {
    "Drift": "measures",
    "Interval": "bootstrap",
    "MetricDrift": "video_drift",
    "Scorer": "scorers",
    "VideoDrift": "video_drift",
    "View": "scorers",
    "bootstrap_difference": "bootstrap",
    "bootstrap_mean": "bootstrap",
    "drift": "video_drift",
    "vde": "measures",
    "vde2": "measures",
}

__all__ = [
    "Drift",
    "Interval",
    "MetricDrift",
    "Scorer",
    "VideoDrift",
    "View",
    "bootstrap_difference",
    "bootstrap_mean",
    "drift",
    "vde",
    "vde2",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'inferix.evaluate' has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)
