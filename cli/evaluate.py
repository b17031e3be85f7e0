"""`inferix eval`: how good what a model makes is."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError
from ..version import __version__

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def common() -> None:
    """Measure how good what a model makes is.

    Example: inferix eval tinyworld
    """


@app.command()
def tinyworld(
    model: str = typer.Option("tinyworld", help="Checkpoint folder of a model trained on the small world."),
    walks: int = typer.Option(32, min=1, help="Walks for each figure, and free streams of 60 s."),
    seeds: int = typer.Option(8, min=1, help="Long runs."),
    minutes: float = typer.Option(10.0, help="Length of a long run, in minutes of video; 1 or more."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    out: Path | None = typer.Option(None, help="Folder for eval.json and the contact sheet streams.png."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Hold the small world against its simulator.

    Camera moves as told, pictures against the simulator where it is determined, landmarks that come back, the hero,
    drift of free streams over 60 s, and collapse in long ones. A full run takes about half an hour on two cores.

    Example: inferix eval tinyworld --walks 8 --seeds 2 --minutes 1 --out outputs/eval
    """
    if not minutes >= 1:
        raise UsageError(f"--minutes is {minutes:g}; expected 1 or more, since drift is measured over 60 s")

    from ..evaluate.tinyworld import BARS, evaluate
    from ..runtime.files import check_output, check_paths, write_atomically
    from ..runtime.load import load
    from ..runtime.media import contact_sheet

    if out is not None:
        places = {"figures": out / "eval.json", "contact sheet": out / "streams.png"}
        check_paths({"--model": model}, places)
        for place in places.values():
            check_output(place)
    engine = load(model, preset="tinyworld", device=device)
    console = Console(stderr=True)
    found, sheet = evaluate(engine, walks, seeds, minutes, lambda said: console.print(said, highlight=False))
    found |= {"walks": walks, "seeds": seeds, "minutes": minutes, "version": __version__, "model": engine.describe()}
    if out is not None:
        text = json.dumps(found, indent=2) + "\n"
        write_atomically(places["figures"], lambda part: part.write_text(text, "utf-8"))
        times = [f"{6 * tenth} s" for tenth in range(sheet.shape[1])]
        frames = list(sheet.reshape(-1, *sheet.shape[2:]))
        contact_sheet(frames, places["contact sheet"], len(times), times * len(sheet))
    if as_json:
        typer.echo(json.dumps(found, default=str))
        return
    table = Table("figure", "reached", "bar", "")
    for name, (sign, bar) in BARS.items():
        table.add_row(name, f"{found[name]:.3g}", f"{sign} {bar:g}", "yes" if found["passed"][name] else "no")
    table.add_row("hero_right", f"{found['hero_right']:.3g}", "", "")
    for name, value in found["drift"].items():
        table.add_row(f"drift, {name}", f"{value:.3g}", f"simulator {found['simulator_drift'][name]:.2g}", "")
    Console().print(table)
