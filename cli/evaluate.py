"""`inferix eval`: measure the quality of a model's video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from ..version import __version__
from . import eval_drift
from .help import Command, group

if TYPE_CHECKING:
    from ..runtime.engine import Engine

app = group()


@app.callback()
def common() -> None:
    """Measure the quality of a model's video.

    drift scores any video files, run makes videos and scores them, compare sets two runs side by side.

    Example: inferix eval drift outputs/*.mp4
    """


@app.command(cls=Command)
def tinyworld(
    model: str = typer.Option("tinyworld", help="Checkpoint folder of a model trained on the small world."),
    walks: int | None = typer.Option(
        None, min=1, help="Walks for each figure, and free streams of 60 s.  [default: 32]"
    ),
    seeds: int | None = typer.Option(None, min=1, help="Long runs.  [default: 8]"),
    minutes: float | None = typer.Option(
        None, help="Length of a long run, in minutes of video; 1 or more.  [default: 10]"
    ),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    out: Path | None = typer.Option(None, help="Folder for eval.json; a stopped run goes on from its walks.json."),
    sheets: Path | None = typer.Option(
        None, help="Folder for contact sheets of a minute at rest, walking and returning; nothing is measured."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Compare a model of the small world with its simulator.

    Figures: camera moves that follow the action, PSNR where the simulator determines the picture, landmarks that
    return, the land after rests, circles and straight walks, the hero, drift over 60 s, and collapse in long runs. A
    full run takes about an hour on two cores.

    Example: inferix eval tinyworld --walks 1 --seeds 1 --minutes 1 --out outputs/eval
    """
    from ..evaluate.tinyworld import BARS, evaluate, judge_hash
    from ..evaluate.tinyworld_walks import Progress
    from ..runtime.files import check_output, check_paths, write_atomically
    from ..runtime.load import load

    if sheets is not None:
        measured = {"--walks": walks, "--seeds": seeds, "--minutes": minutes, "--out": out, "--json": as_json or None}
        if given := [flag for flag, value in measured.items() if value is not None]:
            raise UsageError(f"--sheets measures nothing; leave out {given[0]}, or --sheets")
        draw_sheets(load(model, preset="tinyworld", device=device), model, sheets)
        return
    walks, seeds, minutes = walks or 32, seeds or 8, 10.0 if minutes is None else minutes
    if not minutes >= 1:
        raise UsageError(f"--minutes is {minutes:g}; expected 1 or more, since drift is measured over 60 s")
    places: dict[str, Path] = {}
    if out is not None:
        places = {"figures": out / "eval.json", "finished walks": out / "walks.json"}
        check_paths({"--model": model}, places)
        for place in places.values():
            check_output(place)
    engine = load(model, preset="tinyworld", device=device)
    console = Console(stderr=True)
    about = {"version": __version__, "judge": judge_hash(), "model": engine.describe()}
    progress = Progress(lambda line: console.print(line, highlight=False), places.get("finished walks"), about)
    figures = evaluate(engine, walks, seeds, minutes, progress) | about
    figures |= {"walks": walks, "seeds": seeds, "minutes": minutes}
    if places:
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(places["figures"], lambda part: part.write_text(text, "utf-8"))
        places["finished walks"].unlink(missing_ok=True)
    if as_json:
        typer.echo(json.dumps(figures, default=str))
        return
    table = Table("figure", "reached", "95 % interval", "bar", "")
    for name, (sign, bar) in BARS.items():
        passed = "yes" if figures["passed"][name] else "no"
        table.add_row(name, f"{figures[name]:.3g}", bounds(figures, name), f"{sign} {bar:g}", passed)
    for name in ("hero_right", *(name for name in figures["intervals"] if name not in BARS)):
        table.add_row(name, f"{figures[name]:.3g}", bounds(figures, name), "", "")
    for name, value in figures["drift"].items():
        table.add_row(f"drift, {name}", f"{value:.3g}", "", f"simulator {figures['simulator_drift'][name]:.2g}", "")
    Console().print(table)
    known = ", ".join(f"{name} {share:.1%}" for name, share in figures["judge_accuracy"].items())
    typer.echo(f"accuracy of the classifiers on held-out worlds: {known}")


def draw_sheets(engine: Engine, model: str, folder: Path) -> None:
    """Write the contact sheets of `evaluate.tinyworld_sheets`, one file each."""
    from ..evaluate import tinyworld_sheets
    from ..runtime.files import check_output, check_paths
    from ..runtime.media import contact_sheet

    places = {name: check_output(folder / f"{name}.png") for name in tinyworld_sheets.NAMES}
    check_paths({"--model": model}, places)
    for name, rows in tinyworld_sheets.sheets(engine).items():
        tiles = [tile for row in rows for tile in row]
        contact_sheet([tile.picture for tile in tiles], places[name], len(rows[0]), [tile.label for tile in tiles])
        typer.echo(places[name])


def bounds(figures: dict[str, Any], name: str) -> str:
    """The interval of a figure over walks, if it has one."""
    interval = figures["intervals"].get(name)
    if interval is None or interval["low"] is None:
        return ""
    return f"{interval['low']:.3g} to {interval['high']:.3g}"


eval_drift.register(app)
