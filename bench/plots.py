"""Pictures of a report: roofline, block time over the window, sessions, ratios, a long run. Needs matplotlib.

Each picture shows one result and names its machine, so that figures of a CPU and of a GPU never share an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
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
SPARE = ("#3d5a80", "#98a33b", "#c06c84", "#5c6f7b")


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def colour(name: str) -> str:
    return COLOURS.get(name) or SPARE[sum(map(ord, name)) % len(SPARE)]


def machine_line(result: Result) -> str:
    """Device, dtype and date, below every picture."""
    device = "CPU" if not result.on_gpu else "GPU"
    dtype = result.settings.get("config", {}).get("dtype", "")
    return f"{device}: {result.device_name}, {dtype}, {result.environment['date'][:10]}"


def picture(path: Path, result: Result, title: str, paint: Callable[[Any], None], height: float = 3.6) -> Path:
    """Paint a figure in the common style and write it atomically."""
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
        figure, axis = pyplot.subplots(figsize=(7.2, height))
        figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0.035, 1, 0.965)))  # space for the machine's name
        paint(axis)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        figure.text(0.995, 0.004, machine_line(result), ha="right", va="bottom", fontsize=7, color=SOFT)
        write_atomically(path, lambda part: figure.savefig(part, dpi=150, format="png", metadata={"Software": None}))
        pyplot.close(figure)
    return path


def ratio_bars(result: Result, path: Path) -> Path | None:
    """Bars of each candidate's median block time, with quartiles and the ratio to the plain loop."""
    timed = {name: series for name in result.facts["candidates"] if (series := result.of(name).get("block"))}
    if len(timed) < 2:
        return None
    against = "plain" if "plain" in timed else next(iter(timed))

    def paint(axis: Any) -> None:
        names = sorted(timed, key=lambda name: timed[name].median, reverse=True)
        for place, name in enumerate(names):
            series = timed[name]
            middle = series.median * 1e3
            low, high = series.quantile(0.25) * 1e3, series.quantile(0.75) * 1e3
            axis.barh(place, middle, height=0.62, color=colour(name))
            axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color=INK, capsize=3, linewidth=1)
            label = f"{middle:.4g} ms"
            if name != against:
                low_ratio, high_ratio = interval(series, timed[against])
                ratio = timed[against].median / series.median
                label += f"   {ratio:.2f}x {against} ({low_ratio:.2f} to {high_ratio:.2f})"
            axis.annotate(label, (max(high, middle), place), (6, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(names)), names)
        axis.set_xlim(0, max(series.quantile(0.75) for series in timed.values()) * 1e3 * 1.55)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("milliseconds a block; bar: median, whisker: quartiles; in brackets: 95 % interval")

    return picture(path, result, "One block at a full window, with the decoder", paint, 1.3 + 0.42 * len(timed))


def growth(result: Result, path: Path) -> Path | None:
    """Block time over the frames in the window, a line for each candidate."""
    curves = {name: curve for name, curve in result.facts["growth"].items() if len(curve) > 1}
    if not curves:
        return None

    def paint(axis: Any) -> None:
        from statistics import median

        for name, curve in curves.items():
            frames = [int(count) for count in curve]
            middle = [median(samples) * 1e3 for samples in curve.values()]
            axis.plot(frames, middle, marker="o", markersize=4, linewidth=1.6, color=colour(name), label=name)
            axis.fill_between(
                frames, [min(samples) * 1e3 for samples in curve.values()],
                [max(samples) * 1e3 for samples in curve.values()], color=colour(name), alpha=0.12, linewidth=0,
            )  # fmt: skip
        axis.axvline(result.facts["block"]["window_frames"], color=SOFT, linewidth=0.8, linestyle=":")
        axis.annotate(
            "full window ", (result.facts["block"]["window_frames"], 0.02), xycoords=("data", "axes fraction"),
            fontsize=8, color=SOFT, ha="right",
        )  # fmt: skip
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted({int(count) for curve in curves.values() for count in curve}))
        axis.set_xlabel("latent frames in the window, the block's own included")
        axis.set_ylabel("milliseconds a block")
        axis.legend(ncols=min(len(curves), 4), loc="upper left")

    return picture(path, result, "Block time while the window fills; line: median, band: best to worst", paint)


class Point(NamedTuple):
    """One stage of a candidate: FLOPs per byte, FLOP/s, and the FLOP/s of a matmul in its precision."""

    name: str
    stage: str
    intensity: float
    reached: float
    most: float


def points(result: Result) -> list[Point]:
    """The transformer of each candidate, in its precision, and the decoder once: all share it."""
    matmul = result.ceilings["matmul_flops"].best
    packed = result.ceilings["packed_flops"].best if "packed_flops" in result.ceilings else matmul
    shown: list[Point] = []
    for name, facts in result.facts["candidates"].items():
        series, work, roof = result.of(name), result.work_of(name), packed if facts.get("fewer_bits") else matmul
        for stage, quantity, most in (("transformer", "transformer", roof), ("decoder", "decode", matmul)):
            drawn = stage == "decoder" and any(point.stage == "decoder" for point in shown)
            if quantity in series and not drawn:
                flops = work[stage]["flops"]
                intensity = flops / work[stage]["nbytes"]
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
        for name, stage, intensity, reached, most in shown:
            roof = min(intensity * copy, most)
            axis.scatter(
                intensity, reached / scale, s=42, marker="o" if stage == "transformer" else "^", color=colour(name),
                label=f"{name}, {stage}: {reached / roof:.0%} of the roof", zorder=3, edgecolor="white", linewidth=0.6,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        lowest = min(point.reached for point in shown)
        axis.set_ylim(min(lowest / 2, left * copy) / scale, max(roofs) / scale * 2)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
        axis.set_xlabel("FLOPs per byte that must move")
        axis.set_ylabel(unit)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)

    return picture(path, result, "Roofline: achieved FLOP/s below the machine's ceilings", paint)


def sessions(result: Result, path: Path) -> Path | None:
    """FPS of all sessions together and of each."""
    curve = result.facts.get("sessions", [])
    if len(curve) < 2:
        return None

    def paint(axis: Any) -> None:
        counts = [point["sessions"] for point in curve]
        together = [point["fps"] for point in curve]
        axis.plot(counts, together, marker="o", color=COLOURS["captured"], label="all together")
        axis.plot(
            counts, [point["fps"] / point["sessions"] for point in curve], marker="s", color=COLOURS["plain"],
            label="each",
        )  # fmt: skip
        video = result.facts["stream"]["video_fps"]
        axis.axhline(video, color=SOFT, linewidth=0.9, linestyle="--")
        axis.annotate(f"the video's {video} FPS", (counts[-1], video), (0, 4), textcoords="offset points", ha="right",
                      fontsize=8, color=SOFT)  # fmt: skip
        axis.set_xticks(counts)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("sessions at a time, each at a full window")
        axis.set_ylabel("frames a second")
        axis.legend()

    return picture(path, result, "Sessions on one engine", paint)


def intervals(result: Result, path: Path) -> Path | None:
    """Cumulative distribution of the intervals between blocks."""
    timed = {name.partition("/")[0]: series for name, series in result.series.items() if name.endswith("/interval")}
    if not timed:
        return None

    def paint(axis: Any) -> None:
        for name, series in timed.items():
            ordered = sorted(sample * 1e3 for sample in series.samples)
            shares = [index / (len(ordered) - 1) * 100 for index in range(len(ordered))]
            axis.plot(ordered, shares, color=colour(name), linewidth=1.6, label=name)
            for share, value in ((0.5, series.median), (0.95, series.tail(0.95))):
                if value is None:
                    continue
                at = value * 1e3
                axis.plot([at], [share * 100], marker="o", markersize=4, color=colour(name))
                axis.annotate(f"p{share * 100:.0f}: {at:.4g} ms", (at, share * 100), (-7, 3), fontsize=8,
                              textcoords="offset points", ha="right")  # fmt: skip
        axis.set_xlim(left=0)
        axis.set_ylim(0, 103)
        axis.set_xlabel("milliseconds from one block on the sink to the next")
        axis.set_ylabel("% of blocks")

    return picture(path, result, "Time between blocks at a full window", paint)


def long_run(result: Result, path: Path) -> Path | None:
    """Interval and memory over a long run, and its slowest block."""
    facts = result.facts.get("long")
    if not facts:
        return None

    def paint(axis: Any) -> None:
        from statistics import median

        times, memory = facts["intervals"], facts["device_memory"] or facts["process_memory"]
        width = max(1, len(times) // 300)
        minutes = [facts["minutes"] * at / len(times) for at in range(0, len(times), width)]
        highest = 0.0
        curves = {"wall clock": (times, "fused"), "CPU time": (facts["processor_seconds"], "captured")}
        for name, (values, shade) in curves.items():
            middle = [median(values[at : at + width]) * 1e3 for at in range(0, len(values), width)]
            axis.plot(minutes, middle, color=COLOURS[shade], linewidth=1.1, label=name)
            highest = max(highest, sorted(middle)[int(0.99 * (len(middle) - 1))])
        top, full = 1.35 * highest, facts["blocks_before_full"]
        worst = max(range(full, len(times)), key=times.__getitem__)
        place = facts["minutes"] * worst / len(times), min(times[worst] * 1e3, top)
        axis.plot(*place, "^", color=COLOURS["compiled"], clip_on=False, zorder=4,
                  label=f"slowest block, {times[worst] * 1e3:.4g} ms")  # fmt: skip
        axis.set_ylim(0, top)
        axis.legend(loc="upper left", ncols=3)
        axis.set_xlabel("minutes of video")
        axis.set_ylabel("milliseconds a block")
        other = axis.twinx()
        other.plot(minutes, [max(memory[at : at + width]) / 1e9 for at in range(0, len(times), width)],
                   color=COLOURS["plain"], linewidth=1.4)  # fmt: skip
        other.set_ylim(0, 1.25 * max(memory) / 1e9)
        other.set_ylabel("memory of the " + ("device" if facts["device_memory"] else "process") + ", GB",
                         color=COLOURS["plain"])  # fmt: skip
        other.grid(visible=False)
        other.spines["right"].set_visible(True)

    return picture(path, result, "A long run: block time and memory", paint)


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
}
