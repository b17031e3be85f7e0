"""`inferix bench`: measure speed, as a share of the machine's limit and beside other implementations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import InferixError, UsageError, nearest, quoted
from ..schemes.defaults import DEFAULT_PROMPT
from .help import Command, group
from .options import (
    EXECUTOR,
    EXECUTOR_NAMES,
    FORCE,
    GPUS,
    NAMES,
    OFFLINE,
    PARALLEL,
    PRESET,
    UNTRAINED,
    check_settings,
    parse_settings,
    parse_size,
    ranks_of_launcher,
)

if TYPE_CHECKING:
    from ..bench.kernels import Options
    from ..bench.result import Result
    from ..bench.subject import Subject

MODEL = typer.Option(UNTRAINED, help="Checkpoint file or folder, or a name: tinyworld, wan-1.3b, org/name, ...")
RANDOM = typer.Option(False, "--random-weights", help="Untrained weights of a named model, made on the device.")
SIZE = typer.Option(None, metavar="WxH", help="Picture size, such as 832x480.  [default: the model's]")
VAE = typer.Option(None, help="Decoder: a file or folder, or taehv for the tiny one.")
BASE = typer.Option(None, help="Folder with VAE and text encoder, if not with the model.")
DEVICE = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
DTYPE = typer.Option(None, help="float32, bfloat16, float16.  [default: bfloat16 on a GPU]")
SEED = typer.Option(0, help="Seed of noise and random weights.")
SETTINGS = typer.Option(
    [], "--set", metavar="KEY=VALUE", help="Field of the preset, or lowp, kv_dtype, ... of the engine; repeatable."
)
OUT = typer.Option(None, help="JSON file for the result, with every sample.")
JSON = typer.Option(False, "--json", help="The result as one JSON line on stdout.")
LAYOUT_BLOCKS = 5  # of each layout, that `bench parallel` times

app = group()


@app.callback()
def common() -> None:
    """Measure speed beside the machine's limit.

    Outputs are checked before anything is timed. `kernels` times single ops, `block` one block by stages beside the
    plain loop, `stream` the whole path from a prompt to pixels, `engines` exported engines beside the executors,
    `parallel` the link between GPUs.
    `report` makes a page from results, `compare` lists the changes between two results.

    Example: inferix bench block --size 64x64 --rounds 1 --blocks 2 --out results/block.json
    """


@app.command(cls=Command)
def kernels(
    op: list[str] = typer.Option([], metavar="OP", help="An op by name; repeatable.  [default: all]"),
    case: list[str] = typer.Option(
        [], metavar="CASE", help="A case by name; repeatable.  [default: all that fit the machine]"
    ),
    shape: str | None = typer.Option(None, metavar="NAME=N,...", help="Sizes of your own, in any order, for one op."),
    case_file: Path | None = typer.Option(
        None, metavar="FILE", help="Cases of your own, for one op: a .json or .py file (docs/kernels.md)."
    ),
    form: list[str] = typer.Option(
        [], metavar="FILE.py:FUNCTION", help="A form of your own, or flex, beside the others; repeatable, for one op."
    ),
    dtype: str | None = typer.Option(
        None, help="bfloat16, float16 or float32.  [default: bfloat16 on a GPU, else float32]"
    ),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    out: Path | None = typer.Option(None, help="Folder for kernels.json and kernels.png."),
    tune: bool = typer.Option(False, "--tune", help="Find and store the fastest form and config for this GPU."),
    compile_only: bool = typer.Option(False, "--compile-only", help="Compile for every architecture; needs no GPU."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Time each kernel, and your own beside it.

    Each form is checked against the reference before it is timed. A form of your own, --form FILE.py:FUNCTION with the
    parameters of the reference, is first checked on all test cases: its values, what lies beside its tensors, what it
    allocates, its inputs, strides, and a second run. Forms are timed in turns, with a cold and a warm cache; each has a
    verdict beside the first, from the ratios of neighbouring samples.

    On a GPU the installed alternatives are timed too: torch's attention by each backend, FlexAttention, flash-attn,
    sageattention, and the plain torch sequence with and without torch.compile. On a CPU: torch's fused attention.
    `--tune` writes kernels/OP/tuned/CARD.json, which later runs read. Only `--tune` searches.

    Example: inferix bench kernels --op block_attention --shape page_tokens=64,q=64,kv=256,heads=2 --dtype float32

    Example: inferix bench kernels --op block_attention --form my_kernel.py:my_attention --case "small world"

    Example: inferix bench kernels --compile-only --op rms_norm
    """
    console = Console(stderr=True)
    if compile_only:
        if tune:
            raise UsageError("--compile-only compiles and --tune times; give one of them")
        if case or shape or out or form or case_file:
            raise UsageError(
                "--compile-only has its own cases and table; leave out --case, --shape, --case-file, --form and --out"
            )
        return print_compiled(op, as_json)

    from ..bench.kernels import Options, draw, run, shown
    from ..bench.result import write_result
    from ..runtime.config import DTYPES, check_device, default_device, default_dtype

    device = device or default_device()
    check_device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype is {quoted(dtype)}{nearest(dtype, DTYPES)}; expected bfloat16, float16 or float32")
    options = Options(tuple(op), tuple(case), shape, DTYPES[dtype], device, tuple(form), case_file)
    if tune:
        return print_tuned(options, as_json)
    if device == "cpu":
        console.print("no GPU is used: these are times of a CPU", highlight=False)
    files = {f"--form {text}": text.rpartition(":")[0] for text in form if ":" in text}
    check_out(None if out is None else out / "kernels.json", {"--case-file": case_file, **files})
    result = run(options, lambda line: console.print(line, highlight=False, soft_wrap=True))
    if out is not None:
        write_result(result, out / "kernels.json")
        if draw(result, out / "kernels.png") is None:
            console.print("no picture: matplotlib is not installed; pip install matplotlib")
    if as_json:
        typer.echo(json.dumps(json.loads(result.text())))
        return check_asked_forms(result)
    heads = ("op", "case", "form", "cold", "spread", "warm", "TFLOP/s", "GB/s", "of roof", "to the first", "verdict")
    table = Table(*heads)
    for row in result.facts["rows"]:
        for name, one in row["forms"].items():
            if "refused" in one:
                table.add_row(row["op"], row["case"], name, "refused")
                continue
            table.add_row(
                row["op"], row["case"], name, shown(one["seconds"]), f"{one['spread']:.0%}", shown(one["warm_seconds"]),
                f"{one['tflops']:.3g}", f"{one['gbytes']:.3g}", f"{one['of_roof']:.0%}",
                "{:.2f} ({:.2f} to {:.2f})".format(one["of_first"], *one["interval"]), one["verdict"] or "",
            )  # fmt: skip
    plain_console().print(table)
    for row in result.facts["rows"]:
        for name, one in row["forms"].items():
            if "refused" in one:
                typer.echo(f"{row['op']}, {row['case']}, {name}: refused, {one['refused']}")
    check_asked_forms(result)


def check_asked_forms(result: Result) -> None:
    """Raise InferixError if a form that was asked for is refused, once everything is printed and written."""
    reasons = {name: form["refused"] for name, form in result.facts["forms"].items() if form["refused"]}
    if reasons:
        raise InferixError("; ".join(f"form {quoted(name)} is refused: {reason}" for name, reason in reasons.items()))


@app.command(cls=Command)
def block(
    ctx: typer.Context,
    model: str = MODEL,
    preset: str | None = PRESET,
    random_weights: bool = RANDOM,
    frames_in_window: int | None = typer.Option(None, help="Window in latent frames.  [default: the preset's]"),
    executor: list[str] = typer.Option(
        [], metavar="NAME", help=f"{EXECUTOR_NAMES}; repeatable.  [default: all that can run]"
    ),
    baseline: list[str] = typer.Option(
        [],
        metavar="NAME",
        help="plain, compiled, diffusers or none; repeatable.  [default: plain; compiled on a GPU, diffusers on a CPU]",
    ),
    rounds: int = typer.Option(3, help="Streams of each candidate, interleaved."),
    blocks: int = typer.Option(5, help="Blocks timed at a full window in each round."),
    size: str | None = SIZE,
    vae: str | None = VAE,
    base: str | None = BASE,
    names: str | None = NAMES,
    device: str | None = DEVICE,
    gpus: int | None = GPUS,
    parallel: str | None = PARALLEL,
    dtype: str | None = DTYPE,
    seed: int = SEED,
    settings: list[str] = SETTINGS,
    offline: bool = OFFLINE,
    force: bool = FORCE,
    out: Path | None = OUT,
    as_json: bool = JSON,
) -> None:
    """Time one block at a full window, stage by stage.

    The latents of each candidate are first compared with the eager executor's; a candidate that differs is refused and
    not timed. Running the stream fills the window, which also gives block times at each smaller window. Baselines with
    the same weights run in the same process: `plain`, the public reference's loop, `compiled`, that loop with
    torch.compile, and `diffusers`, whose whole window runs in every step without a cache and is not compared. The
    machine's matmul and copy are timed in the same run.

    With --set lowp=fp8, kv_dtype=fp8 or both, fused and captured have low-precision layers and pages. The other
    candidates stay in the model's dtype, and all are compared with eager in that dtype.

    With --gpus every executor runs on so many ranks, and is compared with eager on these. Baselines run on one GPU, so
    there are none. Memory and profile are those of rank 0.

    Example: inferix bench block --model tinyworld --executor eager --baseline none --rounds 1 --blocks 4

    Example: inferix bench block --size 64x64 --rounds 1 --blocks 2 --set lowp=int8 --set kv_dtype=int8

    Ranks: inferix bench block --model wan-ranks --gpus 2 --device cpu --executor eager --set local_attn_size=6

    On a GPU: inferix bench block --model wan-1.3b --preset self-forcing --random-weights --out results/sf.json
    """
    from ..bench import block as bench

    subject = the_subject(
        ctx, model, preset, random_weights, frames_in_window, size, vae, base, names, device, dtype, seed, settings,
        offline, force, gpus, parallel,
    )  # fmt: skip
    options = bench.Options(subject, rounds, blocks, tuple(executor), tuple(baseline))
    check_out(out, {"--model": model, "--vae": vae, "--base": base})
    finish(bench.run(options, progress_printer(subject)), out, as_json, print_block)


@app.command(cls=Command)
def stream(
    ctx: typer.Context,
    model: str = MODEL,
    preset: str | None = PRESET,
    random_weights: bool = RANDOM,
    frames_in_window: int | None = typer.Option(None, help="Window in latent frames.  [default: the preset's]"),
    blocks: int = typer.Option(30, help="Blocks measured at a full window."),
    starts: int = typer.Option(3, help="Cold starts, each in its own process; 0 for none."),
    controls: int = typer.Option(8, help="Controls sent while it streams; 0 for none."),
    sessions: int = typer.Option(1, help="Measure 1 to N sessions at a time."),
    batches: Path | None = typer.Option(
        None, metavar="FILE", help="Also run the sessions as one batch; write the times for load(batches=FILE)."
    ),
    executor: str | None = EXECUTOR,
    minutes: float | None = typer.Option(None, help="Add a long run of N minutes of video."),
    sink: str = typer.Option("memory", help="memory, or mp4 to encode the video as well."),
    size: str | None = SIZE,
    vae: str | None = VAE,
    base: str | None = BASE,
    names: str | None = NAMES,
    device: str | None = DEVICE,
    gpus: int | None = GPUS,
    parallel: str | None = PARALLEL,
    dtype: str | None = DTYPE,
    seed: int = SEED,
    settings: list[str] = SETTINGS,
    offline: bool = OFFLINE,
    force: bool = FORCE,
    out: Path | None = OUT,
    as_json: bool = JSON,
) -> None:
    """Time a stream end to end, from a prompt to pixels on the sink.

    Each cold start is its own process, first with empty compile caches and then, if anything was compiled, with warm
    ones. Then, at a full window: time between blocks (p50, p95, p99, worst), FPS with the decoder, jitter, late blocks,
    and the time from a control to the first block that shows it. With --gpus all of it is of one world of so many
    ranks, which a cold start starts, too.

    Example: inferix bench stream --size 64x64 --blocks 4 --starts 1 --sessions 2 --batches batches.json

    Example: inferix bench stream --model tinyworld --blocks 8 --minutes 0.1 --starts 0 --out results/long.json

    On a GPU: inferix bench stream --model wan-1.3b --preset longlive --random-weights --sessions 4
    """
    from ..bench import stream as bench

    subject = the_subject(
        ctx, model, preset, random_weights, frames_in_window, size, vae, base, names, device, dtype, seed, settings,
        offline, force, gpus, parallel,
    )  # fmt: skip
    subject = replace(subject, executor=executor)
    options = bench.Options(subject, blocks, starts, controls, sessions, minutes, sink, batches)
    check_out(out, {"--model": model, "--vae": vae, "--base": base, "--batches": batches})
    finish(bench.run(options, progress_printer(subject)), out, as_json, print_stream)


@app.command(cls=Command)
def serve(
    url: str | None = typer.Option(None, help="A running server, such as http://127.0.0.1:8000.  [default: start one]"),
    sessions: int = typer.Option(4, min=1, help="Measure 1 to N sessions at a time, until one is refused."),
    seconds: float = typer.Option(20.0, min=1.0, help="Length of each measurement."),
    churn: float | None = typer.Option(
        None, min=0.1, metavar="MINUTES", help="Have clients join, leave and stall instead, for minutes."
    ),
    prompt: str = typer.Option(DEFAULT_PROMPT, help="Prompt of all sessions."),
    media: str = typer.Option("jpeg", help="h264, vp9, fmp4, jpeg or raw."),
    token: Path | None = typer.Option(None, metavar="FILE", help="File with the server's token."),
    arguments: list[str] = typer.Option(
        [], "--with", metavar="OPTION", help="An option for the server that is started, such as --with=--model=DIR."
    ),
    out: Path | None = OUT,
    as_json: bool = JSON,
) -> None:
    """Measure live sessions of a server as clients see them.

    Each session plays at the video's rate and sends a control every one to two and a half seconds. The table has, for 1
    to N sessions at a time: first picture, interval between blocks, control to pixel (p50, p95, p99), late blocks, and
    the times that a player had nothing to show. A refusal of the next session ends it, and is shown with its numbers.

    With --churn, N + 2 clients join, leave, vanish, come back, fork, say nothing and stall, in all media. The table has
    the server's memory, open files and threads by tenths of the time. Exit code 1 where memory grew by more than
    64 MiB after the first tenth, something was left behind at the end, or a client met an error.

    Example: inferix bench serve --sessions 3 --seconds 30

    Example: inferix bench serve --sessions 3 --churn 1 --out churn.json
    """
    from ..bench import churn as churning
    from ..bench import serve as bench
    from ..bench.result import write_result
    from ..runtime.files import check_output
    from ..serve.settings import read_token
    from .serve import check_packages

    check_packages()
    if out is not None:
        check_output(out)
    secret = None if token is None else read_token(token)
    console = Console(stderr=True)
    if churn is not None:
        options = [*arguments, f"--sessions={sessions}"]
        result = churning.run(url, options, churn, sessions, prompt, secret, console.print)
        if out is not None:
            write_result(result, out)
        return print_churn(result.facts, as_json)
    options = ["--queue=0", *arguments, f"--sessions={sessions}"]
    result = bench.run(url, options, sessions, seconds, prompt, media, secret, console.print)
    if out is not None:
        write_result(result, out)
    rows = result.facts["rows"]
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        print_serve(rows)


@app.command(cls=Command)
def parallel(
    ctx: typer.Context,
    gpus: int = typer.Option(2, min=2, metavar="N", help="GPUs between which to measure, or processes of a CPU."),
    model: str | None = typer.Option(None, help="Measure blocks of this model, too, in every layout."),
    preset: str | None = PRESET,
    size: str | None = SIZE,
    blocks: int | None = typer.Option(
        None, min=1, help=f"With --model: blocks of each layout that are timed.  [default: {LAYOUT_BLOCKS}]"
    ),
    device: str | None = DEVICE,
    settings: list[str] = SETTINGS,
    out: Path | None = typer.Option(None, help="JSON file for inferix plan --link FILE, and --measured FILE."),
    as_json: bool = JSON,
) -> None:
    """Measure bandwidth and latency between GPUs by the collectives that passes use, and blocks in every layout.

    With the file the planner of several GPUs takes these figures in place of assumed ones: those of the link by
    inferix plan --link, and with --model those of blocks by inferix plan --measured or load(measured=). Under torchrun,
    which measures the link alone, run it on the machines and with the ranks that are to be planned.

    Example: inferix bench parallel --gpus 2 --device cpu

    On GPUs: inferix bench parallel --gpus 8 --out link.json

    Layouts: inferix bench parallel --gpus 8 --model wan-1.3b --preset longlive --out table.json
    """
    from ..bench import rank_layouts, rank_links

    if out is not None:
        check_out(out, {})
    log, own = Console(stderr=True).print, parse_settings(settings)
    check_settings(ctx, own)
    beside = {"--preset": preset, "--size": size, "--set": settings or None, "--blocks": blocks}
    if model is None and (given := [flag for flag, value in beside.items() if value is not None]):
        raise UsageError(f"{given[0]} is for the blocks of a model; give --model, too")

    def keep(measured: Mapping[str, Any]) -> None:
        if out is not None:
            rank_links.write(measured, out)

    result: dict[str, Any] = {}
    if model is not None:
        pictures = parse_size(size) if size else None
        result |= rank_layouts.measure(model, preset, gpus, device, pictures, blocks or LAYOUT_BLOCKS, own, log, keep)
    result |= rank_links.measure(gpus, device, log)
    keep(result)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        bandwidth, latency = result["bandwidth"], result["latency"]
        plain_console().print(f"{gpus} ranks, {result['device']}: {bandwidth:.3g} GB/s, {latency:.1f} us a collective")


def print_serve(rows: list[dict[str, Any]]) -> None:
    """Print the table of `bench serve`."""
    table = Table("sessions", "first picture", "interval p50/p95/p99", "control to pixel p50/p95/p99", "blocks", "late",
                  "underruns", "server memory")  # fmt: skip
    for row in rows:
        cells = [in_milliseconds(row[name]) for name in ("first_picture", "interval", "control_to_pixel")]
        cells[0] = cells[0].partition(" / ")[0] + " ms"
        memory = "" if row["memory"] is None else f"{row['memory'] / 1e6:.0f} MB"
        counts = (str(row[name]) for name in ("blocks", "late_blocks", "underruns"))
        table.add_row(str(row["sessions"]), *cells, *counts, memory)
    console = plain_console()
    console.print(table)
    for row in rows:
        if row["refused"]:
            console.print(f"session {row['sessions'] + 1} was refused: {row['refused']}")


def print_churn(facts: dict[str, Any], as_json: bool) -> None:
    """Print the table of `bench serve --churn`; InferixError where it is not as it should be."""
    from ..bench.churn import GROWTH

    if as_json:
        typer.echo(json.dumps(facts))
    else:
        table = Table("until", "server memory", "open files", "threads")
        for row in facts["rows"]:
            memory = f"{row['memory'] / 1e6:.1f} MB"
            table.add_row(f"{row['until'] / 60:.1f} min", memory, str(row["files"]), str(row["threads"]))
        console = plain_console()
        console.print(table)
        for name, count in facts["counts"].items():
            console.print(f"{name:28}{count:9}")
    faults = list(facts["faults"])
    if facts["growth"] > GROWTH:
        faults.append(f"memory grew by {facts['growth'] / 1e6:.1f} MB after the first tenth")
    if faults:
        raise InferixError(f"{len(faults)} faults: " + "; ".join(faults[:5]))


def in_milliseconds(quantiles: dict[str, float] | None) -> str:
    return "" if quantiles is None else " / ".join(f"{value * 1e3:.0f}" for value in quantiles.values()) + " ms"


@app.command(cls=Command)
def engines(
    engine: list[Path] = typer.Option(
        ..., metavar="DIR", help="Folder that inferix export wrote; repeatable, for several targets of one model."
    ),
    executor: list[str] = typer.Option(["eager", "fused"], metavar="NAME", help=f"{EXECUTOR_NAMES}; repeatable."),
    blocks: int = typer.Option(20, min=2, help="Blocks timed at a full window."),
    threads: int = typer.Option(0, min=0, help="Threads of each program.  [default: one per core]"),
    seed: int = SEED,
    out: Path | None = typer.Option(None, help="JSON file for the times, with every sample."),
    as_json: bool = JSON,
) -> None:
    """Time exported engines beside the executors of the model that they were made of.

    All make the same stream, a block of each in turn, and latents are compared with the first executor's. The model is
    the one that the engines' plans name.

    Example: inferix bench engines --engine world --blocks 5
    """
    from ..bench import engines as bench
    from ..runtime.files import write_atomically

    check_out(out, {"--engine": engine[0]})
    console = Console(stderr=True)
    show = lambda line: console.print(line, highlight=False, soft_wrap=True)  # noqa: E731
    times = bench.measure(engine, executor, blocks, seed, threads, show)
    text = json.dumps(bench.facts(times))
    if out is not None:
        write_atomically(out, lambda part: part.write_text(text + "\n", "utf-8"))
    if as_json:
        return typer.echo(text)
    first = next(iter(times.values()))
    table = Table("candidate", "block", *bench.PARTS, f"{next(iter(times))} / it", "off by")
    for name, one in times.items():
        ratio = median(a / b for a, b in zip(first.blocks, one.blocks, strict=True))
        cells = (in_unit(median(one.parts[part]), "s") for part in bench.PARTS)
        table.add_row(name, in_unit(one.median, "s"), *cells, f"{ratio:.2f}", f"{one.difference:.1e}")
    plain_console().print(table)


@app.command(cls=Command)
def report(
    folder: Path = typer.Argument(metavar="DIR", help="Folder of results, read with its subfolders."),
    out: Path = typer.Option(Path("performance.md"), help="Page to write; its pictures go into a folder beside it."),
    goals: bool | None = typer.Option(
        None, "--goals/--no-goals", help="Show the project's speed goals.  [default: for the project's own results]"
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout: the files written."),
) -> None:
    """Make one Markdown page, with pictures, from a folder of results.

    GPU and CPU results have separate sections. JSON files of other programs are passed over.

    Example: inferix bench report results --out performance.md
    """
    from ..bench.plots import has_matplotlib
    from ..bench.report import write_report
    from ..bench.result import foreign_files

    for path in foreign_files(folder):
        typer.echo(f"passed over: {quoted(str(path))}, which was not written by inferix bench", err=True)
    written = write_report(folder, out, goals)
    if not has_matplotlib():
        typer.echo("no pictures: matplotlib is not installed; pip install matplotlib", err=True)
    typer.echo(json.dumps([str(path) for path in written]) if as_json else f"{out}, {len(written) - 1} pictures")


@app.command(cls=Command)
def compare(
    a: Path = typer.Argument(metavar="A.json", help="The earlier result."),
    b: Path = typer.Argument(metavar="B.json", help="The later result."),
    threshold: float = typer.Option(0.03, help="Smallest change that counts, as a fraction."),
    fail_on_slower: bool = typer.Option(False, "--fail-on-slower", help="Exit with 1 if anything got slower."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Compare two results and list what got faster or slower from A to B.

    A change counts if the 95 % bootstrap interval of the ratio of medians lies entirely beyond the threshold. There is
    no change if it lies entirely within; otherwise the verdict is `unsure`. Both results must have the same kind, model
    and type of device; other differences are listed.

    Example: inferix bench compare results/before.json results/block.json
    """
    from ..bench.compare import STATISTIC
    from ..bench.compare import compare as compared
    from ..bench.result import read_result

    comparison = compared(read_result(a), read_result(b), threshold)
    if as_json:
        changes = [{**asdict(change), "a": change.a.median, "b": change.b.median} for change in comparison.changes]
        rest = {"statistic": STATISTIC, "threshold": threshold, "differences": comparison.differences}
        typer.echo(json.dumps(rest | {"changes": changes, "gone": comparison.gone, "new": comparison.new}))
    else:
        rows = Table("quantity", "A", "B", "B / A", "interval", "verdict")
        for one in comparison.changes:
            interval = "" if one.verdict == "few" else f"{one.low:.3f} to {one.high:.3f}"
            verdict = "too few samples" if one.verdict == "few" else one.verdict
            rows.add_row(
                one.name, in_unit(one.a.median, one.a.unit), in_unit(one.b.median, one.b.unit), f"{one.ratio:.3f}",
                interval, verdict,
            )  # fmt: skip
        console = plain_console()
        console.print(rows)
        console.print(f"{STATISTIC}; a change counts beyond {threshold:.0%}")
        for line in comparison.differences:
            console.print(f"different: {line}")
        for label, names in (("only in A", comparison.gone), ("only in B", comparison.new)):
            if names:
                console.print(f"{label}: {', '.join(names)}")
    if fail_on_slower and comparison.slower:
        slower = ", ".join(change.name for change in comparison.slower)
        raise InferixError(f"slower in {b}: {slower}")


def the_subject(
    ctx: typer.Context,
    model: str,
    preset: str | None,
    random_weights: bool,
    frames_in_window: int | None,
    size: str | None,
    vae: str | None,
    base: str | None,
    names: str | None,
    device: str | None,
    dtype: str | None,
    seed: int,
    settings: list[str],
    offline: bool,
    force: bool,
    gpus: int | None,
    parallel: str | None,
) -> Subject:
    """Make the subject of a benchmark from the options."""
    from ..bench.subject import Subject

    overrides = parse_settings(settings)
    check_settings(ctx, overrides)
    return Subject(
        model=model, preset=preset, random_weights=random_weights, frames_in_window=frames_in_window,
        size=parse_size(size) if size else None, device=device, dtype=dtype, vae=vae, base=base, names=names,
        seed=seed, overrides=overrides, offline=offline, force=force,
        gpus=gpus or ranks_of_launcher(), parallel=parallel,
    )  # fmt: skip


def progress_printer(subject: Subject) -> Callable[[str], None]:
    """Return a function that prints progress to stderr; first prints which device and weights are measured."""
    console = Console(stderr=True)

    def show(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    from ..runtime.config import default_device

    if (subject.device or default_device()) == "cpu":
        show("no GPU is used: these are CPU times and do not predict GPU times")
    if subject.is_named or subject.random_weights:
        show(f"{subject.model} has random, untrained weights")
    return show


def check_out(out: Path | None, inputs: dict[str, str | Path | None]) -> None:
    """Raise UsageError for an output that is an input or cannot be written, before anything is measured."""
    from ..runtime.files import check_output, check_paths

    if out is not None:
        check_paths(inputs, {"--out": out})
        check_output(out)


def finish(result: Result, out: Path | None, as_json: bool, show: Callable[[Result], None]) -> None:
    """Write the result's file and print the result."""
    from ..bench.result import write_result

    if out is not None:
        write_result(result, out)
    if as_json:
        typer.echo(json.dumps(json.loads(result.text())))
    else:
        show(result)


def print_block(result: Result) -> None:
    block = result.facts["block"]
    plain = result.of("plain").get("block")
    table = Table("candidate", "block", "interval", "FPS", "transformer", "of matmul", "decoder", "to plain", "off by")
    for name, facts in result.facts["candidates"].items():
        if facts["refused"]:
            table.add_row(name, "refused", "", "", facts["refused"])
            continue
        series = result.of(name)
        transformer, decode, whole = series.get("transformer"), series.get("decode"), series["block"].median
        flops = result.facts["work"]["transformer"]["flops"]
        share = flops / transformer.median / result.matmul_flops if transformer else None
        interval = series.get("interval")
        table.add_row(
            name, in_unit(whole, "s"), in_unit(interval.median, "s") if interval else "",
            f"{block['pixel_frames'] / (interval.median if interval else whole):.3g}",
            in_unit(transformer.median, "s") if transformer else "", f"{share:.0%}" if share else "",
            in_unit(decode.median, "s") if decode else "", f"{plain.median / whole:.2f}x" if plain else "",
            "not compared" if facts["difference"] is None else f"{facts['difference']:.1e}",
        )  # fmt: skip
    console = plain_console()
    console.print(table)
    console.print(
        f"{place(result)}; {block['pixel_frames']} pixel frames a block, window of {block['window_frames']} latent "
        f"frames; matmul here {result.ceilings['matmul_flops'].best / 1e9:.4g} GFLOP/s"
    )
    if packed := [name for name, facts in result.facts["candidates"].items() if facts["fewer_bits"]]:
        bits = result.facts["bits_off"]
        console.print(f"{', '.join(packed)}: in fewer bits; eager is in full, and in these bits off by {bits:.1e}")


def print_stream(result: Result) -> None:
    table = Table("quantity", "p50", "p95", "p99", "worst", "times")
    for name, one in result.series.items():
        cells = (one.median, one.tail(0.95), one.tail(0.99), one.worst)
        shown = ("" if value is None else in_unit(value, one.unit) for value in cells)
        table.add_row(name, *shown, str(len(one.samples)))
    console, facts = plain_console(), result.facts["stream"]
    console.print(table)
    console.print(
        f"{place(result)}; {facts['fps']:.3g} FPS at a full window, {facts['real_time_factor']:.3g} times the video's "
        f"{facts['video_fps']}; a viewer waits at {facts['late_blocks']} of {facts['blocks']} blocks"
    )
    for point in result.facts["sessions"][1:]:
        console.print(f"{point['sessions']} sessions: {point['fps']:.3g} FPS in all")
    for point in result.facts.get("batches", [])[1:]:
        batch, turns = (in_unit(point[key], "s") for key in ("batch", "turns"))
        console.print(f"{point['sessions']} sessions: a block each in {batch} as one batch, in {turns} in turns")
    if long := result.facts.get("long"):
        first, last = long["interval_by_tenth"][0], long["interval_by_tenth"][-1]
        console.print(
            f"{long['minutes']:g} minutes of video: median interval {in_unit(first, 's')} in the first tenth at a full "
            f"window, {in_unit(last, 's')} in the last"
        )


def place(result: Result) -> str:
    """Return the type and name of the measured device."""
    return f"{'GPU' if result.on_gpu else 'CPU'}: {result.device_name}"


def plain_console() -> Console:
    """Return a console on stdout, wide enough for a table if stdout is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def in_unit(value: float, unit: str) -> str:
    """Format a quantity with its unit; seconds below 1 as ms."""
    if unit != "s":
        return f"{value:.4g} {unit}"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.4g} ms"


def print_tuned(options: Options, as_json: bool) -> None:
    """Tune the ops and print the paths of their tables."""
    from ..bench.tune import tune_here

    console = Console(stderr=True)
    written = tune_here(options, lambda line: console.print(line, highlight=False, soft_wrap=True))
    if as_json:
        typer.echo(json.dumps({op: str(path) for op, path in written.items()}))
    else:
        for op, path in written.items():
            typer.echo(f"{op}: {path}")


def print_compiled(ops: list[str], as_json: bool) -> None:
    """Print the compile gate's table. Raises InferixError if the gate finds a problem."""
    from ..bench.compile_gate import compile_all, problems

    kernels = compile_all(ops)
    if as_json:
        typer.echo(json.dumps(kernels))
    else:
        table = Table("kernel", "registers", "stack", "shared", "warps", "instructions", "of tensor cores")
        for name, row in kernels.items():
            cells = ("registers", "stack", "shared", "warps", "instructions", "matrix")
            table.add_row(name, *(str(row[cell]) for cell in cells))
        Console(width=120).print(table)
    if errors := problems(kernels):
        raise InferixError("; ".join(errors))
