"""Results of many videos: scored one by one, as plain data of schema `inferix-drift/1`, with intervals over videos.

`drift_results.schema.json` beside this file describes the data. Numbers that JSON lacks are the texts "inf" and "nan".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, cut, quoted
from ..runtime.files import write_atomically
from ..runtime.media_input import video_facts, video_frames
from ..user_files import read_text
from ..version import __version__
from .bootstrap import bootstrap_difference, bootstrap_mean
from .measures import VDE2_WEIGHTS, VDE_WEIGHTS
from .metrics import chosen_scorers
from .scorers import Scorer
from .video_drift import VideoDrift, drift

SCHEMA = "inferix-drift/1"
CURVE_POINTS = 240  # of a curve in the results
LAG_POINTS = 48  # of a curve of similarity at a lag
LARGEST_RESULTS = 1 << 28  # bytes
INTERRUPTED = "interrupted"  # reason of the videos that Ctrl-C left unscored
FIGURES = (
    *(f"vde.{weights}" for weights in VDE_WEIGHTS),
    *(f"vde2.{weights}.{form}" for weights in VDE2_WEIGHTS for form in ("absolute", "signed", "loss")),
    "start_end",
)  # fmt: skip
MAIN_FIGURE = "vde2.late.loss"  # by which segments and videos are ordered, and which tables show


@dataclass(frozen=True)
class Video:
    """A video to score: its file, its id in the results, and what is known of it.

    switches: seconds at which the prompt changes. block_borders: first frames of blocks. Two runs' videos are compared
    in pairs if their ids are the same.
    """

    path: Path
    id: str
    prompt: str | None = None
    switches: Sequence[float] = ()
    block_borders: Sequence[int] = ()


@dataclass(frozen=True)
class Settings:
    """Settings with which all videos are scored; see `video_drift.drift`. fps, size: None keeps each video's own."""

    metrics: Sequence[str | Scorer] | None = None
    segments: int = 10
    fps: float | None = None
    size: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """Settings as plain data, with the version and weights of every metric."""
        metrics = {
            scorer.name: {
                "version": scorer.version, "weights": scorer.weights, "kind": scorer.kind, "better": scorer.better,
                "floor": scorer.floor, "about": scorer.about,
            }
            for scorer in chosen_scorers(self.metrics)
        }  # fmt: skip
        return {"segments": self.segments, "fps": self.fps, "size": self.size and list(self.size), "metrics": metrics}


def score_video(video: Video, settings: Settings, on_frame: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Score one video file and return its entry in the results; UsageError if it cannot be read or is too short."""
    own_size, own_fps = video_facts(video.path)
    fps, size = settings.fps or own_fps, settings.size or own_size
    frames = video_frames(video.path, size, settings.fps)
    switches = [round(second * fps) for second in video.switches]
    measured = drift(
        frames, fps, settings.metrics, settings.segments, switches, video.block_borders, on_frame=on_frame
    )
    about = {"video": str(video.path), "id": video.id, "prompt": video.prompt}
    return about | video_data(measured)


def video_data(video: VideoDrift) -> dict[str, Any]:
    """The drift of a video as plain data."""
    segments = [
        [start, stop, prompt] for prompt, span in enumerate(video.spans) for start, stop in span
    ]
    metrics: dict[str, Any] = {}
    for name, metric in video.metrics.items():
        if metric.error is not None:
            metrics[name] = {"error": metric.error} | ({"undefined": True} if metric.undefined else {})
            continue
        metrics[name] = {
            "scores": numbers(metric.scores),
            "vde_scores": numbers(metric.vde_scores),
            "vde": {weights: number(value) for weights, value in metric.vde.items()},
            "vde2": {weights: {form: number(value) for form, value in asdict(drifted).items()}
                     for weights, drifted in metric.vde2.items()},
            "start_end": number(metric.start_end),
            "curve": curve(metric.curve, video.fps),
        }  # fmt: skip
        if metric.lags:
            metrics[name]["lags"] = {
                str(lag): {"mean": number(float(values.mean())), "curve": curve(values, video.fps, lag, LAG_POINTS)}
                for lag, values in metric.lags.items()
            }
    jump = None if video.border_jump is None else {key: number(value) for key, value in video.border_jump.items()}
    return {
        "frames": video.frames, "fps": video.fps, "size": list(video.size), "segments": segments, "metrics": metrics,
        "border_jump": jump,
    }  # fmt: skip


def curve(
    values: NDArray[np.float64], fps: float, first: int = 0, most: int = CURVE_POINTS
) -> list[list[float]]:  # fmt: skip
    """[[second, mean], ...] of at most `most` equal stretches of a curve; stretches without a number are left out."""
    points = []
    for part in np.array_split(np.arange(len(values)), min(most, len(values))):
        inside = values[part][np.isfinite(values[part])]
        if len(inside):
            points.append([round(float(part.mean() + first) / fps, 3), float(f"{inside.mean():.6g}")])
    return points


def number(value: float) -> float | str:
    """A number for JSON; "inf", "-inf" or "nan" where it is none."""
    return value if math.isfinite(value) else str(value)


def numbers(values: Iterable[float]) -> list[float | str]:
    return [number(value) for value in values]


def figure(metric: dict[str, Any], name: str) -> float:
    """One of `FIGURES` of a metric of a video."""
    value: Any = metric
    for key in name.split("."):
        value = value[key]
    return float(value)


def results_of(
    videos: Sequence[dict[str, Any]], skipped: Sequence[dict[str, str]], settings: Settings, seed: int = 0
) -> dict[str, Any]:
    """The results of a set of videos: settings, videos, what was skipped, notes, and figures with intervals."""
    described = settings.describe()
    return {
        "schema": SCHEMA,
        "inferix": __version__,
        "settings": described,
        "videos": list(videos),
        "skipped": list(skipped),
        "notes": notes_of(videos),
        "summary": {name: summary_of(name, videos, seed) for name in described["metrics"]},
    }


def notes_of(videos: Sequence[dict[str, Any]]) -> list[str]:
    """Remarks about what makes figures of videos hard to compare, and about metrics without figures."""
    notes = []
    for key, what, flag in (("size", "sizes", "size"), ("fps", "frame rates", "fps")):
        seen = sorted({str(video[key]) for video in videos})
        if len(seen) > 1:
            notes.append(f"the videos have {len(seen)} {what} ({', '.join(seen[:4])}); give {flag} for one")
    for video in videos:
        notes += [
            f"{video['id']}: no {name}, {metric['error']}" for name, metric in video["metrics"].items()
            if "error" in metric
        ]  # fmt: skip
    return notes


def summary_of(name: str, videos: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Mean and 95 % interval over videos of each figure of a metric, infinite values left out and counted."""
    there = [video["metrics"][name] for video in videos if "error" not in video["metrics"].get(name, {"error": ""})]
    summary: dict[str, Any] = {}
    for key in FIGURES:
        values = [figure(metric, key) for metric in there]
        usable = [value for value in values if math.isfinite(value)]
        if usable:
            summary[key] = asdict(bootstrap_mean(usable, seed=seed)) | {"infinite": len(values) - len(usable)}
    return summary


def has_faults(results: dict[str, Any]) -> bool:
    """Return True if a video was skipped, or has no figures of a metric that is defined for it."""
    metrics = (metric for video in results["videos"] for metric in video["metrics"].values())
    errors = any("error" in metric and not metric.get("undefined") for metric in metrics)
    return bool(results["skipped"]) or errors


def score_videos(
    videos: Sequence[Video],
    settings: Settings,
    on_video: Callable[[int, Video, dict[str, Any] | None], object] | None = None,
    on_frame: Callable[[int], object] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score video files. One that cannot be read or is too short is skipped, with the reason in the results.

    Ctrl-C skips the rest, so that the finished ones are not lost.
    on_video: called after each with its index, itself, and its entry or None. Raises UsageError for bad settings.
    """
    settings.describe()  # an unknown metric is refused before the first video
    entries, skipped = [], []
    for index, video in enumerate(videos):
        entry = None
        try:
            entry = score_video(video, settings, on_frame)
            entries.append(entry)
        except UsageError as error:
            skipped.append({"video": str(video.path), "reason": str(error)})
        except KeyboardInterrupt:
            skipped += [{"video": str(rest.path), "reason": INTERRUPTED} for rest in videos[index:]]
            break
        if on_video is not None:
            on_video(index, video, entry)
    return results_of(entries, skipped, settings, seed)


def write_results(results: dict[str, Any], path: Path) -> Path:
    """Write results as a JSON file, whole or not at all."""
    text = json.dumps(results, allow_nan=False) + "\n"
    return write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a file of `write_results`. Raises UsageError for another schema, or parts that are missing."""
    where = f"results {quoted(path)}"
    try:
        data = json.loads(read_text(path, "results", LARGEST_RESULTS))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where} is not JSON: {cut(str(error))}; expected a file of inferix eval drift") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{where} has schema {quoted(schema)}; expected {SCHEMA!r}, as inferix eval drift writes it")
    try:
        for name, metric in data["settings"]["metrics"].items():
            _ = data["settings"]["segments"], metric["version"], metric["weights"], data["summary"][name]
        for video in data["videos"]:
            _ = video["id"], video["video"], video["fps"], video["size"], video["segments"]
            for metric in video["metrics"].values():
                if "error" not in metric:
                    _ = metric["scores"], metric["curve"], [figure(metric, key) for key in FIGURES]
        _ = data["skipped"], data["notes"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where} is damaged: {type(error).__name__} {cut(str(error))}; score again") from error
    return data


def compare(before: dict[str, Any], after: dict[str, Any], key: str = MAIN_FIGURE, seed: int = 0) -> dict[str, Any]:
    """Compare two results: `after` - `before` of one figure for each metric, with a 95 % interval over videos.

    Videos with the same ids are compared in pairs. A metric is left out, with the reason, if its version or weights
    differ or only one result has it. Raises UsageError for different counts of segments.
    """
    if key not in FIGURES:
        raise UsageError(f"figure is {quoted(key)}; expected one of {', '.join(FIGURES)}")
    counts = [results["settings"].get("segments") for results in (before, after)]
    if counts[0] != counts[1]:
        raise UsageError(f"the results have {counts[0]} and {counts[1]} segments; score both with as many")
    sides = [{video["id"]: video["metrics"] for video in results["videos"]} for results in (before, after)]
    same = [video for video in sides[0] if video in sides[1]]
    paired = len(same) == len(sides[0]) == len(sides[1])
    described = [results["settings"]["metrics"] for results in (before, after)]
    metrics: dict[str, Any] = {}
    for name in [*described[0], *(name for name in described[1] if name not in described[0])]:
        if any(name not in side for side in described):
            metrics[name] = {"error": "only one of the results has it"}
            continue
        identity = [[side[name].get("version"), side[name].get("weights")] for side in described]
        if identity[0] != identity[1]:
            metrics[name] = {"error": f"its versions differ: {identity[0]} and {identity[1]}"}
            continue
        values = [
            {video: figure(entry[name], key) for video, entry in side.items() if "error" not in entry[name]}
            for side in sides
        ]
        values = [{video: value for video, value in side.items() if math.isfinite(value)} for side in values]
        both = [video for video in values[0] if video in values[1]]
        one, other = ([side[video] for video in both] if paired else [*side.values()] for side in values)
        if not (one and other):
            metrics[name] = {"error": "no video has a figure on both sides"}
            continue
        change = bootstrap_difference(one, other, paired, seed=seed)
        metrics[name] = {
            "before": float(np.mean(one)), "after": float(np.mean(other)), **asdict(change),
            "different": change.excludes_zero,
        }  # fmt: skip
    return {"figure": key, "paired": paired, "metrics": metrics}


def worst_segments(results: dict[str, Any], count: int = 6) -> list[dict[str, Any]]:
    """The video with the largest loss of each metric, and its worst segment; the metrics with the largest losses.

    Each has `video`, `id`, `metric`, `loss`, and `first` and `worst` as [start, stop] frames.
    """
    found = []
    for video in results["videos"]:
        for name, metric in video["metrics"].items():
            if "error" in metric or not math.isfinite(figure(metric, MAIN_FIGURE)):
                continue
            better = results["settings"]["metrics"][name]["better"]
            floor = results["settings"]["metrics"][name]["floor"]
            lost, first, last = worst_of(metric["scores"], video["segments"], better, floor)
            found.append({"video": video["video"], "id": video["id"], "metric": name, "loss": lost, "first": first,
                          "worst": last, "fps": video["fps"], "size": video["size"],
                          "resampled": results["settings"]["fps"]})  # fmt: skip
    found.sort(key=lambda entry: -entry["loss"])
    worst: dict[str, dict[str, Any]] = {}
    for entry in found:
        if entry["loss"] > 0:
            worst.setdefault(entry["metric"], entry)
    return list(worst.values())[:count]


def worst_of(
    scores: Sequence[float], segments: Sequence[Sequence[int]], better: str, floor: float
) -> tuple[float, list[int], list[int]]:
    """The largest loss of a segment against the first of its prompt, and both as [start, stop]."""
    best: tuple[float, list[int], list[int]] = (-1.0, list(segments[0][:2]), list(segments[0][:2]))
    first = 0
    for index, (start, stop, prompt) in enumerate(segments):
        if prompt != segments[first][2]:
            first = index
        change = (float(scores[index]) - float(scores[first])) / max(abs(float(scores[first])), floor, 1e-12)
        lost = {"higher": -change, "lower": change, "neither": abs(change)}[better]
        if lost > best[0]:
            best = (lost, list(segments[first][:2]), [start, stop])
    return best
