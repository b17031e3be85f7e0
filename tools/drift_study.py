"""Measure how long the small world holds, beside three presets of an untrained model as a negative control.

    python tools/drift_study.py --out runs/drift-study

Each part is one `inferix eval run`, which goes on where it was stopped. In the end every loss (vde2 with late weights)
is printed with its interval as a table in Markdown. An untrained model makes noise that does not change with time, so
that whatever the control loses is the level of chance.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from inferix.errors import InferixError, one_line_errors
from inferix.evaluate.results import read_results
from inferix.models.tinyworld.family import TinyWorld

SEEDS = 4  # of each prompt of the small world: 24 videos
CONTROL_SEEDS = 24  # of one prompt
CONTROLS = ("self-forcing", "longlive", "rolling-forcing")
WORLD_METRICS = (
    "exposure", "contrast", "saturation", "sharpness", "colour", "layout", "motion", "moving_share", "warp_error",
    "tinyworld_words", "tinyworld_things",
)  # fmt: skip
FIGURE = "vde2.late.loss"


@dataclass(frozen=True)
class Part:
    """One `inferix eval run` of the study."""

    name: str
    prompts: tuple[str, ...]
    arguments: tuple[str, ...]

    def run(self, folder: Path, seconds: float) -> dict[str, Any]:
        """Make and score what is missing; returns the results."""
        place = folder / self.name
        place.mkdir(parents=True, exist_ok=True)
        prompts = place / "prompts.txt"
        prompts.write_text("".join(f"{prompt}\n" for prompt in self.prompts), "utf-8")
        command = [
            sys.executable, "-m", "inferix", "eval", "run", "--prompts", str(prompts), "--out", str(place),
            "--seconds", f"{seconds:g}", *self.arguments,
        ]  # fmt: skip
        print(" ".join(command[1:]), flush=True)
        if code := subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
            raise InferixError(f"part {self.name} ended with exit code {code}; start the study again to go on")
        return read_results(place / "drift.json")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Loss of each metric and part with its interval over videos, as a table in Markdown."""
    names = list(dict.fromkeys(name for part in results.values() for name in part["summary"]))
    heads = [f"{name}, {len(part['videos'])} videos" for name, part in results.items()]
    lines = [f"| metric | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in names:
        cells = [cell(part["summary"].get(name, {}).get(FIGURE)) for part in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['mean']:.2f}"
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the study; a stopped study goes on.")],
    seconds: Annotated[float, typer.Option(help="Length of each video of the small world.")] = 60.0,
    control_seconds: Annotated[float, typer.Option(help="Length of each video of the control.")] = 10.0,
    seeds: Annotated[int, typer.Option(help="Seeds of each prompt of the small world.")] = SEEDS,
    control_seeds: Annotated[int, typer.Option(help="Seeds of each preset of the control.")] = CONTROL_SEEDS,
) -> None:
    """Run the study and print its table."""
    world = Part("tinyworld", TinyWorld.examples, ("--seeds", str(seeds), "--metrics", ",".join(WORLD_METRICS)))
    results = {world.name: world.run(out, seconds)}
    for preset in CONTROLS:
        part = Part(f"wan-tiny-{preset}", ("a boat on a lake",), (
            "--model", "wan-tiny", "--preset", preset, "--size", "64x64", "--seeds", str(control_seeds), "--metrics",
            ",".join(name for name in WORLD_METRICS if not name.startswith("tinyworld")),
        ))  # fmt: skip
        results[part.name] = part.run(out, control_seconds)
    print(table(results))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
