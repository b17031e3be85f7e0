"""`inferix checkpoint`: write random checkpoints, convert checkpoints, describe one."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import typer

from .help import Command, group

app = group()


@app.callback()
def checkpoint() -> None:
    """Write, convert and inspect checkpoints.

    Example: inferix checkpoint inspect tiny/
    """


@app.command(cls=Command)
def random(
    destination: Path = typer.Argument(..., metavar="DST", help="File or folder to write."),
    spec: str = typer.Option(..., help="Name of the model's sizes, such as wan-tiny or wan-1.3b."),
    format: str = typer.Option(..., help="original, diffusers, or as published: self-forcing, krea, magi, ..."),
    seed: int = typer.Option(0, help="Seed of the weights."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
) -> None:
    """Write a checkpoint of random weights, to test loaders and tools without a download.

    Example: inferix checkpoint random --spec wan-tiny --format diffusers tiny/
    """
    from ..export.checkpoint import write_random

    write_random(spec, format, destination, seed, dtype)
    typer.echo(f"wrote {destination}: {spec}, random weights, format {format}, {dtype}, seed {seed}")


@app.command(cls=Command)
def convert(
    source: Path = typer.Argument(..., metavar="SRC", help="Checkpoint file or folder, in any format."),
    destination: Path = typer.Argument(..., metavar="DST", help="Folder to write."),
    format: str = typer.Option("diffusers", help="original or diffusers."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16.  [default: the file's]"),
    lora: Path | None = typer.Option(None, help="LoRA adapter to merge, file or folder."),
    lora_scale: float = typer.Option(1.0, help="Factor of the adapter's weights."),
    lora_partial: bool = typer.Option(False, "--lora-partial", help="Merge an adapter that fits only in part."),
    max_shard_gb: float = typer.Option(5.0, help="Largest file, in 10^9 bytes."),
) -> None:
    """Write a checkpoint as safetensors with a config.

    A VAE and a text encoder beside the transformer are converted too.

    Example: inferix checkpoint convert tiny/ tiny-original/ --format original --dtype bfloat16
    """
    from ..export.checkpoint import convert as write

    shard = int(max_shard_gb * 1e9) if math.isfinite(max_shard_gb) else 0
    progress = partial(typer.echo, err=True)
    write(source, destination, format, dtype, lora, lora_scale, shard, progress, lora_partial)
    typer.echo(f"wrote {destination}: {source} in format {format}")


@app.command(cls=Command)
def inspect(
    path: Path = typer.Argument(..., help="Checkpoint file or folder."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line instead of text."),
) -> None:
    """Show format, model, sizes and parts of a checkpoint, without loading it.

    Example: inferix checkpoint inspect tiny/ --json
    """
    from ..models.registry import inspect as read_facts

    facts = read_facts(path)
    if as_json:
        typer.echo(json.dumps(facts, default=str))
        return
    for key, value in facts.items():
        typer.echo(f"{key}: {value}")
