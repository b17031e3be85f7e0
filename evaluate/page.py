"""One HTML page of results: a table with intervals, a curve over time for each metric, and the worst segments.

The page needs no other file: curves are inline SVG, pictures are inline PNG.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..runtime.files import write_atomically
from ..runtime.media_input import video_frames
from .bootstrap import bootstrap_mean
from .results import MAIN_FIGURE, worst_segments

WIDTH, HEIGHT = 520, 150  # of a plot, without its axes
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 30
MOST_LINES = 24  # videos drawn in a plot
SHOWN = 3  # pictures of a segment
PICTURE_WIDTH = 160  # pixels, enlarged by whole numbers
SHOWN_FIGURES = (MAIN_FIGURE, "vde2.late.absolute", "vde2.late.signed", "vde.linear", "start_end")
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#1c2430;background:#fff}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2em .8em;border-bottom:1px solid #e4e8ee;text-align:right}td:first-child,th:first-child{text-align:left}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(560px,1fr));gap:1em}
figure{margin:0}figcaption{font-weight:600}.range{color:#5b6675;font-size:.85em}
.sheet{display:flex;gap:6px;align-items:flex-end;flex-wrap:wrap;margin:.3em 0 1.4em}
.sheet figure{font-size:.8em;color:#5b6675}.sheet img{display:block;image-rendering:pixelated}
.sheet .gap{width:24px}svg text{font-size:12px;fill:#5b6675}code{background:#f3f5f8;padding:0 .3em}
"""


def write_page(results: dict[str, Any], path: Path, title: str = "Drift") -> Path:
    """Write the page; the worst segments are read from the videos, and left out where a video is gone."""
    text = page(results, title)
    return write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def page(results: dict[str, Any], title: str) -> str:
    """The page as text."""
    settings = results["settings"]
    counts = f"{len(results['videos'])} videos, {settings['segments']} segments each"
    skipped = "".join(f"<li><code>{escape(entry['video'])}</code>: {escape(entry['reason'])}</li>"
                      for entry in results["skipped"])  # fmt: skip
    notes = "".join(f"<li>{escape(note)}</li>" for note in results["notes"])
    parts = [
        f"<h1>{escape(title)}</h1><p>{counts}; {escape(results['schema'])}, inferix {escape(results['inferix'])}. "
        "Brackets are 95 % bootstrap intervals over videos.</p>",
        f"<h2>Skipped</h2><ul>{skipped}</ul>" if skipped else "",
        f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
        "<h2>Figures</h2>",
        figures_table(results),
        "<p><b>vde2.late</b>: mean change against the first segment of the prompt, as a share of it, later segments "
        "weighing more; <b>loss</b> counts only what gets worse, <b>signed</b> is above 0 for what gets better. "
        "<b>vde</b>: LV-Bench's, a sum with early weights. <b>start_end</b>: first 15 % against last 15 %.</p>",
        "<h2>Over time</h2><p>Thin lines: videos. Thick line: mean of the segments over videos, with its 95 % "
        "interval.</p><div class=plots>",
        *(plot(results, name) for name in settings["metrics"]),
        "</div>",
        "<h2>Worst segments</h2><p>The video that loses most in each metric: its first segment left, the worst "
        "right.</p>",
        *(sheet(entry) for entry in worst_segments(results)),
    ]
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>'
        f"{''.join(parts)}</html>\n"
    )


def figures_table(results: dict[str, Any]) -> str:
    """The table of figures, one row for each metric."""
    rows = []
    for name, about in results["settings"]["metrics"].items():
        cells = "".join(f"<td>{interval(results['summary'][name].get(key))}</td>" for key in SHOWN_FIGURES)
        rows.append(f'<tr><td title="{escape(about["about"])}">{escape(name)}</td>')
        rows.append(f"<td>{about['better']}</td>{cells}</tr>")
    heads = "".join(f"<th>{key}</th>" for key in SHOWN_FIGURES)
    return f"<table><tr><th>metric</th><th>better</th>{heads}</tr>{''.join(rows)}</table>"


def interval(entry: dict[str, Any] | None) -> str:
    """A mean with its interval, as HTML."""
    if entry is None:
        return "–"
    bounds = ""
    if entry["low"] is not None:
        bounds = f" <span class=range>[{entry['low']:.3g}, {entry['high']:.3g}]</span>"
    return f"{entry['mean']:.3g}{bounds}"


def plot(results: dict[str, Any], name: str) -> str:
    """Curves of one metric over seconds, as SVG."""
    there = [video for video in results["videos"] if "error" not in video["metrics"][name]]
    if not there:
        return f"<figure><figcaption>{escape(name)}</figcaption>no figures</figure>"
    lines = [np.array(video["metrics"][name]["curve"], dtype=float) for video in there[:MOST_LINES]]
    mean, low, high, middle = segment_means(there, name)
    values = np.concatenate([line[:, 1] for line in lines] + [low, high])
    marks = ticks(float(values.min()), float(values.max()))
    bottom, top = marks[0], marks[-1]
    end = max(video["frames"] / video["fps"] for video in there)

    def at(seconds: NDArray[Any], scores: NDArray[Any]) -> str:
        x = LEFT + seconds / end * WIDTH
        y = TOP + (top - scores) / (top - bottom) * HEIGHT
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    drawn = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="#fafbfc" stroke="#e4e8ee"/>']
    for value in marks:
        y = TOP + (top - value) / (top - bottom) * HEIGHT
        drawn.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#e4e8ee"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    drawn += [f'<polyline points="{at(line[:, 0], line[:, 1])}" fill="none" stroke="#9db4d0" stroke-width=".8"/>'
              for line in lines]  # fmt: skip
    band = f"{at(middle, high)} {at(middle[::-1], low[::-1])}"
    drawn.append(f'<polygon points="{band}" fill="#2f6db5" fill-opacity=".2"/>')
    drawn.append(f'<polyline points="{at(middle, mean)}" fill="none" stroke="#1d4e89" stroke-width="2.2"/>')
    for share in (0, 0.5, 1):
        drawn.append(f'<text x="{LEFT + share * WIDTH:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">'
                     f"{share * end:.3g} s</text>")  # fmt: skip
    about = results["settings"]["metrics"][name]["about"]
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    return (
        f"<figure><figcaption>{escape(name)} <span class=range>{escape(about)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(name)} over time">'
        f"{''.join(drawn)}</svg></figure>"
    )


def segment_means(videos: Sequence[dict[str, Any]], name: str) -> tuple[NDArray[Any], ...]:
    """Mean over videos of the scores of each segment, its 95 % interval, and the middle of the segment in seconds.

    Only videos with as many segments as the first are in it.
    """
    count = len(videos[0]["segments"])
    same = [video for video in videos if len(video["segments"]) == count]
    scores = np.array([video["metrics"][name]["scores"] for video in same], dtype=float)
    intervals = [bootstrap_mean(column) for column in scores.T]
    middle = np.mean([[(start + stop) / 2 / video["fps"] for start, stop, _ in video["segments"]] for video in same], 0)
    mean = np.array([entry.mean for entry in intervals])
    low = np.array([entry.mean if entry.low is None else entry.low for entry in intervals])
    high = np.array([entry.mean if entry.high is None else entry.high for entry in intervals])
    return mean, low, high, middle


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from below `low` to above `high`, at steps of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-9 * max(abs(high), 1e-3):
        margin = max(abs(high), 1e-3) * 0.1
        low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def sheet(entry: dict[str, Any]) -> str:
    """Pictures of the first and of the worst segment of a video, as HTML."""
    wanted = [spread(*entry["first"]), spread(*entry["worst"])]
    try:
        pictures = frames_at(entry, sorted({*wanted[0], *wanted[1]}))
    except UsageError as error:
        shown = f"<p>{escape(str(error))}</p>"
    else:
        cells = [
            "".join(
                f'<figure><img src="data:image/png;base64,{png(pictures[index])}">{index / entry["fps"]:.1f} s</figure>'
                for index in indices if index in pictures
            )
            for indices in wanted
        ]  # fmt: skip
        shown = f"<div class=sheet>{cells[0]}<div class=gap></div>{cells[1]}</div>"
    return f"<b>{escape(entry['metric'])}</b>, {escape(entry['id'])}: {entry['loss']:.0%} worse{shown}"


def spread(start: int, stop: int) -> list[int]:
    """Up to three frames, evenly over a segment."""
    return sorted({start + (2 * index + 1) * (stop - start) // (2 * SHOWN) for index in range(SHOWN)})


def frames_at(entry: dict[str, Any], indices: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """Frames of a video by index, as they were scored."""
    width, height = entry["size"]
    last = max(indices) + 1
    return {
        index: frame
        for index, frame in enumerate(islice(video_frames(entry["video"], (width, height), entry["resampled"]), last))
        if index in indices
    }


def png(frame: NDArray[np.uint8]) -> str:
    """A small picture as base64 of PNG; small frames are enlarged by a whole number, without smoothing."""
    from PIL import Image

    height, width = frame.shape[:2]
    picture = Image.fromarray(frame)
    if width > PICTURE_WIDTH:
        picture = picture.resize((PICTURE_WIDTH, max(1, round(height * PICTURE_WIDTH / width))))
    else:
        scale = max(1, math.floor(PICTURE_WIDTH / width))
        picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")
