"""Tables of a report: the figures of each kind of result as Markdown, with the columns as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..runtime.config import EVERY_BLOCK
from .compare import interval
from .result import Result, Series

WAIT = 0.1  # share of the CPU time by which wall time must exceed it to be reported as waiting
LINE = 300  # characters of an error, at most


class Column(NamedTuple):
    """Column of a table: its head, and the text of its cell for a row."""

    head: str
    cell: Callable[[Any], str]


def table(columns: Sequence[Column], rows: Iterable[Any]) -> str:
    """Markdown table with one line for each row."""
    return cells_table([column.head for column in columns], ([column.cell(row) for column in columns] for row in rows))


def cells_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table of texts; bars within cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def precision_of(config: dict[str, Any]) -> Iterator[str]:
    """The model's dtype, then the precision of layers and pages where it is another one."""
    yield config["dtype"]
    if config["lowp"]:
        layers, excluded = list(config["lowp_layers"]), list(config["lowp_keep"])
        only = f" in {' '.join(layers)}" if layers != list(EVERY_BLOCK) else ""
        yield f"{config['lowp']} linears{only}" + (f" but {' '.join(excluded)}" if excluded else "")
    if config["kv_dtype"] not in (None, config["dtype"]):
        yield f"{config['kv_dtype']} pages"


class Candidate(NamedTuple):
    """One candidate of a block's result, a row of its tables."""

    name: str
    result: Result

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = self.result.facts["candidates"][self.name]
        return facts

    @property
    def is_packed(self) -> bool:
        return bool(self.facts.get("fewer_bits"))

    @property
    def memory(self) -> dict[str, int | None]:
        return self.facts.get("memory") or {}

    def series(self, quantity: str) -> Series | None:
        """Samples of a quantity; None if refused or not measured."""
        return None if self.facts["refused"] else self.result.of(self.name).get(quantity)

    def block(self) -> str:
        if reason := self.facts["refused"]:
            return f"refused: {reason}"
        return spread(self.result.of(self.name)["block"])

    def fps(self) -> str:
        times = self.series("interval") or self.series("block")
        return f"{self.result.facts['block']['pixel_frames'] / times.median:.3g}" if times else ""

    def share_of_matmul(self) -> str:
        transformer, flops = self.series("transformer"), self.result.facts["work"]["transformer"]["flops"]
        return f"{flops / transformer.median / self.result.matmul_flops:.0%}" if transformer else ""

    def speedup(self) -> str:
        """Speedup over the plain loop with its 95 % interval."""
        block, plain = self.series("block"), self.result.of("plain").get("block")
        if block is None or plain is None or self.name == "plain":
            return ""
        low, high = interval(block, plain)
        return f"{plain.median / block.median:.2f} ({low:.2f} to {high:.2f})"

    def difference(self) -> str:
        if self.facts["refused"]:
            return ""
        return "not compared" if self.facts["difference"] is None else f"{self.facts['difference']:.1e}"

    def passes(self) -> list[Series]:
        """Times of the passes; empty if they do not run one by one."""
        series = [self.series(f"pass {index}") for index in range(len(self.result.facts["block"]["passes"]))]
        timed = [one for one in series if one is not None]
        return timed if len(timed) == len(series) else []


CANDIDATE_COLUMNS = (
    Column("candidate", lambda row: row.name),
    Column("block, ms: median (quartiles; worst)", lambda row: row.block()),
    Column("interval, ms", lambda row: milliseconds(row.series("interval"))),
    Column("FPS", lambda row: row.fps()),
    Column("transformer, ms", lambda row: milliseconds(row.series("transformer"))),
    Column("decoder, ms", lambda row: milliseconds(row.series("decode"))),
    Column("transformer, of matmul", lambda row: row.share_of_matmul()),
    Column("speedup over plain (95 % interval)", lambda row: row.speedup()),
    Column("difference", lambda row: row.difference()),
)


def block_part(result: Result) -> Iterator[str]:
    """Tables of a block's result: candidates, memory, passes, profiles and energy."""
    facts = result.facts
    rows = [Candidate(name, result) for name in facts["candidates"]]
    packed = [row for row in rows if row.is_packed]
    yield block_line(result, packed)
    yield table(CANDIDATE_COLUMNS, rows)
    notes = " ".join(f"`{row.name}`: {row.facts['about']}." for row in rows)
    yield (
        f"Difference: root mean square of the difference to `{facts['oracle']}`'s latents, relative to theirs, at most "
        f"{facts['tolerance']:g}. {notes}"
    )
    if packed:
        precision = " and ".join(list(precision_of(result.settings["config"]))[1:])
        limit = max(row.facts["allowed"] for row in packed)
        yield (
            f"{', '.join(f'`{row.name}`' for row in packed)}: with {precision}; the others in full precision. With "
            f"{precision} the eager executor differs by {facts['bits_off']:.1e}, so these may differ by {limit:.1e}. "
            "`transformer, of matmul` is relative to a matmul in the model's dtype for all candidates."
        )
    if facts["left_out"]:
        yield "Left out: " + "; ".join(f"`{name}`: {reason}" for name, reason in facts["left_out"].items()) + "."
    yield from memory_part(rows)
    yield from passes_part(result, rows)
    for row in rows:
        if "profile" in row.facts:
            yield from profile_part(row.name, row.facts["profile"], facts["work"]["transformer"]["flops"])
    if energy := {row.name: series for row in rows if (series := row.series("energy"))}:
        yield f"GPU energy per block: {', '.join(f'{name} {one.median:.4g} J' for name, one in energy.items())}."


def block_line(result: Result, packed: Sequence[Candidate]) -> str:
    """Frames, window, passes, FLOPs and bytes of a block."""
    block, work = result.facts["block"], result.facts["work"]
    low = f" ({result.work_of(packed[0].name)['transformer']['nbytes'] / 1e9:.3g} in low precision)" if packed else ""
    passes = ", ".join(grouped(f"{step['kind']} over {step['context']}" for step in block["passes"]))
    return (
        f"A block of {block['latent_frames']} latent frames ({block['pixel_frames']} pixel frames) at a window of "
        f"{block['window_frames']}, which is full after {block['blocks_before_full']} blocks. Passes: {passes} frames. "
        f"Transformer {in_flops(work['transformer']['flops'])} and at least "
        f"{work['transformer']['nbytes'] / 1e9:.3g} GB{low}, decoder {in_flops(work['decoder']['flops'])}."
    )


def memory_part(rows: Sequence[Candidate]) -> Iterator[str]:
    """Memory by owner and launches of each candidate, and the reasons for missing values."""
    owners = list(dict.fromkeys(owner for row in rows for owner in row.memory))
    heads = ("candidate", *(f"{owner}, MB" for owner in owners), "launches per block, without decoder")
    cells = [
        (row.name, *(megabytes(row.memory.get(owner)) for owner in owners), launch_counts(row.facts.get("launches")))
        for row in rows if row.memory
    ]  # fmt: skip
    if cells:
        yield cells_table(heads, cells)
    if reasons := {row.name: row.facts["not_seen"] for row in rows if "not_seen" in row.facts}:
        yield "Not inspected: " + "; ".join(f"`{name}`: {cut(why)}" for name, why in reasons.items()) + "."


def launch_counts(launches: dict[str, int] | None) -> str:
    return "" if launches is None else f"{launches['graphs']} graphs, {launches['kernels']} kernels"


def passes_part(result: Result, rows: Sequence[Candidate]) -> Iterator[str]:
    """Table of the passes of candidates that run them one by one."""
    timed = [row for row in rows if row.passes()]
    if not timed:
        return
    works = {row.is_packed: result.work_of(row.name)["passes"] for row in timed}
    least = ("GB at least, low precision" if is_packed else "GB at least" for is_packed in works)
    heads = ("pass", "work", *least, *(f"{row.name}, ms" for row in timed))
    cells = [
        (
            f"{step['kind']} over {step['context']}", in_flops(result.facts["work"]["passes"][index]["flops"]),
            *(f"{passes[index]['nbytes'] / 1e9:.3g}" for passes in works.values()),
            *(milliseconds(row.passes()[index]) for row in timed),
        )
        for index, step in enumerate(result.facts["block"]["passes"])
    ]  # fmt: skip
    yield cells_table(heads, cells)


def profile_part(name: str, profile: dict[str, Any], written: int) -> Iterator[str]:
    """One profiled block of an executor by kind of work and by pass. written: FLOPs of the passes as written."""
    costs = profile["families"]
    total = sum(cost["seconds"] for cost in costs.values())
    columns = (
        Column(f"{name}: work", lambda row: row[0]),
        Column("ms", lambda row: in_ms(row[1]["seconds"])),
        Column("share", lambda row: f"{row[1]['seconds'] / total:.0%}"),
        Column("FLOPs", lambda row: in_flops(row[1]["flops"])),
        Column("GB", lambda row: f"{row[1]['bytes'] / 1e9:.4g}"),
        Column("of the ceilings", lambda row: f"{row[1]['least'] / row[1]['seconds']:.0%}"),
    )
    yield table(columns, costs.items())
    passes = ", ".join(f"{run} {in_ms(seconds)}" for run, seconds in profile["passes"].items())
    computed = sum(cost["flops"] for cost in costs.values())
    yield (
        f"The graph computes {in_flops(computed)}, the passes as written {in_flops(written)}. Timed once, in a "
        f"profiled block (profiling took {profile['share_of_marks']:.1%}); {profile['between_calls'] * 1e3:.3g} ms "
        f"between calls. Passes, ms: {passes}."
    )


START_COLUMNS = (
    Column("start", lambda row: row[0].partition("/")[2]),
    Column("seconds: median (quartiles; worst)", lambda row: spread(row[1], 1)),
    Column("samples", lambda row: str(len(row[1].samples))),
)
QUANTITY_COLUMNS = (
    Column("executor", lambda row: row[0].partition("/")[0]),
    Column("quantity", lambda row: row[0].partition("/")[2]),
    Column("p50, ms", lambda row: in_ms(row[1].median)),
    Column("p95", lambda row: in_ms(row[1].tail(0.95))),
    Column("p99", lambda row: in_ms(row[1].tail(0.99))),
    Column("worst", lambda row: in_ms(row[1].worst)),
    Column("samples", lambda row: str(len(row[1].samples))),
)
SESSION_COLUMNS = (
    Column("sessions", lambda point: str(point["sessions"])),
    Column("FPS, all", lambda point: f"{point['fps']:.4g}"),
    Column("FPS, each", lambda point: f"{point['fps'] / point['sessions']:.4g}"),
    Column("interval p50, ms", lambda point: in_ms(Series("s", tuple(point["intervals"])).median)),
    Column("p95", lambda point: in_ms(Series("s", tuple(point["intervals"])).tail(0.95))),
)
LATE_COLUMN = Column("late blocks", lambda point: f"{point['late_blocks']} of {len(point['intervals'])}")
BATCH_COLUMNS = (
    Column("sessions", lambda point: str(point["sessions"])),
    Column("a block each in turns, ms", lambda point: in_ms(point["turns"])),
    Column("as one batch, ms", lambda point: in_ms(point["batch"])),
    Column("ratio", lambda point: f"{point['turns'] / point['batch']:.3g}"),
)


def stream_part(result: Result) -> Iterator[str]:
    """Tables of a stream's result: check, starts, quantities, sessions, batches and the long run."""
    facts, stream = result.facts, result.facts["stream"]
    if check := facts.get("check"):
        low = f"; in this precision the eager executor differs by {check['bits_off']:.1e}" if check["bits_off"] else ""
        yield f"Outputs match: difference {check['difference']:.1e}, allowed {check['tolerance']:.1e}{low}."
    starts = [item for item in result.series.items() if item[0].startswith("start/")]
    if starts:
        yield table(START_COLUMNS, starts)
    yield table(QUANTITY_COLUMNS, [item for item in result.series.items() if not item[0].startswith("start/")])
    yield (
        f"{stream['fps']:.4g} FPS at a full window ({stream['frames']} frames, sink: {facts['sink']}), "
        f"{stream['real_time_factor']:.3g} times the video's {stream['video_fps']} FPS; jitter (standard deviation of "
        f"intervals) {stream['jitter'] * 1e3:.3g} ms. " + viewers(stream, stream["blocks"])
    )
    if len(curve := facts["sessions"]) > 1:
        late = (LATE_COLUMN,) if "late_blocks" in curve[0] else ()
        yield table((*SESSION_COLUMNS, *late), curve)
    if batches := facts.get("batches"):
        yield table(BATCH_COLUMNS, batches)
    if long := facts.get("long"):
        yield from long_part(result, long)


def long_part(result: Result, long: dict[str, Any]) -> Iterator[str]:
    """A long run by tenths, and its slow blocks."""
    yield (
        f"Long run: {long['minutes']:g} minutes of video, {long['blocks']} blocks, computed in "
        f"{sum(long['intervals']):.4g} s of wall time; by tenths at a full window:"
    )
    memory = long["device_memory_by_tenth"] or long["process_memory_by_tenth"]
    rows = (
        ("interval, median, ms", map(in_ms, long["interval_by_tenth"])),
        ("CPU time, median, ms", map(in_ms, long["processor_seconds_by_tenth"])),
        ("memory, maximum, MB", map(megabytes, memory)),
    )
    yield cells_table(("", *(str(tenth + 1) for tenth in range(len(memory)))), [(name, *cells) for name, cells in rows])
    yield stalls(long)
    if waits := waits_in(result, long):
        tenths = f"{'tenths' if len(waits) > 1 else 'tenth'} {', '.join(map(str, waits))}"
        yield (
            f"In {tenths} the interval is more than {WAIT:.0%} above the process's CPU time: the process waited, most "
            "likely for other work on the machine."
        )


def stalls(long: dict[str, Any]) -> str:
    """Slow blocks of a long run, which medians hide."""
    steady = Series("s", tuple(long["intervals"][long["blocks_before_full"] :]))
    tail = f"p99 {in_ms(p99)} ms, " if (p99 := steady.tail(0.99)) else ""
    waits = " " + viewers(long, long["blocks"]) if "late_blocks" in long else ""
    return f"Interval at a full window: {tail}worst {in_ms(steady.worst)} ms.{waits}"


def viewers(waits: dict[str, Any], blocks: int) -> str:
    return (
        f"A viewer who starts with the first block waits at {waits['late_blocks']} of {blocks} blocks, "
        f"{waits['waited']:.3g} s in total, {waits['longest_wait']:.3g} s at most."
    )


def waits_in(result: Result, long: dict[str, Any]) -> list[int]:
    """Tenths of a long run, from 1, in which a process with one thread on a CPU had to wait."""
    if result.on_gpu or result.environment["host"]["threads"] != 1:
        return []
    pairs = zip(long["interval_by_tenth"], long["processor_seconds_by_tenth"], strict=True)
    return [tenth for tenth, (wall, cpu) in enumerate(pairs, 1) if wall > (1 + WAIT) * cpu]


def form_cell(text: Callable[[dict[str, Any]], str], refused: str = "") -> Callable[[Any], str]:
    """Cell of a kernel's form: `text` of it, or `refused` with the reason filled in."""
    return lambda row: refused.format(row[2]["refused"]) if "refused" in row[2] else text(row[2])


def timing(form: dict[str, Any]) -> str:
    """Verdict of a form beside the first one of its row, with the interval of the ratio of their times."""
    if not form.get("verdict"):
        return ""
    low, high = form["interval"]
    return f"{form['verdict']}, {form['of_first']:.2f} ({low:.2f} to {high:.2f})"


def share(form: dict[str, Any], key: str) -> str:
    return f"{form[key]:.0%}" if key in form else ""


KERNEL_COLUMNS = (
    Column("op", lambda row: row[0]["op"]),
    Column("case", lambda row: row[0]["case"]),
    Column("form", lambda row: row[1]),
    Column("us", form_cell(lambda form: f"{form['seconds'] * 1e6:.4g}", "refused: {}")),
    Column("warm us", form_cell(lambda form: f"{form['warm_seconds'] * 1e6:.4g}" if "warm_seconds" in form else "")),
    Column("TFLOP/s", form_cell(lambda form: f"{form['tflops']:.3g}")),
    Column("of matmul", form_cell(lambda form: share(form, "of_matmul"))),
    Column("of copy", form_cell(lambda form: share(form, "of_copy"))),
    Column("of roof", form_cell(lambda form: share(form, "of_roof"))),
    Column("to the first", form_cell(timing)),
)


def kernels_part(result: Result) -> Iterator[str]:
    """Table of all ops, cases and forms."""
    yield table(
        KERNEL_COLUMNS,
        [(row, name, form) for row in result.facts["rows"] for name, form in row["forms"].items()],
    )


class Entry(NamedTuple):
    """A timed form in a leaderboard: the best time of it for a case on a device, and the result that has it."""

    row: dict[str, Any]
    name: str
    form: dict[str, Any]
    file: str
    result: Result

    @property
    def contest(self) -> tuple[str, ...]:
        """Entries with the same one are comparable: device, op, case, sizes and dtype."""
        row = self.row
        sizes = " ".join(f"{name}={size}" for name, size in row["dims"].items())
        options = " ".join(f"{name}={value}" for name, value in row["options"].items())
        return self.result.device_name, row["op"], row["case"], f"{sizes} {options}".strip(), row["dtype"]


LEADERBOARD_COLUMNS = (
    Column("place", lambda ranked: str(ranked[0])),
    Column("form", lambda ranked: ranked[1].name),
    Column("us", lambda ranked: f"{ranked[1].form['seconds'] * 1e6:.4g}"),
    Column("warm us", lambda ranked: KERNEL_COLUMNS[4].cell((ranked[1].row, ranked[1].name, ranked[1].form))),
    Column("of roof", lambda ranked: share(ranked[1].form, "of_roof")),
    Column("to the first of its run", lambda ranked: timing(ranked[1].form)),
    Column("file", lambda ranked: f"`{ranked[1].file}`"),
    Column("date", lambda ranked: ranked[1].result.environment["date"][:10]),
)


def leaderboard(results: Mapping[str, Result]) -> Iterator[str]:
    """Forms of all results of kernels by time, a table for each case, dtype and device; refused forms have no place."""
    entries = [
        Entry(row, name, form, file, result)
        for file, result in results.items() if result.kind == "kernels"
        for row in result.facts["rows"] for name, form in row["forms"].items() if "seconds" in form
    ]  # fmt: skip
    for contest in dict.fromkeys(entry.contest for entry in entries):
        best: dict[str, Entry] = {}
        for entry in entries:
            if entry.contest == contest:
                best[entry.name] = min(entry, best.get(entry.name, entry), key=lambda one: one.form["seconds"])
        if len(best) > 1:
            device, op, case, sizes, dtype = contest
            ranked = enumerate(sorted(best.values(), key=lambda one: one.form["seconds"]), 1)
            yield f"**{op}, {case}**: {sizes}, {dtype}, on {device}\n\n{table(LEADERBOARD_COLUMNS, ranked)}"


class Pair(NamedTuple):
    """A row of a paired run: one case, count of threads and part of a block, with all its candidates."""

    result: Result
    case: str
    threads: int
    part: str

    def series(self, candidate: str, clock: str = "cpu") -> Series | None:
        return self.result.series.get(f"{self.case}/{self.threads}/{candidate}/{self.part} {clock}")

    def times(self, candidate: str) -> str:
        """Median CPU and wall milliseconds a block."""
        cpu, wall = self.series(candidate), self.series(candidate, "wall")
        return f"{cpu.median * 1e3:.4g} ({wall.median * 1e3:.4g})" if cpu and wall else ""

    def ratio(self, candidate: str, over: str) -> float | None:
        """Median of the ratios of CPU time within a round: that of `over` to the candidate's."""
        fast, slow = self.series(candidate), self.series(over)
        if fast is None or slow is None:
            return None
        return Series("x", tuple(b / a for a, b in zip(fast.samples, slow.samples, strict=True)), "more").median


def pairs_of(result: Result) -> list[Pair]:
    """Rows of a paired run, in the order of its cases."""
    counts, parts = result.settings["threads"], ("block", "transformer")
    return [Pair(result, case, count, part) for case in result.facts["cases"] for part in parts for count in counts]


def times_column(candidate: str) -> Column:
    return Column(candidate, lambda row: row.times(candidate))


def ratio_column(candidate: str, over: str) -> Column:
    def cell(row: Pair) -> str:
        ratio = row.ratio(candidate, over)
        return "" if ratio is None else f"{ratio:.2f}"

    return Column(f"{over} / {candidate}", cell)


def pairs_part(result: Result) -> Iterator[str]:
    """Times of all candidates, their ratios within rounds, and the difference of pictures."""
    candidates = result.facts["candidates"]
    yield (
        f"`before` is commit {result.facts['before']}, `after` and `fused` this one with executors eager and fused, "
        "`plain` the public loop, `diffusers` its transformer without a cache; targets of an export are engines run by "
        "their runtimes. Milliseconds a block, medians: CPU time "
        "(wall time). Ratios are of CPU time, medians over the rounds; above 1 is faster than what it is compared with."
    )
    columns = [
        Column("case", lambda row: row.case), Column("part", lambda row: row.part),
        Column("threads", lambda row: str(row.threads)),
        *map(times_column, candidates),
    ]  # fmt: skip
    torch_paths = ("before", "after", "fused", "plain", "diffusers")
    engines = [name for name in candidates if name not in torch_paths]
    columns += [ratio_column(name, over) for over in ("before", "plain") for name in ("after", "fused")]
    columns += [ratio_column(name, over) for over in ("before", "fused") for name in engines]
    yield table(columns, pairs_of(result))
    levels = "; ".join(
        f"{case}: " + ", ".join(f"{name} {most}" for name, most in found.items())
        for case, found in result.facts["levels"].items()
    )
    yield f"Largest difference of the first pictures to those of `before`, in levels of 255: {levels}."
    if result.settings["config"]["dtype"] == "bfloat16":
        unit = result.facts["bfloat16_unit"] or "no instructions for it, so larger cases are left out"
        yield f"bfloat16 on this CPU: {unit}."


def serve_part(result: Result) -> Iterator[str]:
    """Table by number of sessions, and the refusal that ended it."""
    settings = result.settings
    where = "on this machine too" if settings["url"] is None else f"at `{settings['url']}`"
    yield (
        f"The server is {where}, with `{' '.join(settings['arguments'])}`; {settings['media']}, "
        f"{settings['seconds']:g} s a row. Milliseconds: p50 / p95 / p99. An underrun: a player with a buffer of "
        f"{settings['buffer']:g} s had no picture to show."
    )
    columns = (
        Column("sessions", lambda row: str(row["sessions"])),
        Column("first picture", lambda row: quantiles(row["first_picture"])),
        Column("interval of blocks", lambda row: quantiles(row["interval"])),
        Column("control to pixel", lambda row: quantiles(row["control_to_pixel"])),
        Column("blocks", lambda row: str(row["blocks"])), Column("late", lambda row: str(row["late_blocks"])),
        Column("underruns", lambda row: str(row["underruns"])),
        Column("server memory", lambda row: "" if row["memory"] is None else f"{row['memory'] / 1e6:.0f} MB"),
    )  # fmt: skip
    yield table(columns, result.facts["rows"])
    for row in result.facts["rows"]:
        if row["refused"]:
            yield f"One more than {row['sessions']} was refused: {row['refused']}."


def churn_part(result: Result) -> Iterator[str]:
    """Table by tenth of the time, and what clients did."""
    settings, facts = result.settings, result.facts
    yield (
        f"{settings['clients']} clients for {settings['minutes']:g} minutes; medians of each tenth. Memory grew by "
        f"{facts['growth'] / 1e6:.1f} MB from the second tenth to the last."
    )
    columns = (
        Column("until", lambda row: f"{row['until'] / 60:.1f} min"),
        Column("server memory", lambda row: f"{row['memory'] / 1e6:.1f} MB"),
        Column("open files", lambda row: str(row["files"])), Column("threads", lambda row: str(row["threads"])),
    )  # fmt: skip
    yield table(columns, facts["rows"])
    yield ", ".join(f"{name} {count}" for name, count in facts["counts"].items()) + "."
    if facts["faults"]:
        yield f"{len(facts['faults'])} faults, the first: {cut(facts['faults'][0])}"


def quantiles(shares: dict[str, float] | None) -> str:
    return "" if shares is None else " / ".join(f"{seconds * 1e3:.0f}" for seconds in shares.values())


def spread(series: Series, scale: float = 1e3) -> str:
    """Median, quartiles and worst sample."""
    low, high = series.quantile(0.25) * scale, series.quantile(0.75) * scale
    return f"{series.median * scale:.4g} ({low:.4g} to {high:.4g}; {series.worst * scale:.4g})"


def in_flops(count: float) -> str:
    """FLOPs with the unit that suits them."""
    return f"{count / 1e12:.4g} TFLOP" if count >= 1e12 else f"{count / 1e9:.4g} GFLOP"


def cut(text: str) -> str:
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
    """Runs of equal items as one, with their number."""
    for item, run in groupby(items):
        count = len(list(run))
        yield item if count == 1 else f"{count} x {item}"
