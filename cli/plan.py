"""`inferix plan`: memory and a lower bound of the time of streams, before a model is downloaded or loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import typer

from ..errors import UsageError, quoted
from ..runtime.capacity.gpus import CARDS
from ..runtime.executor_specs import EXECUTORS, default_executor
from .options import DEFAULT_MODEL, NAMES, PRESET, check_settings, parse_settings

LINK, GOAL = "nvlink", "latency"

def plan(
    ctx: typer.Context,
    model: str | None = typer.Option(
        None, help=f"Name of a model, or a checkpoint.  [default: the preset's, or {DEFAULT_MODEL}]"
    ),
    preset: str | None = PRESET,
    names: Path | None = NAMES,
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size.  [default: the model's]"),
    memory: str | None = typer.Option(None, help="Available memory, such as 24GB (10^9 bytes) or 22GiB (2^30)."),
    gpu: str | None = typer.Option(None, help=f"A known card, for memory and speed: {', '.join(CARDS)}."),
    gpus: int | None = typer.Option(None, metavar="N", help="Compare the layouts of this many GPUs; needs --gpu."),
    link: str | None = typer.Option(
        None,
        help="With --gpus: link between them, nvlink, pcie, nodes (between machines), or a JSON file of a measured "
        f"one.  [default: {LINK}]",
    ),
    measured: Path | None = typer.Option(
        None, help="With --gpus: file of inferix bench parallel --model, whose times replace predicted ones."
    ),
    goal: str | None = typer.Option(
        None, help=f"With --gpus: latency of one stream, or throughput of all.  [default: {GOAL}]"
    ),
    sessions: int = typer.Option(1, help="Streams at a time."),
    dtype: str = typer.Option("bfloat16", help="Of weights and activations: float32, bfloat16, float16."),
    kv_dtype: str | None = typer.Option(None, help="Of KV pages, such as fp8 or int8.  [default: as --dtype]"),
    executor: str | None = typer.Option(None, help=f"{', '.join(EXECUTORS)}.  [default: {default_executor('cuda')}]"),
    vae: str | None = typer.Option(None, help="taehv for the tiny decoder.  [default: the model's own VAE]"),
    text_encoder: bool = typer.Option(
        True, "--text-encoder/--no-text-encoder", help="Prompts as text, or as embeddings from a file."
    ),
    tflops: float | None = typer.Option(None, help="Ceiling of matrix products, in TFLOP/s, for example measured."),
    bandwidth: float | None = typer.Option(None, help="Ceiling of memory traffic, in GB/s."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Setting of the preset; repeatable."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
    table: bool = typer.Option(False, "--table", help="Print the tables of docs/plan.md instead."),
) -> None:
    """Show the memory that streams need and a lower bound of their time, without loading a model.

    Memory is split into weights, needed once, and pages, decoder state and latents, needed per session. Without
    --memory or --gpu only the requirement is shown; with one of them, also the number of sessions that fit, the longest
    window and, if it does not fit (exit code 1), what to change. Times are lower bounds from operations and bytes at
    the maker's figures of the GPU: predictions, not measurements.

    Example: inferix plan --preset longlive --gpu rtx-4090

    Example: inferix plan --model wan-14b --preset longlive --memory 141GB --sessions 2 --vae taehv

    Example: inferix plan --preset self-forcing --gpus 8 --gpu h200 --goal latency

    Example: inferix plan --preset longlive --gpu h200 --tflops 790 --bandwidth 4300
    """
    from ..runtime.config import FP8_CAPABILITY
    from . import plan_report as report

    if table:
        typer.echo("\n\n".join(report.tables()))
        return
    of_layouts = {"--link": link, "--measured": measured, "--goal": goal}
    if gpus is None and (given := [option for option, value in of_layouts.items() if value is not None]):
        value = quoted(str(of_layouts[given[0]]))
        raise UsageError(f"{given[0]} is {value} without --gpus, whose layouts it is for; give --gpus")
    overrides = parse_settings(settings)
    check_settings(ctx, overrides)
    load = report.workload(
        model, preset, size, sessions, dtype, kv_dtype, executor, vae, text_encoder, overrides, names
    )
    card = report.known_card(gpu) if gpu is not None else None
    if card is not None and card.capability < FP8_CAPABILITY:
        if kv_dtype == "fp8":
            raise UsageError(f"--kv-dtype is 'fp8', which {card.name} has no support for; use int8")
        load = replace(load, narrow="int8")
    budget = report.parse_memory(memory) if memory else card.memory_gb * 10**9 if card else None
    facts = report.describe(load, budget, report.ceiling(card, tflops, bandwidth, load.dtype))
    if gpus is not None:
        if budget is None:
            raise UsageError(f"--gpus is {gpus} without a card; give --gpu, one of {', '.join(CARDS)}")
        facts["ranks"] = report.describe_ranks(
            load, gpus, budget, report.ceiling(card, tflops, bandwidth, load.dtype), link or LINK, goal or GOAL,
            measured, gpu,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        report.print_plan(load, facts)
    if facts["fits"] is False and gpus is None:
        raise typer.Exit(1)
