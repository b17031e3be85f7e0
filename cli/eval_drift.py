"""`inferix eval drift`, `lvbench`, `compare` and `run`: how far videos move away from their beginning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import InferixError, UsageError, quoted
from .help import Command
from .options import FORCE, OFFLINE, check_settings, parse_settings, parse_size

if TYPE_CHECKING:
    from ..evaluate.prompt_lists import PromptEntry
    from ..evaluate.results import Settings, Video

METRICS = typer.Option(
    None, metavar="NAME,NAME", help="Metrics to score, such as sharpness,motion.  [default: all without weights]"
)
OUT = typer.Option(None, help="Folder for drift.json and drift.html.")
AS_JSON = typer.Option(False, "--json", help="The results as one JSON line on stdout.")
FPS = typer.Option(None, help="Frame rate to sample every video at.  [default: each video's own]")
SIZE = typer.Option(None, metavar="WxH", help="Size to fit every video to.  [default: each video's own]")
WEIGHTS = typer.Option(
    None, metavar="DIR", help="Folder with weights of learned metrics, as docs/drift.md lists them; nothing is fetched."
)
SPLIT = typer.Option(None, metavar="NAME", help="Only the entries of --prompts with this split, such as eval.")
LVBENCH = {
    "clarity": "musiq_spaq", "motion": "amt_s_rebuild", "aesthetic": "clip_l14_aesthetic", "subject": "dino_b16",
    "background": "clip_b32", "dynamic": "raft_moving_share",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the commands to `inferix eval`."""
    for command in (drift, lvbench, compare, run):
        app.command(cls=Command)(command)


def drift(
    videos: list[Path] = typer.Argument(..., metavar="VIDEO...", help="Video files."),
    metrics: str | None = METRICS,
    segments: int = typer.Option(10, min=2, help="Equal segments that each video is cut into."),
    prompts: Path | None = typer.Option(
        None, help="Prompts over time: a storyboard for all videos, or a list. Segments end where the prompt changes."
    ),
    fps: float | None = FPS,
    size: str | None = SIZE,
    weights: Path | None = WEIGHTS,
    out: Path | None = OUT,
    as_json: bool = AS_JSON,
) -> None:
    """Measure how far videos drift from their first segment.

    Each video is cut into segments, each segment is scored, and the later ones are compared with the first. The table
    has vde2 (mean change, late segments weighing more; loss is only what gets worse), LV-Bench's vde, and the
    difference of the first and the last 15 %, with 95 % intervals over videos. docs/drift.md has the formulas.

    A video that cannot be read or has fewer frames than segments is skipped and listed, and the exit code is 1.

    Example: inferix eval drift outputs/*.mp4 --out outputs/a
    """
    settings = settings_of(metrics, segments, fps, size, weights)
    entries = None
    if prompts is not None:
        from ..evaluate.prompt_lists import read_prompts

        entries = read_prompts(prompts)
    score_and_show(videos, entries, settings, prompts, out, as_json, "Drift", use_switches=True)


def lvbench(
    videos: Path = typer.Option(..., help="Folder of videos."),
    prompts: Path | None = typer.Option(None, help="List of prompts: txt, json, jsonl or yaml."),
    split: str | None = SPLIT,
    metrics: str | None = METRICS,
    weights: Path | None = WEIGHTS,
    out: Path | None = OUT,
    as_json: bool = AS_JSON,
) -> None:
    """Score a folder of videos by LV-Bench's rules: ten equal segments, every frame, no resizing.

    vde is exactly the published sum. LV-Bench's own scores need published weights (--weights); the metrics without
    weights have other names, and their figures are not LV-Bench's. Prompt changes do not end segments, since the
    published code does not know them; `inferix eval drift --prompts` does.

    Example: inferix eval lvbench --videos outputs --out outputs/lvbench
    """
    from ..evaluate.learned_scorers import reason_missing
    from ..evaluate.prompt_lists import videos_in, videos_of

    settings = settings_of(metrics, 10, None, None, weights)
    entries, paths = None, videos_in(videos)
    if prompts is not None:
        entries = entries_of(prompts, split)
        paths = paths if split is None else videos_of(paths, entries)
    elif split is not None:
        raise UsageError(f"--split {quoted(split)} needs --prompts, the list that has the splits")
    console = Console(stderr=True)
    scored = settings.describe()["metrics"]
    for dimension, name in LVBENCH.items():
        if name not in scored:
            reason = reason_missing(name, weights) or "it is not in metrics"
            console.print(f"not scored: {dimension} ({name}), {reason}", highlight=False, soft_wrap=True, markup=False)
    score_and_show(paths, entries, settings, prompts, out, as_json, "LV-Bench rules", use_switches=False)


def compare(
    before: Path = typer.Argument(..., metavar="A", help="drift.json of one run."),
    after: Path = typer.Argument(..., metavar="B", help="drift.json of the other."),
    figure: str = typer.Option("vde2.late.loss", help="Figure to compare, such as vde.linear or start_end."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Compare the drift of two runs, B minus A, with 95 % intervals over videos.

    Videos of the same names in both are compared in pairs, which narrows the intervals. A difference counts if its
    interval does not contain 0.

    Example: inferix eval compare outputs/a/drift.json outputs/lvbench/drift.json
    """
    from ..evaluate.results import compare as compared
    from ..evaluate.results import read_results

    result = compared(read_results(before), read_results(after), figure)
    if as_json:
        typer.echo(json.dumps(result))
        return
    pairs = "in pairs" if result["paired"] else "not in pairs"
    table = Table("metric", "A", "B", "B - A", "95 % interval", "", title=f"{figure}, {pairs}", title_justify="left")
    for name, entry in result["metrics"].items():
        if "error" in entry:
            table.add_row(name, "", "", "", "", entry["error"])
            continue
        low, high = entry["low"], entry["high"]
        bounds = "one video" if low is None else f"{low:.3g} to {high:.3g}"
        verdict = "no difference seen" if not entry["different"] else ("higher" if entry["mean"] > 0 else "lower")
        table.add_row(name, *(f"{entry[key]:.3g}" for key in ("before", "after", "mean")), bounds, verdict)
    Console().print(table)


def run(
    ctx: typer.Context,
    prompts: Path = typer.Option(..., help="List of prompts: txt, json, jsonl, or a yaml storyboard."),
    out: Path = typer.Option(..., help="Folder for the videos, their records and scores, drift.json and drift.html."),
    split: str | None = SPLIT,
    model: str = typer.Option("tinyworld", help="Model, as for inferix generate."),
    preset: str | None = typer.Option(None, help="Named sampler and context settings.  [default: the model's own]"),
    seconds: float = typer.Option(60.0, help="Length of each video in seconds, rounded up to whole blocks."),
    seeds: int = typer.Option(1, min=1, help="Videos of each prompt, with seeds from 0 on."),
    metrics: str | None = METRICS,
    segments: int = typer.Option(10, min=2, help="Equal segments that each video is cut into."),
    weights: Path | None = WEIGHTS,
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size.  [default: the model's own]"),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Any field of the preset; repeatable."),
    base: str | None = typer.Option(None, help="Folder with VAE and text encoder, if not with the model."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    dtype: str | None = typer.Option(None, help="float32, bfloat16, float16.  [default: bfloat16 on a GPU]"),
    executor: str | None = typer.Option(None, help="Executor of passes: eager, fused, captured."),
    offline: bool = OFFLINE,
    force: bool = FORCE,
    as_json: bool = AS_JSON,
) -> None:
    """Generate videos of a model and measure their drift.

    Every prompt is made with every seed. A run that was stopped goes on where it was when started again with the same
    folder: finished videos and scores are used as they are. A model with actions takes a random walk of the seed.

    Example: inferix eval run --prompts prompts.txt --seconds 5 --seeds 2 --out outputs/study
    """
    from ..evaluate.results import results_of
    from ..evaluate.study import make_video, score_take, takes_of
    from ..runtime.files import check_paths
    from ..runtime.load import load

    if not 0 < seconds <= 36_000:
        raise UsageError(f"--seconds is {seconds:g}; expected above 0, at most 36000")
    chosen = parse_settings(settings)
    check_settings(ctx, chosen)
    scoring = settings_of(metrics, segments, None, None, weights)
    entries = entries_of(prompts, split)
    outputs = result_files(out)
    check_paths({"--prompts": prompts, "--model": model}, outputs)
    parts: dict[str, Any] = {"base": base, "executor": executor, "offline": offline, "force": force}
    picture = None if size is None else parse_size(size)
    engine = load(model, preset=preset, device=device, dtype=dtype, size=picture, **parts, **chosen)
    takes, described = takes_of(entries, range(seeds), out / "videos"), engine.describe()
    videos, skipped = [], []
    with progress_bar(len(takes)) as (advance, note):
        for take in takes:
            note(f"making {take.path.name}")
            make_video(take, engine, described, seconds, picture or engine.default_size)
            note(f"scoring {take.path.name}")
            try:
                videos.append(score_take(take, scoring, seconds))
            except UsageError as error:
                skipped.append({"video": str(take.path), "reason": str(error)})
            advance()
    title = f"{model}, {engine.preset.name}: {seconds:g} s"
    show(results_of(videos, skipped, scoring), outputs, as_json, title)


def entries_of(prompts: Path, split: str | None) -> list[PromptEntry]:
    from ..evaluate.prompt_lists import in_split, read_prompts

    entries = read_prompts(prompts)
    return entries if split is None else in_split(entries, split)


def settings_of(
    metrics: str | None, segments: int, fps: float | None, size: str | None, weights: Path | None
) -> Settings:
    """Scoring settings of the options; an unknown metric is refused here, and weights are loaded once."""
    from ..evaluate.metrics import chosen_scorers
    from ..evaluate.results import Settings

    if fps is not None and not 0 < fps <= 1000:
        raise UsageError(f"--fps is {fps:g}; expected above 0, at most 1000")
    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    return Settings(chosen_scorers(names, weights), segments, fps, None if size is None else parse_size(size))


def result_files(out: Path | None) -> dict[str, Path]:
    return {} if out is None else {"results": out / "drift.json", "page": out / "drift.html"}


def score_and_show(
    paths: Sequence[Path],
    entries: Sequence[PromptEntry] | None,
    settings: Settings,
    prompts: Path | None,
    out: Path | None,
    as_json: bool,
    title: str,
    use_switches: bool,
) -> None:
    """Score video files with a progress bar, write and print the results."""
    from dataclasses import replace

    from ..evaluate.prompt_lists import with_prompts
    from ..evaluate.results import score_videos
    from ..runtime.files import check_output, check_paths
    from ..runtime.media_input import video_seconds

    outputs = result_files(out)
    inputs: dict[str, str | Path | None] = {f"video {index + 1}": path for index, path in enumerate(paths)}
    check_paths(inputs | {"--prompts": prompts}, outputs)
    for output in outputs.values():
        check_output(output)
    shared = entries is not None and any(entry.share and len(entry.cues) > 1 for entry in entries)
    seconds = {}
    for path in paths if shared and use_switches else []:
        try:
            seconds[path] = video_seconds(path)
        except UsageError:  # it is skipped, with the reason, when it is scored
            continue
    videos = with_prompts(paths, entries, seconds)
    if not use_switches:
        videos = [replace(video, switches=()) for video in videos]
    with progress_bar(len(videos)) as (advance, note):

        def on_video(index: int, video: Video, entry: dict[str, Any] | None) -> None:
            advance()

        results = score_videos(videos, settings, on_video, lambda count: note(f"{count} frames"))
    if not results["videos"] and not was_interrupted(results):
        reasons = "; ".join(entry["reason"] for entry in results["skipped"][:3])
        raise InferixError(f"none of {len(videos)} videos could be scored: {reasons}")
    show(results, outputs, as_json, title)


def show(results: dict[str, Any], outputs: dict[str, Path], as_json: bool, title: str) -> None:
    """Write the results and the page, print a table or JSON, and exit with 1 if something is missing."""
    from ..evaluate.page import write_page
    from ..evaluate.results import has_faults, write_results

    if outputs:
        write_results(results, outputs["results"])
        write_page(results, outputs["page"], title)
    console = Console(stderr=True)
    for entry in results["skipped"]:
        console.print(f"skipped {entry['video']}: {entry['reason']}", highlight=False, soft_wrap=True, markup=False)
    for note in results["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        typer.echo(json.dumps(results, allow_nan=False))
    else:
        print_table(results)
        for output in outputs.values():
            typer.echo(str(output))
    if was_interrupted(results):
        raise typer.Exit(130)
    if has_faults(results):
        raise typer.Exit(1)


def was_interrupted(results: dict[str, Any]) -> bool:
    from ..evaluate.results import INTERRUPTED

    return any(entry["reason"] == INTERRUPTED for entry in results["skipped"])


SHOWN_FIGURES = {
    "loss": "vde2.late.loss", "signed": "vde2.late.signed", "VDE": "vde.linear", "start-end": "start_end",
}  # fmt: skip


def print_table(results: dict[str, Any]) -> None:
    """Print the main figures with their intervals."""
    count = len(results["videos"])
    title = (
        f"{count} {'video' if count == 1 else 'videos'}, {results['settings']['segments']} segments; "
        "loss and signed: vde2 with late weights"
    )
    table = Table(title=title, title_justify="left")
    for head in ("metric", "better", *SHOWN_FIGURES):
        table.add_column(head, no_wrap=head == "metric")
    for name, about in results["settings"]["metrics"].items():
        summary = results["summary"][name]
        table.add_row(name, about["better"], *(cell(summary, key) for key in SHOWN_FIGURES.values()))
    Console().print(table)


def cell(summary: dict[str, Any], key: str) -> str:
    """A mean with its interval; `inf` if it is infinite for every video."""
    entry = summary.get(key)
    if entry is None:
        return "inf" if summary else "-"
    if entry["low"] is None:
        return f"{entry['mean']:.2g}"
    return f"{entry['mean']:.2g} [{entry['low']:.2g}, {entry['high']:.2g}]"


@contextmanager
def progress_bar(videos: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Yield `advance()`, to be called after each video, and `note(text)`."""
    columns = (
        TextColumn("video"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}"), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("videos", total=videos, note="")
        yield lambda: progress.update(task, advance=1), lambda text: progress.update(task, note=text)
