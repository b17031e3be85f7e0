"""The table of `inferix generate --list-presets`: decoding scheme, memory and weights of each preset."""

from __future__ import annotations

import sys
from functools import partial

import typer
from rich.console import Console
from rich.table import Table

from ..runtime.byte_sizes import format_bytes
from ..schemes.page_needs import window

WIDTH = 100  # columns where the output is no terminal


def print_presets(value: bool) -> None:
    """Print the presets and exit."""
    if not value:
        return
    from ..models.registry import PRESETS
    from ..runtime.capacity import planner
    from .plan_report import workload

    narrow = partial(Table, box=None, pad_edge=False, padding=(0, 2, 0, 0))  # fits 80 columns
    scheme = narrow("preset", "for", "block", "window", "sink", "steps", "passes", "needs")
    for column in scheme.columns[2:]:
        column.justify = "right"
    weights = narrow("preset", "weights", "code licence")
    weights.columns[1].no_wrap = True
    for name, preset in PRESETS.items():
        load = workload(None, name, None, 1, "bfloat16", None, None, None, True, {})
        steady = planner.steady_blocks(preset)[0]
        scheme.add_row(
            name, load.spec.name, str(preset.num_frame_per_block), str(window(preset)),
            str(preset.context.sink_size), str(preset.sampler.steps), str(len(steady.passes)),
            format_bytes(planner.needed(load)),
        )  # fmt: skip
        weights.add_row(name, preset.about.weights, preset.about.licence)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(scheme, "", weights, "")
    console.print(
        "block, window and sink: latent frames. passes: per block at a full window. needs: memory of one session in "
        "bfloat16 at the model's default size, with text encoder and decoder (inferix plan --preset NAME splits it). "
        "Weights may have another licence than the code.",
        highlight=False,
    )
    raise typer.Exit
