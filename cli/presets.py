"""The presets as `inferix generate --list-presets` tells them: how each decodes, what it needs, where weights are."""

from __future__ import annotations

import sys
from functools import partial

import typer
from rich.console import Console
from rich.table import Table

from ..runtime.byte_sizes import format_bytes
from ..runtime.capacity import planner
from ..schemes.page_needs import window
from ..schemes.presets import PRESETS
from .plan import workload

WIDTH = 100  # columns where the output is no terminal


def tell_presets(wanted: bool) -> None:
    """Print the presets and end."""
    if not wanted:
        return
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
        "block, window and sink in latent frames; passes of a block once the window is full; needs: one session in "
        "bfloat16 at the model's own size, text encoder and decoder included (inferix plan --preset NAME has it in "
        "parts). Weights may have a licence of their own.",
        highlight=False,
    )
    raise typer.Exit
