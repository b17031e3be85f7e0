"""Pictures of a report: roofline, block time over the window, sessions, ratios, a long run. Needs matplotlib.

Each picture shows one result and names its machine, so that figures of a CPU and of a GPU never share an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from math import ceil, floor, log10
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime.files import write_atomically
from .compare import interval
from .report_tables import pairs_of
from .result import Result

INK, SOFT, GRID = "#1f2430", "#6b7280", "#d9dde3"
COLOURS = {
    "captured": "#0b7a75", "fused": "#2f6fbb", "eager": "#8a5fbf", "plain": "#b7791f", "compiled": "#b0413e",
    "diffusers": "#6b7280",
}  # fmt: skip
LIMIT = "#b0413e"  # of real time
SPARE = ("#3d5a80", "#98a33b", "#c06c84", "#5c6f7b")


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def colour(name: str) -> str:
    return COLOURS.get(name) or SPARE[sum(map(ord, name)) % len(SPARE)]


def machine_line(result: Result) -> str:
    """Device, dtype, date and load of the machine, below every picture."""
    device, host = "CPU" if not result.on_gpu else "GPU", result.environment["host"]
    dtype = result.settings.get("config", {}).get("dtype", "")
    load = "" if host["load"] is None else f", load {host['load']:.1f} on {host['cores']} cores at the start"
    return f"{device}: {result.device_name}, {dtype}, {result.environment['date'][:10]}{load}"


def picture(
    path: Path, result: Result, title: str, paint: Callable[..., None], height: float = 3.6, panels: int = 1
) -> Path:
    """Paint a figure in the common style and write it atomically; `paint` gets an axis for each panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "font.size": 9, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": SOFT,
        "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(panels, figsize=(7.2, height), sharex=True, squeeze=False)
        figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0.035, 1, 0.965)))  # space for the machine's name
        paint(*axes[:, 0])
        axes[0, 0].set_title(title, loc="left", fontsize=10, fontweight="bold")
        figure.text(0.995, 0.004, machine_line(result), ha="right", va="bottom", fontsize=7, color=SOFT)
        write_atomically(path, lambda part: figure.savefig(part, dpi=150, format="png", metadata={"Software": None}))
        pyplot.close(figure)
    return path


def spread_labels(places: list[float], least: float) -> list[float]:
    """Move label positions apart, in order, so that neighbours are at least `least` from each other."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + least)
    shift = (moved[order[-1]] - places[order[-1]]) / 2 if order else 0.0
    return [place - shift for place in moved]


def real_time(axis: Any, milliseconds: float, words: str) -> None:
    """Mark the longest time per block at which a viewer never waits."""
    axis.axhline(milliseconds, color=LIMIT, linewidth=1.1, linestyle="--")
    axis.annotate(f"{words}: {milliseconds:.4g} ms", (0.995, milliseconds), (0, -4), va="top", ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8, color=LIMIT)  # fmt: skip


def block_limit(result: Result) -> float:
    """Return the milliseconds of video in a block of a stream's result."""
    stream = result.facts["stream"]
    return float(stream["frames"] / stream["blocks"] / stream["video_fps"] * 1e3)


def ratio_bars(result: Result, path: Path) -> Path | None:
    """Bars of each candidate's median block time, with the ratio to the plain loop and its 95 % interval."""
    timed = {name: series for name in result.facts["candidates"] if (series := result.of(name).get("block"))}
    if len(timed) < 2:
        return None
    against = "plain" if "plain" in timed else next(iter(timed))

    def paint(axis: Any) -> None:
        names = sorted(timed, key=lambda name: timed[name].median, reverse=True)
        for place, name in enumerate(names):
            series = timed[name]
            middle = series.median * 1e3
            axis.barh(place, middle, height=0.62, color=colour(name))
            label = f"{middle:.4g} ms"
            if name != against:
                low_ratio, high_ratio = interval(series, timed[against])
                ratio = timed[against].median / series.median
                label += f"   {ratio:.2f}x {against} ({low_ratio:.2f} to {high_ratio:.2f})"
            axis.annotate(label, (middle, place), (6, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(names)), names)
        axis.set_xlim(0, max(series.median for series in timed.values()) * 1e3 * 1.55)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("milliseconds per block, median; in brackets: 95 % interval of the ratio")

    return picture(path, result, "One block at a full window, with the decoder", paint, 1.3 + 0.42 * len(timed))


def growth(result: Result, path: Path) -> Path | None:
    """Block time over the frames in the window, a line for each candidate."""
    curves = {name: curve for name, curve in result.facts["growth"].items() if len(curve) > 1}
    if not curves:
        return None

    def paint(axis: Any) -> None:
        from statistics import median

        ends, shift = [], 0.0
        for place, (name, curve) in enumerate(curves.items()):
            frames = [int(count) for count in curve]
            step = min((after - before for before, after in pairwise(sorted(frames))), default=1)
            shift = (place - (len(curves) - 1) / 2) * 0.08 * step  # so that whiskers stand side by side
            at = [count + shift for count in frames]
            middle = [median(samples) * 1e3 for samples in curve.values()]
            axis.plot(at, middle, marker="o", markersize=4, linewidth=1.6, color=colour(name))
            low, high = ([extreme(samples) * 1e3 for samples in curve.values()] for extreme in (min, max))
            axis.vlines(at, low, high, color=colour(name), linewidth=1)
            ends.append((name, at[-1], middle[-1]))
        top = max(max(samples) for curve in curves.values() for samples in curve.values()) * 1e3
        heights = spread_labels([height for _, _, height in ends], 0.06 * top)
        for (name, at_end, height), label in zip(ends, heights, strict=True):
            axis.annotate(f"{name} {height:.3g} ms", (at_end, height), (1.015, label), color=colour(name), va="center",
                          textcoords=("axes fraction", "data"), fontsize=8.5)  # fmt: skip
        full = result.facts["block"]["window_frames"]
        axis.axvline(full, color=SOFT, linewidth=0.8, linestyle=":")
        axis.annotate("full window ", (full, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color=SOFT,
                      ha="right")  # fmt: skip
        axis.set_ylim(0, 1.05 * top)
        axis.set_xticks(sorted({int(count) for curve in curves.values() for count in curve}))
        axis.set_xlabel("latent frames in the window, the block's own included")
        axis.set_ylabel("milliseconds per block")

    return picture(path, result, "Block time while the window fills; line: median, whisker: best to worst", paint)


class Point(NamedTuple):
    """One stage of a candidate: FLOPs per byte, FLOP/s, and the FLOP/s of a matmul in its precision."""

    name: str
    stage: str
    intensity: float
    reached: float
    most: float


def points(result: Result) -> list[Point]:
    """The transformer of each candidate, in its precision, and the decoder once: all share it.

    Of several ranks the decoder is left out, since a result does not tell which of them decode.
    """
    matmul = result.ceilings["matmul_flops"].best
    packed = result.ceilings["packed_flops"].best if "packed_flops" in result.ceilings else matmul
    shown: list[Point] = []
    for name, facts in result.facts["candidates"].items():
        series, work, roof = result.of(name), result.work_of(name), packed if facts.get("fewer_bits") else matmul
        for stage, quantity, most in (("transformer", "transformer", roof), ("decoder", "decode", matmul)):
            left_out = stage == "decoder" and (result.gpus > 1 or any(point.stage == "decoder" for point in shown))
            if quantity in series and not left_out:
                ranks = 1 if result.environment["device"]["type"] == "cpu" else result.gpus
                flops = work[stage]["flops"] / ranks
                intensity = work[stage]["flops"] / work[stage]["nbytes"]
                shown.append(Point(name, stage, intensity, flops / series[quantity].median, most))
    return shown


def roofline(result: Result, path: Path) -> Path | None:
    """FLOP/s over FLOPs per byte, below the measured copy and matmul, or the matmul in low precision."""
    copy, matmul = result.ceilings["copy_bytes"].best, result.ceilings["matmul_flops"].best
    scale, unit = (1e12, "TFLOP/s") if matmul > 1e12 else (1e9, "GFLOP/s")
    shown = points(result)
    if not shown:
        return None
    roofs = {matmul: "matmul"} | {
        point.most: f"{result.settings['config']['lowp']} matmul" for point in shown if point.most != matmul
    }

    def paint(axis: Any) -> None:
        places = [point.intensity for point in shown] + [most / copy for most in roofs]
        left, right = min(places) / 4, max(places) * 4
        for most, name in roofs.items():
            line = "-" if most == matmul else "--"
            axis.plot([left, most / copy, right], [left * copy / scale, most / scale, most / scale], line,
                      color=INK, linewidth=1.6)  # fmt: skip
            axis.annotate(f"{name} {most / scale:.4g} {unit}", (right, most / scale), (0, -11), ha="right",
                          textcoords="offset points", fontsize=8, color=SOFT)  # fmt: skip
        axis.annotate(f"copy {copy / 1e9:.4g} GB/s", (left, left * copy / scale), (14, 4), textcoords="offset points",
                      fontsize=8, color=SOFT)  # fmt: skip
        lowest = min(point.reached for point in shown)
        bottom, ceiling = 10 ** floor(log10(min(lowest, left * copy) / scale)), 10 ** ceil(log10(max(roofs) / scale))
        heights = spread_labels([log10(point.reached / scale) for point in shown], 0.085 * log10(ceiling / bottom))
        for (name, stage, intensity, reached, most), label in zip(shown, heights, strict=True):
            share = reached / min(intensity * copy, most)
            shade = colour(name) if stage == "transformer" else INK
            axis.scatter(intensity, reached / scale, s=42, marker="o" if stage == "transformer" else "^",
                         color=shade, zorder=3, edgecolor="white", linewidth=0.6)  # fmt: skip
            axis.annotate(
                f"{name} {stage}, {share:.0%} of the roof" if stage == "transformer" else f"decoder, {share:.0%}",
                (intensity, reached / scale), (1.015, 10**label), textcoords=("axes fraction", "data"), va="center",
                fontsize=8.5, color=shade, arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.6},
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(bottom, ceiling)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
        axis.set_xlabel("FLOPs per byte that must move")
        axis.set_ylabel(unit)

    return picture(path, result, "Roofline: achieved FLOP/s below the machine's ceilings", paint)


def sessions(result: Result, path: Path) -> Path | None:
    """FPS of all sessions together and of each."""
    curve = result.facts.get("sessions", [])
    if len(curve) < 2:
        return None

    def paint(axis: Any) -> None:
        counts = [point["sessions"] for point in curve]
        lines = {
            "all together": ([point["fps"] for point in curve], COLOURS["captured"], "o"),
            "each": ([point["fps"] / point["sessions"] for point in curve], COLOURS["plain"], "s"),
        }
        for name, (values, shade, marker) in lines.items():
            axis.plot(counts, values, marker=marker, color=shade)
            axis.annotate(f"{name} {values[-1]:.3g}", (1.015, values[-1]), xycoords=("axes fraction", "data"),
                          va="center", color=shade, fontsize=8.5, annotation_clip=False)  # fmt: skip
        video = result.facts["stream"]["video_fps"]
        axis.axhline(video, color=LIMIT, linewidth=1.1, linestyle="--")
        axis.annotate(f"real time for each: {video} FPS", (0.005, video), (0, -4), textcoords="offset points", va="top",
                      xycoords=("axes fraction", "data"), fontsize=8, color=LIMIT)  # fmt: skip
        axis.set_xticks(counts)
        axis.set_ylim(0, 1.12 * max(lines["all together"][0]))
        axis.set_xlabel("sessions at a time, each at a full window")
        axis.set_ylabel("frames per second")

    return picture(path, result, "Sessions on one engine", paint)


def intervals(result: Result, path: Path) -> Path | None:
    """The interval before each block, in order, with the limit of real time."""
    timed = {name.partition("/")[0]: series for name, series in result.series.items() if name.endswith("/interval")}
    if not timed:
        return None

    def paint(axis: Any) -> None:
        limit, ends = block_limit(result), []
        for name, series in timed.items():
            values = [sample * 1e3 for sample in series.samples]
            axis.plot(range(1, len(values) + 1), values, "o", color=colour(name), markersize=3.5)
            axis.axhline(series.median * 1e3, color=colour(name), linewidth=0.9)
            tail = series.tail(0.95)
            words = f"{name}: median {series.median * 1e3:.4g} ms" + (f", p95 {tail * 1e3:.4g} ms" if tail else "")
            ends.append((words, max(values), colour(name)))
        top = 1.15 * max(limit, *(max(series.samples) * 1e3 for series in timed.values()))
        real_time(axis, limit, "real time, the video in a block")
        heights = spread_labels([height for _, height, _ in ends], 0.07 * top)
        for (words, _, shade), height in zip(ends, heights, strict=True):
            axis.annotate(words, (0.005, height + 0.02 * top), xycoords=("axes fraction", "data"), color=shade,
                          fontsize=8.5, va="bottom")  # fmt: skip
        axis.set_ylim(0, top)
        axis.set_xlabel("block")
        axis.set_ylabel("milliseconds since the one before")

    return picture(path, result, "Time between blocks at a full window", paint)


def long_run(result: Result, path: Path) -> Path | None:
    """Block times of a long run with the limit of real time, and the memory below them."""
    facts = result.facts.get("long")
    if not facts:
        return None

    def paint(axis: Any, below: Any) -> None:
        from statistics import median

        times, memory = facts["intervals"], facts["device_memory"] or facts["process_memory"]
        width = max(1, len(times) // 300)
        starts = range(0, len(times), width)
        minutes = [facts["minutes"] * at / len(times) for at in starts]
        limit, full = block_limit(result), facts["blocks_before_full"]
        worst = max(range(full, len(times)), key=times.__getitem__)
        top = 1.1 * max(limit, times[worst] * 1e3)
        curves = {"wall clock": (times, "fused"), "CPU time of all threads": (facts["processor_seconds"], "captured")}
        for name, (values, shade) in curves.items():
            middle = [median(values[at : at + width]) * 1e3 for at in starts]
            label = f"{name}, median {median(values) * 1e3:.3g} ms"
            axis.plot(minutes, middle, color=COLOURS[shade], linewidth=1.1, label=label)
        axis.plot(facts["minutes"] * worst / len(times), times[worst] * 1e3, "^", color=INK, clip_on=False, zorder=4,
                  label=f"slowest block, {times[worst] * 1e3:.4g} ms")  # fmt: skip
        real_time(axis, limit, "real time, the video in a block")
        axis.set_ylim(0, top)
        axis.legend(loc="upper left", bbox_to_anchor=(0, 0.82), ncols=3, fontsize=8, columnspacing=1, handlelength=1.2)
        axis.set_ylabel("milliseconds per block")
        owner = "device" if facts["device_memory"] else "process"
        gigabytes = [max(memory[at : at + width]) / 1e9 for at in starts]
        below.plot(minutes, gigabytes, color=COLOURS["plain"], linewidth=1.4)
        below.set_ylim(0, 1.25 * max(memory) / 1e9)
        below.set_ylabel(f"{owner}, GB")
        below.set_xlabel("minutes of video")

    return picture(path, result, "A long run: block time, and memory", paint, 4.6, panels=2)


def pair_ratios(result: Result, path: Path) -> Path | None:
    """Bars of the speedup of a paired run: of blocks over the older tree, of the transformer over the public loop."""
    bars = [
        (f"{row.case}, {row.part}, {row.threads}t, to {over}", name, ratio)
        for row in pairs_of(result)
        for over in (("before",) if row.part == "block" else ("before", "plain"))
        for name in ("after", "fused")
        if (ratio := row.ratio(name, over)) is not None
    ]
    if not bars:
        return None
    colours = {"after": COLOURS["eager"], "fused": COLOURS["fused"]}

    def paint(axis: Any) -> None:
        labels = list(dict.fromkeys(label for label, _, _ in bars))[::-1]
        for label, name, ratio in bars:
            place = labels.index(label) + (0.2 if name == "after" else -0.2)
            axis.barh(place, ratio, height=0.36, color=colours[name])
            axis.annotate(f"{ratio:.2f} {name}", (ratio, place), (4, 0), textcoords="offset points", va="center")
        axis.axvline(1, color=INK, linewidth=1)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_xlim(0, max(ratio for _, _, ratio in bars) * 1.25)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("times as fast, by CPU time; median of the ratios within rounds")

    return picture(path, result, "Speed against the older tree and the public loop", paint, 1.2 + 0.2 * len(bars))


PLOTS: dict[str, tuple[Callable[[Result, Path], Path | None], ...]] = {
    "block": (ratio_bars, growth, roofline),
    "stream": (intervals, sessions, long_run),
    "kernels": (),
    "pairs": (pair_ratios,),
    "serve": (),
    "churn": (),
}
