"""`inferix checkpoint`: write a random checkpoint, or say what one holds."""

from __future__ import annotations

import json
from pathlib import Path

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def checkpoint() -> None:
    """Write random checkpoints and look into existing ones.

    Example: inferix checkpoint inspect model.safetensors
    """


@app.command()
def random(
    destination: Path = typer.Argument(..., metavar="DST", help="File or folder to write."),
    spec: str = typer.Option(..., help="Name of the model's sizes, such as wan-tiny."),
    format: str = typer.Option(..., help="Layout of the checkpoint, such as diffusers."),
    seed: int = typer.Option(0, help="Seed of the weights."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
) -> None:
    """Write a checkpoint of random weights, to test loaders and tools without a download.

    Example: inferix checkpoint random --spec wan-tiny --format diffusers tiny/
    """
    from ..export.checkpoint import write_random

    write_random(spec, format, destination, seed, dtype)
    typer.echo(f"wrote {destination}: {spec}, random weights, format {format}, {dtype}, seed {seed}")


@app.command()
def inspect(
    path: Path = typer.Argument(..., help="Checkpoint file or folder."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line instead of text."),
) -> None:
    """Say which model a checkpoint holds, without loading its weights.

    Example: inferix checkpoint inspect tiny/ --json
    """
    from ..models.wan.checkpoint import inspect as read_facts

    facts = read_facts(path)
    if as_json:
        typer.echo(json.dumps(facts, default=str))
        return
    for key, value in facts.items():
        typer.echo(f"{key}: {value}")
