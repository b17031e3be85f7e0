"""A folder of results as one Markdown page with pictures: what was measured, where and when, and what was not.

Results of GPUs and of CPUs stand in sections of their own. Goals are in the section of the GPUs alone.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..runtime.config import EVERY_BLOCK
from ..runtime.files import check_output, write_atomically
from .compare import interval
from .goals import GOALS, Goal
from .nvml import slowed_by
from .plots import PLOTS, has_matplotlib
from .result import FAILED, Result, Series, read_failures, read_folder

Row = tuple[str, ...]
WAITED = 0.1  # share by which wall time may be above the processor's before the page says so
SPARE = 1.1  # work by cores, above which the machine is busy: something always runs a little
LINE = 300  # characters of an error, at most
BEGINNING = "# Performance\n\nMade by `inferix bench report"  # of every page, by which an earlier one is known
HOW = """\
## How to read this page

- Nothing is timed that has not just matched: a candidate's latents and frames are held against the eager executor's,
  block by block up to the full window and beyond. One that is further off than the stated tolerance is refused.
- What was timed is compared as well: of `block` all of it, of `stream` the first blocks of the one that FPS are of.
- A block is timed at a **full window**, reached by running the stream, not with an empty cache.
- FPS are pixel frames out for each second of wall time, the decoder included.
- The decoder's column is decoding and the conversion to uint8 frames. The engine does both on a thread of its own,
  beside the next block where one is asked for (`interval`); the baselines do them in line.
- Times are medians; quartiles and the worst are beside them, and every sample is in the result's file.
- Shares are of a matmul and a copy timed in the same run, not of a data sheet.
- Baselines run in the same process with the same weights. `plain` has the structure of the public reference loop;
  `compiled` is `plain` with its layers through `torch.compile`.

[benchmarks.md](benchmarks.md) has the commands, what each clock covers, the files' schema and the statistic of
`inferix bench compare`.
"""
CPU_NOTE = """\
These runs are of small models on a CPU. They show that the harness works and how its figures look. They say nothing
about a GPU, and no goal is set for them.
"""


def write_report(folder: Path, out: Path) -> list[Path]:
    """Write the page and, beside it, a folder of its name with the pictures; returns what was written.

    Pictures of an earlier page in that place go; nothing else is touched. UsageError where the page or its pictures
    would lie among other things: see `pictures_beside`.
    """
    results = read_folder(folder)
    pictures = pictures_beside(out, [folder / name for name in results])
    check_output(out)
    old = {pictures / name for name in pictures_of(out)}
    with tempfile.TemporaryDirectory() as made:
        drawn = draw_all(results, Path(made)) if has_matplotlib() else {}
        links = {name: [f"{pictures.name}/{path.name}" for path in paths] for name, paths in drawn.items()}
        text = page(results, str(folder), str(out), links, read_failures(folder))
        new = [pictures / path.name for paths in drawn.values() for path in paths]
        for path in new:
            pictures.mkdir(exist_ok=True)
            shutil.copy(Path(made) / path.name, path)
    write_atomically(out, lambda part: part.write_text(text, "utf-8"))
    for path in old.difference(new):
        path.unlink(missing_ok=True)
    return [out, *sorted(new)]


def pictures_beside(out: Path, results: Iterable[Path]) -> Path:
    """The folder for a page's pictures; UsageError if `out` is no page, or results lie in that folder."""
    if out.suffix != ".md":
        raise UsageError(f"--out is {str(out)!r}; expected a Markdown page, such as {str(out.with_suffix('.md'))!r}")
    pictures = out.with_suffix("")
    if any(path.resolve().is_relative_to(pictures.resolve()) for path in results):
        raise UsageError(f"its pictures would go into {str(pictures)!r}, where results are; choose another --out")
    return pictures


def pictures_of(out: Path) -> list[str]:
    """Names of the pictures in a page's own folder, if `write_report` made the page."""
    text = out.read_text("utf-8", "replace") if out.is_file() else ""
    return re.findall(rf"\]\({re.escape(out.stem)}/([^/)]+\.png)\)", text) if text.startswith(BEGINNING) else []


def draw_all(results: dict[str, Result], folder: Path) -> dict[str, list[Path]]:
    """Every picture of every result."""
    found: dict[str, list[Path]] = {}
    for (name, result), stem in zip(results.items(), stems(results), strict=True):
        paths = [plot(result, folder / f"{stem}-{plot.__name__.replace('_', '-')}.png") for plot in PLOTS[result.kind]]
        found[name] = [path for path in paths if path is not None]
    return found


def stems(names: Iterable[str]) -> list[str]:
    """What the names of each result's pictures begin with; no two are the same."""
    found: list[str] = []
    for name in names:
        plain = stem = re.sub(r"[^\w.-]+", "-", name.removesuffix(".json"))
        number = 1
        while stem in found:
            number += 1
            stem = f"{plain}-{number}"
        found.append(stem)
    return found


def page(
    results: dict[str, Result],
    folder: str,
    out: str,
    pictures: dict[str, list[str]],
    failures: dict[str, str] | None = None,
) -> str:
    """The whole page. pictures: links by the result's name. failures: why units of `gpu_check` have no result."""
    gpu = {name: result for name, result in results.items() if result.on_gpu}
    cpu = {name: result for name, result in results.items() if not result.on_gpu}
    parts = [
        f"{BEGINNING} {folder} --out {out}` from {len(results)} files in `{folder}`; do not edit it.",
        inventory(results),
        "## On a GPU",
        gpu_part(gpu, pictures, failures or {}),
        "## On a CPU",
        CPU_NOTE if cpu else "No result of a CPU is in the folder.",
        *(section(name, result, pictures.get(name, [])) for name, result in cpu.items()),
        HOW,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def inventory(results: dict[str, Result]) -> str:
    rows = [
        (
            f"`{name}`", result.kind, ("GPU: " if result.on_gpu else "CPU: ") + result.device_name,
            str(result.subject.get("model", "")), result.environment["date"][:10],
            str(result.environment["commit"] or "unknown"),
        )
        for name, result in results.items()
    ]  # fmt: skip
    return table(("file", "kind", "where", "model", "when", "commit"), rows)


def gpu_part(gpu: dict[str, Result], pictures: dict[str, list[str]], failures: dict[str, str]) -> str:
    """Goals with what reached them, what was tried and failed, then the results."""
    parts = []
    if not gpu:
        parts.append("**No result of a GPU has been recorded yet**: there is no figure of a GPU on this page.")
    parts.append(
        "What we aim for, at 832x480 and random weights, and the command that measures it (on a card of another kind a "
        "command gives figures too, but not the goal's):"
    )
    parts.append(table(("work", "goal", "measured", "command"), [goal_row(goal, gpu) for goal in GOALS]))
    parts.append(
        "All of them in stages of under nine minutes each, which go on where they were stopped: "
        "`python -m inferix.bench.gpu_check --stage STAGE --out results`, STAGE being `kernels`, `block` and `stream` "
        "in turn, each again for as long as it exits with 3; then `inferix bench report results`."
    )
    if failures:
        parts.append("**Tried, and failed.** These units have no result; one whose file is removed is tried again:")
        parts.append(table(("file", "why"), [(f"`{unit}{FAILED}`", short(why)) for unit, why in failures.items()]))
    parts += [section(name, result, pictures.get(name, [])) for name, result in gpu.items()]
    return "\n\n".join(parts)


def goal_row(goal: Goal, gpu: dict[str, Result]) -> Row:
    """What results have reached it, those of its card first."""
    found = []
    for name, result in gpu.items():
        if not goal.matches(result):
            continue
        if (reached := goal.reached(result)) is None:
            found.append((2, f"no figure in `{name}`"))
            continue
        ours = goal.on_its_card(result)
        verdict = "met" if goal.met_by(reached.value) else "missed"
        where = verdict if ours else f"on another card: {result.device_name}"
        said = ", ".join(filter(None, (amount(reached.value, goal.unit), reached.by, where)))
        found.append((0 if ours else 1, f"{said} (`{name}`)"))
    aim = f"{'=' if goal.exact else '<='} {amount(goal.value, goal.unit)} ({goal.card})"
    told = "; ".join(text for _, text in sorted(found)) or "not measured yet"
    return goal.name, aim, told, f"`{goal.command}`"


def section(name: str, result: Result, pictures: Iterable[str]) -> str:
    kind = {"block": block_part, "stream": stream_part, "kernels": kernels_part}[result.kind]
    parts = [f"### {title(result)}", circumstances(name, result), *kind(result)]
    parts += [f"![{Path(link).stem}]({link})" for link in pictures]
    return "\n\n".join(parts)


def title(result: Result) -> str:
    where = f"{'GPU' if result.on_gpu else 'CPU'}, {result.device_name}"
    if result.kind == "kernels":
        return f"Kernels ({where})"
    width, height = result.settings["size"]
    preset, dtype = result.settings["preset"]["name"], ", ".join(precision_of(result.settings["config"]))
    return f"{result.kind.title()}: {result.subject['model']}, {preset}, {width}x{height}, {dtype} ({where})"


def precision_of(config: dict[str, Any]) -> Iterator[str]:
    """The model's dtype, and what layers and pages have in its place."""
    yield config["dtype"]
    if config["lowp"]:
        layers, kept = list(config["lowp_layers"]), list(config["lowp_keep"])
        only = f" in {' '.join(layers)}" if layers != list(EVERY_BLOCK) else ""
        yield f"{config['lowp']} linears{only}" + (f" but {' '.join(kept)}" if kept else "")
    if config["kv_dtype"] not in (None, config["dtype"]):
        yield f"{config['kv_dtype']} pages"


def circumstances(name: str, result: Result) -> str:
    """When, where, with what; what the clock covers."""
    around = result.environment
    host, versions = around["host"], around["versions"]
    lines = [
        f"`{name}`, {around['date']}, commit {around['commit'] or 'unknown'}: `{around['command']}`",
        f"host: {host['processor']}, {host['cores']} cores, {host['threads']} threads used, load {host['load']} at the "
        f"start; torch {versions['torch']}, Python {versions['python']}"
        + (f", CUDA {versions['cuda']}, driver {around['driver'] or 'unknown'}" if result.on_gpu else ""),
    ]
    if is_busy(result):
        lines.append(
            f"**the machine had other work in the minute before** (load {host['load']} on {host['cores']} cores): "
            "times and ceilings may be worse than it can do, and vary"
        )
    if clocks := around["clocks"]:
        lines.append(f"card as found: {', '.join(readings(clocks)) or 'it tells nothing'}")
    if states := result.facts.get("clocks_in_between"):
        lines.append(in_between(states))
    if result.kind != "kernels":
        checkpoint = result.subject["checkpoint"]
        weights = "random weights" if result.subject["random_weights"] else (
            f"weights {checkpoint['source']}, sha256 {str(checkpoint['sha256'])[:16]}"
        )  # fmt: skip
        count, decoder = result.subject["parameters"] / 1e6, result.subject["decoder"]
        lines.append(f"{weights}, {count:.4g} M parameters, decoder {decoder}")
    roofs = result.ceilings
    packed = f"{result.settings['config']['lowp']} matmul {in_flops(roofs['packed_flops'].best)}/s, " if (
        "packed_flops" in roofs
    ) else ""  # fmt: skip
    lines.append(
        f"ceilings in this run: matmul {in_flops(roofs['matmul_flops'].best)}/s, {packed}copy "
        f"{roofs['copy_bytes'].best / 1e9:.4g} GB/s"
    )
    lines.append(f"clock: {result.clock}")
    return "\n".join(f"- {line}" for line in lines)


def is_busy(result: Result) -> bool:
    """Whether other work left the run fewer cores than it has threads; one is enough to drive a GPU."""
    host = result.environment["host"]
    return host["load"] is not None and host["load"] + (1 if result.on_gpu else host["threads"]) > SPARE * host["cores"]


def readings(clocks: dict[str, Any]) -> Iterator[str]:
    """A card's clock, power and temperature, and what slows it, as far as it tells."""
    for key, unit in (("graphics_mhz", "MHz"), ("watts", "W"), ("celsius", "°C")):
        value, most = clocks.get(key), clocks.get(f"{key}_most")
        if value is not None:
            yield f"{value:g} {unit}" if most is None else f"{value:g} of {most:g} {unit}"
    if reasons := slowed_by(clocks.get("slowed_by")):
        yield f"**slowed by {' and '.join(reasons)}**"


def in_between(states: list[dict[str, Any]]) -> str:
    """The card after each stream: from where to where, and by what it was slowed how often, and whom that met."""
    said = []
    for key, unit in (("graphics_mhz", "MHz"), ("celsius", "°C")):
        if values := [state[key] for state in states if state.get(key) is not None]:
            said.append(f"{min(values):g} to {max(values):g} {unit}")
    slowed: dict[str, list[str]] = {}
    for state in states:
        for reason in slowed_by(state.get("slowed_by")):
            slowed.setdefault(reason, []).append(state.get("candidate", ""))
    for reason, met in slowed.items():
        names = ", ".join(dict.fromkeys(filter(None, met)))
        said.append(f"**slowed by {reason}** in {len(met)} of them" + (f" ({names})" if names else ""))
    if not slowed and any(state.get("slowed_by") is not None for state in states):
        said.append("never slowed")
    return f"card in {len(states)} readings between the timings: {', '.join(said) or 'it tells nothing'}"


def block_part(result: Result) -> Iterator[str]:
    facts = result.facts
    block, work = facts["block"], facts["work"]
    packed = [name for name, told in facts["candidates"].items() if told.get("fewer_bits")]
    in_bits = f" ({result.work_of(packed[0])['transformer']['nbytes'] / 1e9:.3g} in fewer bits)" if packed else ""
    passes = ", ".join(grouped(f"{step['kind']} over {step['context']}" for step in block["passes"]))
    yield (
        f"A block of {block['latent_frames']} latent frames ({block['pixel_frames']} pixel frames) at a window of "
        f"{block['window_frames']}, which is full after {block['blocks_before_full']} blocks. Passes: {passes} frames. "
        f"Transformer {in_flops(work['transformer']['flops'])} and at least "
        f"{work['transformer']['nbytes'] / 1e9:.3g} GB{in_bits}, decoder {in_flops(work['decoder']['flops'])}."
    )
    matmul = result.ceilings["matmul_flops"].best
    plain = result.of("plain").get("block")
    rows: list[Row] = []
    for name, told in facts["candidates"].items():
        if told["refused"]:
            rows.append((name, f"refused: {told['refused']}", "", "", "", "", "", "", ""))
            continue
        held = result.of(name)
        share = ""
        if transformer := held.get("transformer"):
            share = f"{work['transformer']['flops'] / transformer.median / matmul:.0%}"
        each = held.get("interval", held["block"]).median
        rows.append((
            name, spread(held["block"]), milliseconds(held.get("interval")), f"{block['pixel_frames'] / each:.3g}",
            milliseconds(held.get("transformer")), milliseconds(held.get("decode")), share,
            against(held["block"], plain), f"{told['difference']:.1e}",
        ))  # fmt: skip
    heads = ("candidate", "block, ms: median (quartiles; worst)", "interval, ms", "FPS", "transformer, ms",
             "decoder, ms",
             "transformer of matmul", "speed against plain (95 % interval)", "off by")  # fmt: skip
    yield table(heads, rows)
    about = " ".join(f"`{name}`: {told['about']}." for name, told in facts["candidates"].items())
    yield (
        f"Off by: root mean square of the difference to `{facts['oracle']}`'s latents over theirs, at most "
        f"{facts['tolerance']:g}. {about}"
    )
    if packed:
        fewer = " and ".join(list(precision_of(result.settings["config"]))[1:])
        most = max(facts["candidates"][name]["allowed"] for name in packed)
        yield (
            f"{', '.join(f'`{name}`' for name in packed)}: with {fewer}; the others compute in full. With {fewer} the "
            f"plain executor is off by {facts['bits_off']:.1e} itself, so these may be off by {most:.1e}. `transformer "
            "of matmul` is of a matmul in the model's dtype for all candidates alike."
        )
    if facts["left_out"]:
        yield "Left out: " + "; ".join(f"`{name}`: {reason}" for name, reason in facts["left_out"].items()) + "."
    yield from memory_part(result)
    pass_series = {name: passes_of(result, name) for name in facts["candidates"]}
    if timed := {name: series for name, series in pass_series.items() if series}:
        works = {name in packed: result.work_of(name)["passes"] for name in timed}
        rows = [
            (f"{step['kind']} over {step['context']}", in_flops(work["passes"][index]["flops"]),
             *(f"{passes[index]['nbytes'] / 1e9:.3g}" for passes in works.values()),
             *(milliseconds(series[index]) for series in timed.values()))
            for index, step in enumerate(block["passes"])
        ]  # fmt: skip
        least = ("GB at least, fewer bits" if fewer else "GB at least" for fewer in works)
        yield table(("pass", "work", *least, *(f"{name}, ms" for name in timed)), rows)
    for name, told in facts["candidates"].items():
        if "profile" in told:
            yield from profile_part(name, told["profile"], work["transformer"]["flops"])
    energy = {name: held["energy"] for name in facts["candidates"] if "energy" in (held := result.of(name))}
    if energy:
        joules = ", ".join(f"{name} {one.median:.4g} J" for name, one in energy.items())
        yield f"Energy of the card a block: {joules}."


def passes_of(result: Result, candidate: str) -> list[Series]:
    """The passes of a candidate that runs them one by one; none otherwise."""
    held, count = result.of(candidate), len(result.facts["block"]["passes"])
    names = [f"pass {index}" for index in range(count)]
    return [held[name] for name in names] if all(name in held for name in names) else []


def profile_part(name: str, profile: dict[str, Any], written: int) -> Iterator[str]:
    """One block of an executor by kinds of work, as its graph has them, and by pass. written: FLOPs of the passes."""
    total = sum(cost["seconds"] for cost in profile["families"].values())
    computed = sum(cost["flops"] for cost in profile["families"].values())
    rows = [
        (kind, f"{cost['seconds'] * 1e3:.4g}", f"{cost['seconds'] / total:.0%}", in_flops(cost["flops"]),
         f"{cost['bytes'] / 1e9:.4g}", f"{cost['least'] / cost['seconds']:.0%}")
        for kind, cost in profile["families"].items()
    ]  # fmt: skip
    yield table((f"{name}: work", "ms", "share", "FLOPs", "GB", "of the ceilings"), rows)
    passes = ", ".join(f"{run} {seconds * 1e3:.4g}" for run, seconds in profile["passes"].items())
    yield (
        f"The graph computes {in_flops(computed)}, the passes as written {in_flops(written)}. Timed once, in a "
        f"block that is watched (marks took {profile['share_of_marks']:.1%}); {profile['between_calls'] * 1e3:.3g} ms "
        f"between calls. Passes, ms: {passes}."
    )


def memory_part(result: Result) -> Iterator[str]:
    """Memory by owner and launches of each candidate, and why some could not be looked into."""
    told = {name: one["memory"] for name, one in result.facts["candidates"].items() if one.get("memory")}
    owners = list(dict.fromkeys(owner for memory in told.values() for owner in memory))
    launches = {name: result.facts["candidates"][name].get("launches") for name in told}
    rows = [
        (name, *(megabytes(memory.get(owner)) for owner in owners), in_words(launches[name]))
        for name, memory in told.items()
    ]
    if rows:
        yield table(("candidate", *(f"{owner}, MB" for owner in owners), "launched in a block, decoder apart"), rows)
    unseen = {name: one["not_seen"] for name, one in result.facts["candidates"].items() if "not_seen" in one}
    if unseen:
        yield "Not looked into: " + "; ".join(f"`{name}`: {short(why)}" for name, why in unseen.items()) + "."


def in_words(launches: dict[str, int] | None) -> str:
    return "" if launches is None else f"{launches['graphs']} graphs, {launches['kernels']} kernels"


def stream_part(result: Result) -> Iterator[str]:
    told = result.facts["stream"]
    if check := result.facts.get("check"):
        bits = f"; in these bits the plain executor is off by {check['bits_off']:.1e}" if check["bits_off"] else ""
        yield f"Outputs match: off by {check['difference']:.1e}, allowed {check['tolerance']:.1e}{bits}."
    starts = [(name.partition("/")[2], spread(series, 1), str(len(series.samples)))
              for name, series in result.series.items() if name.startswith("start/")]  # fmt: skip
    if starts:
        yield table(("start", "seconds: median (quartiles; worst)", "times"), starts)
    rows = []
    for name, series in result.series.items():
        who, _, what = name.partition("/")
        if who != "start":
            rows.append((who, what, *(in_ms(value) for value in (
                series.median, series.tail(0.95), series.tail(0.99), series.worst)), str(len(series.samples))))
    yield table(("executor", "quantity", "p50, ms", "p95", "p99", "worst", "times"), rows)
    yield (
        f"{told['fps']:.4g} FPS at a full window ({told['frames']} frames, sink: {result.facts['sink']}), "
        f"{told['real_time_factor']:.3g} times the video's {told['video_fps']} FPS; jitter (standard deviation of "
        f"intervals) {told['jitter'] * 1e3:.3g} ms. "
        + viewers(told, told["blocks"])
    )
    if len(curve := result.facts["sessions"]) > 1:
        rows = []
        for point in curve:
            series = Series("s", tuple(point["intervals"]))
            late = (f"{point['late_blocks']} of {len(series.samples)}",) if "late_blocks" in point else ()
            rows.append((str(point["sessions"]), f"{point['fps']:.4g}", f"{point['fps'] / point['sessions']:.4g}",
                         in_ms(series.median), in_ms(series.tail(0.95)), *late))  # fmt: skip
        titles: Row = ("sessions", "FPS in all", "FPS each", "interval p50, ms", "p95", "late blocks")
        yield table(titles[: len(rows[0])], rows)
    if batches := result.facts.get("batches"):
        rows = [(str(point["sessions"]), f"{point['turns'] * 1e3:.4g}", f"{point['batch'] * 1e3:.4g}",
                 f"{point['turns'] / point['batch']:.3g}") for point in batches]  # fmt: skip
        titles = ("sessions", "a block each in turns, ms", "as one batch, ms", "ratio")
        yield table(titles, rows)
    if long := result.facts.get("long"):
        memory = long["device_memory_by_tenth"] or long["process_memory_by_tenth"]
        yield (
            f"Long run: {long['minutes']:g} minutes of video, {long['blocks']} blocks, made in "
            f"{sum(long['intervals']):.4g} s of wall time; by tenths at a full window:"
        )
        kinds = (
            ("interval, median, ms", [in_ms(value) for value in long["interval_by_tenth"]]),
            ("processor's time, median, ms", [in_ms(value) for value in long["processor_seconds_by_tenth"]]),
            ("memory, most, MB", [f"{value / 1e6:.4g}" for value in memory]),
        )
        heads = ("", *(str(part + 1) for part in range(len(memory))))
        yield table(heads, [(name, *values) for name, values in kinds])
        yield stalls(long)
        if waited := waited_in(result, long):
            tenths = f"{'tenths' if len(waited) > 1 else 'tenth'} {', '.join(map(str, waited))}"
            yield (
                f"In {tenths} the interval is more than {WAITED:.0%} above the time that the process had of a "
                "processor: there it waited, most likely for other work on the machine."
            )


def stalls(long: dict[str, Any]) -> str:
    """The slow blocks of a long run, which medians hide."""
    steady = Series("s", tuple(long["intervals"][long["blocks_before_full"] :]))
    tail = f"p99 {in_ms(p99)} ms, " if (p99 := steady.tail(0.99)) else ""
    watched = " " + viewers(long, long["blocks"]) if "late_blocks" in long else ""
    return f"Interval at a full window: {tail}worst {in_ms(steady.worst)} ms.{watched}"


def viewers(told: dict[str, Any], blocks: int) -> str:
    return (
        f"A viewer who starts with the first block waits at {told['late_blocks']} of {blocks} blocks, "
        f"{told['waited']:.3g} s in all, {told['longest_wait']:.3g} s at most."
    )


def waited_in(result: Result, long: dict[str, Any]) -> list[int]:
    """Tenths of a long run, from 1, in which a process of one thread on a CPU was held up."""
    if result.on_gpu or result.environment["host"]["threads"] != 1:
        return []
    pairs = zip(long["interval_by_tenth"], long["processor_seconds_by_tenth"], strict=True)
    return [tenth for tenth, (wall, had) in enumerate(pairs, 1) if wall > (1 + WAITED) * had]


def kernels_part(result: Result) -> Iterator[str]:
    rows = []
    for row in result.facts["rows"]:
        for name, form in row["forms"].items():
            if "refused" in form:
                rows.append((row["op"], row["case"], name, f"refused: {form['refused']}", "", "", ""))
                continue
            rows.append((
                row["op"], row["case"], name, f"{form['seconds'] * 1e6:.4g}", f"{form['tflops']:.3g}",
                f"{form['of_matmul']:.0%}", f"{form['of_copy']:.0%}",
            ))  # fmt: skip
    yield table(("op", "case", "form", "us", "TFLOP/s", "of matmul", "of copy"), rows)


def against(series: Series, plain: Series | None) -> str:
    """The speed relative to the plain loop's, with its 95 % interval."""
    if plain is None or series is plain:
        return ""
    low, high = interval(series, plain)
    return f"{plain.median / series.median:.2f} ({low:.2f} to {high:.2f})"


def spread(series: Series, scale: float = 1e3) -> str:
    low, high = series.quantile(0.25) * scale, series.quantile(0.75) * scale
    return f"{series.median * scale:.4g} ({low:.4g} to {high:.4g}; {series.worst * scale:.4g})"


def in_flops(count: float) -> str:
    """FLOPs in the size of unit that suits them."""
    return f"{count / 1e12:.4g} TFLOP" if count >= 1e12 else f"{count / 1e9:.4g} GFLOP"


def short(text: str) -> str:
    return text if len(text) <= LINE else f"{text[:LINE]}..."


def in_ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.4g}"


def milliseconds(series: Series | None) -> str:
    return in_ms(None if series is None else series.median)


def amount(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}"


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.4g}"


def grouped(items: Iterable[str]) -> Iterator[str]:
    """Neighbours that are the same as one, with their number."""
    held: list[tuple[str, int]] = []
    for item in items:
        if held and held[-1][0] == item:
            held[-1] = (item, held[-1][1] + 1)
        else:
            held.append((item, 1))
    return (item if count == 1 else f"{count} x {item}" for item, count in held)


def table(heads: Row, rows: Iterable[Row]) -> str:
    """A Markdown table; bars within cells are kept from ending them."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
