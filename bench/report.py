"""Report of a folder of results: one Markdown page with pictures.

GPU and CPU results are in separate sections. The project's goals are on its own page only.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError, quoted
from ..runtime.files import check_output, write_atomically
from .goals import GOALS, Goal
from .nvml import slowed_by
from .plots import PLOTS, has_matplotlib
from .report_tables import (
    Column,
    amount,
    block_part,
    cells_table,
    churn_part,
    cut,
    in_flops,
    kernels_part,
    leaderboard,
    pairs_part,
    precision_of,
    serve_part,
    stream_part,
    table,
)
from .result import FAILED, Result, read_failures, read_folder

BUSY = 1.1  # threads and load per core above which the machine is busy; an idle machine has a little load
BEGINNING = "# Performance\n\nMade by `inferix bench report"  # by which `pictures_of` recognises a page
HOW = """\
## How to read this page

- A candidate is timed only after its outputs match: its latents and frames are compared with the eager executor's,
  block by block past the first full window. A candidate that differs by more than the tolerance is refused.
- Timed outputs are compared as well: all of them in `block`, the first blocks of the FPS stream in `stream`.
- A block is timed at a **full window**, reached by running the stream, not with an empty cache.
- FPS are pixel frames per second of wall time, the decoder included.
- The decoder's column is decoding and the conversion to uint8 frames. On a GPU, or with one thread of torch, the engine
  runs both in parallel with the next block (`interval`); the baselines run them between blocks.
- Times are medians with quartiles and the worst sample. The result's file has every sample.
- Shares are relative to a matmul and a copy timed in the same run, not to a data sheet.
- Baselines run in the same process with the same weights. `plain` has the structure of the public reference loop;
  `compiled` is `plain` with its layers through `torch.compile`; `reduce-overhead`, with all layers of a pass together
  through `torch.compile(mode="reduce-overhead")`.

[benchmarks.md](benchmarks.md) documents the commands, the clocks, the schema of the files and the statistic of
`inferix bench compare`.
"""
CPU_NOTE = """\
These runs are of small models on a CPU. They show that the benchmarks work and which figures they give. They say
nothing about a GPU.
"""
LEADERBOARD_NOTE = """\
The fastest run of each form for a case, on one device and in one dtype, by the median time with a cold cache. Times of
two files were taken in two runs: only forms of one run were timed in turns, and have a verdict on each other.
"""


OWN_RESULTS = Path(__file__).resolve().parent / "results"  # those of the project's own page


def write_report(folder: Path, out: Path, goals: bool | None = None) -> list[Path]:
    """Write the page and, beside it, a folder of the same name with the pictures; return the paths written.

    goals: with the project's goals; None for the project's own results only.
    Pictures of an earlier page at `out` are removed; other files stay. Raises UsageError as `pictures_beside` does.
    """
    results = read_folder(folder)
    pictures = pictures_beside(out, [folder / name for name in results])
    check_output(out)
    old = {pictures / name for name in pictures_of(out)}
    with tempfile.TemporaryDirectory() as temporary:
        drawn = draw_all(results, Path(temporary)) if has_matplotlib() else {}
        links = {name: [f"{pictures.name}/{path.name}" for path in paths] for name, paths in drawn.items()}
        shown = folder.resolve() == OWN_RESULTS if goals is None else goals
        text = page(results, str(folder), str(out), links, read_failures(folder), shown)
        new = [pictures / path.name for paths in drawn.values() for path in paths]
        for path in new:
            pictures.mkdir(exist_ok=True)
            shutil.copy(Path(temporary) / path.name, path)
    write_atomically(out, lambda part: part.write_text(text, "utf-8"))
    for path in old.difference(new):
        path.unlink(missing_ok=True)
    return [out, *sorted(new)]


def pictures_beside(out: Path, results: Iterable[Path]) -> Path:
    """Folder of a page's pictures. Raises UsageError if `out` is no Markdown file or the folder has results."""
    if out.suffix != ".md":
        example = quoted(out.with_suffix(".md"))
        raise UsageError(f"out is {quoted(out)}; expected a Markdown file, such as {example}")
    pictures = out.with_suffix("")
    if any(path.resolve().is_relative_to(pictures.resolve()) for path in results):
        raise UsageError(f"the folder of pictures {quoted(pictures)} has results in it; choose another out")
    return pictures


def pictures_of(out: Path) -> list[str]:
    """Names of the pictures in the folder of a page; empty if `write_report` did not write the page."""
    text = out.read_text("utf-8", "replace") if out.is_file() else ""
    return re.findall(rf"\]\({re.escape(out.stem)}/([^/)]+\.png)\)", text) if text.startswith(BEGINNING) else []


def draw_all(results: dict[str, Result], folder: Path) -> dict[str, list[Path]]:
    """Draw every picture of every result: name of the result -> paths."""
    drawn: dict[str, list[Path]] = {}
    for (name, result), stem in zip(results.items(), stems(results), strict=True):
        paths = [plot(result, folder / f"{stem}-{plot.__name__.replace('_', '-')}.png") for plot in PLOTS[result.kind]]
        drawn[name] = [path for path in paths if path is not None]
    return drawn


def stems(names: Iterable[str]) -> list[str]:
    """Unique prefix of the pictures' names of each result."""
    unique: list[str] = []
    for name in names:
        plain = stem = re.sub(r"[^\w.-]+", "-", name.removesuffix(".json"))
        number = 1
        while stem in unique:
            number += 1
            stem = f"{plain}-{number}"
        unique.append(stem)
    return unique


def page(
    results: dict[str, Result],
    folder: str,
    out: str,
    pictures: dict[str, list[str]],
    failures: dict[str, str] | None = None,
    goals: bool = True,
) -> str:
    """Text of the page, first what was measured. pictures: links by the result's name.

    failures: errors of failed `gpu_check` units. goals: with the project's goals, at the end.
    """
    gpu = {name: result for name, result in results.items() if result.on_gpu}
    cpu = {name: result for name, result in results.items() if not result.on_gpu}
    boards = list(leaderboard(results))
    parts = [
        f"{BEGINNING} {folder} --out {out}` from {len(results)} files in `{folder}`; do not edit it.",
        "## What was measured",
        inventory(results),
        *(["No result of a GPU is among them: there is no figure of a GPU on this page."] if not gpu else []),
        *(["## Leaderboard of kernels", LEADERBOARD_NOTE, *boards] if boards else []),
        *(["## On a GPU"] if gpu or failures else []),
        *([failures_part(failures)] if failures else []),
        *(section(name, result, pictures.get(name, [])) for name, result in gpu.items()),
        *(["## On a CPU", CPU_NOTE] if cpu else []),
        *(section(name, result, pictures.get(name, [])) for name, result in cpu.items()),
        *(["## Goals on a GPU", goals_part(gpu)] if goals else []),
        HOW,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def inventory(results: dict[str, Result]) -> str:
    """Table of all results."""
    columns = (
        Column("file", lambda row: f"`{row[0]}`"),
        Column("kind", lambda row: row[1].kind),
        Column("device", lambda row: f"{device_type(row[1])}: {row[1].device_name}"),
        Column("model", lambda row: str(row[1].subject.get("model", ""))),
        Column("result", lambda row: headline(row[1])),
        Column("date", lambda row: row[1].environment["date"][:10]),
        Column("commit", lambda row: str(row[1].environment["commit"] or "unknown")),
    )
    return table(columns, results.items())


def headline(result: Result) -> str:
    """The figure of a result that a reader looks for first."""
    if result.kind == "block":
        timed = {name: series for name in result.facts["candidates"] if (series := result.of(name).get("block"))}
        if not timed:
            return "nothing timed"
        name, series = min(timed.items(), key=lambda item: item[1].median)
        return f"{name}: {amount(series.median, 's')} per block of {result.facts['block']['pixel_frames']} frames"
    if result.kind == "stream":
        facts = result.facts["stream"]
        return f"{facts['fps']:.3g} FPS, {facts['real_time_factor']:.3g} times real time"
    if result.kind == "serve":
        rows = result.facts["rows"]
        return "late blocks: " + ", ".join(f"{row['late_blocks']} of {row['blocks']}" for row in rows)
    if result.kind == "churn":
        return f"{result.facts['growth'] / 1e6:+.0f} MB in {result.settings['minutes']:g} minutes"
    return f"{len(result.facts.get('rows', result.series))} timings"


def device_type(result: Result) -> str:
    return "GPU" if result.on_gpu else "CPU"


def failures_part(failures: dict[str, str]) -> str:
    """Table of the failed units of `gpu_check`."""
    rows = [(f"`{unit}{FAILED}`", cut(error)) for unit, error in failures.items()]
    return "**Failed units.** They have no result. Remove a unit's file to run it again:\n\n" + cells_table(
        ("file", "error"), rows
    )


def goals_part(gpu: dict[str, Result]) -> str:
    """Goals with the results for them."""
    return "\n\n".join(
        (
            "Goals at 832x480 with random weights, and the command that measures each. On another GPU the command "
            "gives figures, but reaches no goal. Our clock covers all passes of a block, its commit included, for "
            "`interval` the decoder and the pictures on the host too. Floor: operations and least bytes at the maker's "
            "peak rates. Predicted: by the time model of `inferix graph "
            "--dry-run cuda:90`, not measured. Published figures have other clocks, stated beside each:",
            cells_table(
                ("work", "goal", "floor", "predicted", "strongest published figure", "measured", "command"),
                [goal_row(goal, gpu) for goal in GOALS],
            ),
            "To measure all of them in resumable stages of under nine minutes, run "
            "`python -m inferix.bench.gpu_check --stage STAGE --out results` for the stages `kernels`, `block` and "
            "`stream`, each again while it exits with 3; then `inferix bench report results --goals`.",
        )
    )


def goal_row(goal: Goal, gpu: dict[str, Result]) -> tuple[str, ...]:
    """Cells of a goal: name, target, floor, prediction, published figure, values of results, and the command.

    The values of results have those of its GPU first.
    """
    values = []
    for name, result in gpu.items():
        if not goal.matches(result):
            continue
        if (reached := goal.reached(result)) is None:
            values.append((2, f"no figure in `{name}`"))
            continue
        on_its_card = goal.on_its_card(result)
        verdict = "met" if goal.met_by(reached.value) else "missed"
        note = verdict if on_its_card else f"on another GPU: {result.device_name}"
        value = ", ".join(filter(None, (amount(reached.value, goal.unit), reached.by, note)))
        values.append((0 if on_its_card else 1, f"{value} (`{name}`)"))
    target = f"{'=' if goal.exact else '<='} {amount(goal.value, goal.unit)} ({goal.card})"
    measured = "; ".join(text for _, text in sorted(values)) or "not measured yet"
    expected = ("-" if value is None else amount(value, goal.unit) for value in (goal.floor, goal.predicted))
    return goal.name, target, *expected, goal.public or "-", measured, f"`{goal.command}`"


def section(name: str, result: Result, pictures: Iterable[str]) -> str:
    """Section of one result: title, circumstances, tables and pictures."""
    kind = {
        "block": block_part, "stream": stream_part, "kernels": kernels_part, "pairs": pairs_part, "serve": serve_part,
        "churn": churn_part,
    }[result.kind]  # fmt: skip
    parts = [f"### {title(result)}", circumstances(name, result), *kind(result)]
    parts += [f"![{Path(link).stem}]({link})" for link in pictures]
    return "\n\n".join(parts)


def title(result: Result) -> str:
    device = f"{device_type(result)}, {result.device_name}"
    if result.kind == "kernels":
        return f"Kernels ({device})"
    if result.kind == "serve":
        return f"Live sessions as their clients see them ({device})"
    if result.kind == "churn":
        return f"A server's memory while clients join, leave and stall ({device})"
    if result.kind == "pairs":
        return f"Pairs: {result.facts['before']} and after, {result.settings['config']['dtype']} ({device})"
    width, height = result.settings["size"]
    preset, precision = result.settings["preset"]["name"], ", ".join(precision_of(result.settings["config"]))
    return f"{result.kind.title()}: {result.subject['model']}, {preset}, {width}x{height}, {precision} ({device})"


def circumstances(name: str, result: Result) -> str:
    """Date, machine, weights, ceilings and clock of a result, as a list."""
    environment = result.environment
    host, versions = environment["host"], environment["versions"]
    lines = [
        f"`{name}`, {environment['date']}, commit {environment['commit'] or 'unknown'}: `{environment['command']}`",
        f"host: {host['processor']}, {host['cores']} cores, {host['threads']} threads used, load {host['load']} at the "
        f"start; torch {versions['torch']}, Python {versions['python']}"
        + (f", CUDA {versions['cuda']}, driver {environment['driver'] or 'unknown'}" if result.on_gpu else ""),
    ]
    if is_busy(result):
        lines.append(
            f"**the machine was busy** (load {host['load']} on {host['cores']} cores): times and ceilings may vary and "
            "be worse than on an idle machine"
        )
    if clocks := environment["clocks"]:
        lines.append(f"GPU at the start: {', '.join(readings(clocks)) or 'no readings'}")
    if states := result.facts.get("clocks_in_between"):
        lines.append(in_between(states))
    if result.kind in ("block", "stream"):
        lines.append(weights_line(result))
    ceilings, lowp = result.ceilings, ""
    if "packed_flops" in ceilings:
        lowp = f"{result.settings['config']['lowp']} matmul {in_flops(ceilings['packed_flops'].best)}/s, "
    if ceilings:
        lines.append(
            f"ceilings in this run: matmul {in_flops(ceilings['matmul_flops'].best)}/s, {lowp}copy "
            f"{ceilings['copy_bytes'].best / 1e9:.4g} GB/s"
        )
    lines.append(f"clock: {result.clock}")
    return "\n".join(f"- {line}" for line in lines)


def weights_line(result: Result) -> str:
    checkpoint, weights = result.subject["checkpoint"], "random weights"
    if not result.subject["random_weights"]:
        weights = f"weights {checkpoint['source']}, sha256 {str(checkpoint['sha256'])[:16]}"
    return f"{weights}, {result.subject['parameters'] / 1e6:.4g} M parameters, decoder {result.subject['decoder']}"


def is_busy(result: Result) -> bool:
    """Return True if load and the run's threads exceed the cores. A GPU needs one thread."""
    host = result.environment["host"]
    threads = 1 if result.on_gpu else host["threads"]
    return host["load"] is not None and host["load"] + threads > BUSY * host["cores"]


def readings(clocks: dict[str, Any]) -> Iterator[str]:
    """Clock, power, temperature and throttle reasons of a GPU, without missing values."""
    for key, unit in (("graphics_mhz", "MHz"), ("watts", "W"), ("celsius", "°C")):
        value, limit = clocks.get(key), clocks.get(f"{key}_most")
        if value is not None:
            yield f"{value:g} {unit}" if limit is None else f"{value:g} of {limit:g} {unit}"
    if reasons := slowed_by(clocks.get("slowed_by")):
        yield f"**throttled by {' and '.join(reasons)}**"


def in_between(states: list[dict[str, Any]]) -> str:
    """Range of clock and temperature after each stream; each throttle reason with its count and candidates."""
    ranges = []
    for key, unit in (("graphics_mhz", "MHz"), ("celsius", "°C")):
        if values := [state[key] for state in states if state.get(key) is not None]:
            ranges.append(f"{min(values):g} to {max(values):g} {unit}")
    throttled: dict[str, list[str]] = {}
    for state in states:
        for reason in slowed_by(state.get("slowed_by")):
            throttled.setdefault(reason, []).append(state.get("candidate", ""))
    for reason, candidates in throttled.items():
        names = ", ".join(dict.fromkeys(filter(None, candidates)))
        ranges.append(f"**throttled by {reason}** in {len(candidates)} of them" + (f" ({names})" if names else ""))
    if not throttled and any(state.get("slowed_by") is not None for state in states):
        ranges.append("never throttled")
    return f"GPU in {len(states)} readings between timings: {', '.join(ranges) or 'no values'}"
