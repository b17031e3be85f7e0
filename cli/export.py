"""`inferix export`: a model under a preset as a folder of programs for another runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError, quoted
from ..export.targets import FEATURES, TARGETS, presets_of
from .options import FORCE, NAMES, OFFLINE, PRESET, UNTRAINED, check_settings, parse_settings, parse_size

WIDTH = 100  # columns where the output is no terminal


def print_targets(value: bool) -> None:
    """Print what each target can, and exit."""
    if not value:
        return
    from ..models.registry import PRESETS

    table = Table("feature", *TARGETS, "used by", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for feature, use in FEATURES.items():
        table.add_row(feature, *("yes" if feature in target.can else "-" for target in TARGETS.values()), use)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table, "")
    for name, target in TARGETS.items():
        console.print(f"{name}: presets {', '.join(presets_of(target, PRESETS))}; {target.history}", highlight=False)
    raise typer.Exit


def export(
    ctx: typer.Context,
    model: str | None = typer.Option(
        None, help=f"As of generate.  [default: tinyworld, or {UNTRAINED} with --preset]"
    ),
    base: str | None = typer.Option(None, help="Folder with VAE and text encoder, or org/name, if not with the model."),
    vae: str | None = typer.Option(None, help="Decoder: a file or folder, or taehv for the tiny one."),
    text_encoder: str | None = typer.Option(None, help="Text encoder file or folder, if not with model or base."),
    lora: str | None = typer.Option(None, help="LoRA adapter, file or folder, merged into the weights."),
    lora_scale: float = typer.Option(1.0, help="Factor of the adapter's weights."),
    preset: str | None = PRESET,
    names: Path | None = NAMES,
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size.  [default: the model's]"),
    target: str = typer.Option("onnx", help=f"Format of the programs: {', '.join(TARGETS)}."),
    out: Path | None = typer.Option(None, help="Folder to write; it must be new or empty."),
    cache: bool = typer.Option(
        False, "--cache", help="Write to the cache, not --out; generate and play run it on a CPU if it is faster.",
    ),
    dtype: str = typer.Option("float32", help="Of the stored weights: float32 or float16; passes are in float32."),
    kv_dtype: str = typer.Option("float32", help="Of keys and values: float32, or int8 where the target has it."),
    lowp: str | None = typer.Option(None, help="Of linear layers: int8, where the target has it."),
    unroll: bool = typer.Option(False, "--unroll", help="Write one program more, with all steps of a block."),
    prefixes: bool = typer.Option(
        False, "--prefixes", help="Write the encoder too, for streams that begin with an image or a video."
    ),
    prompt: Path | None = typer.Option(
        None, metavar="FILE", help="Prompts that the engine can follow, one a line, instead of a text encoder."
    ),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Setting of the preset; repeatable."),
    list_targets: bool = typer.Option(
        False, "--list", callback=print_targets, is_eager=True, help="Show what each target can."
    ),
    offline: bool = OFFLINE,
    force: bool = FORCE,
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Write an engine: programs, weights and plan.json in one folder, which inferix-run plays without torch.

    The small world takes its words along; other engines have the prompts of --prompt, or the default prompt.

    Example: inferix export --out world

    Example: inferix export --lowp int8 --out world-int8

    Example: inferix export --cache

    Example: inferix export --model tiny/ --preset self-forcing --prompt prompts.txt --size 64x64 --out engine
    """
    from ..export.engine_folder import export_engine, read_prompts
    from ..export.plan import FILE, read_plan

    if cache:
        needless: dict[str, object] = {"--out": out, "--base": base, "--vae": vae, "--text-encoder": text_encoder}
        needless |= {"--lora": lora, "--names": names, "--prompt": prompt, "--set": settings or None}
        needless |= {"--unroll": unroll or None, "--target": None if target == "onnx" else target}
        needless |= {"--dtype": None if dtype == "float32" else dtype}
        needless |= {"--kv-dtype": None if kv_dtype == "float32" else kv_dtype, "--lowp": lowp}
        if wrong := [flag for flag, value in needless.items() if value is not None]:
            raise UsageError(f"--cache takes a model, preset and size as they are; leave {wrong[0]} out")
        return export_to_cache(model, preset, parse_size(size) if size else None, as_json)
    if out is None:
        raise UsageError("--out is missing; give the folder to write, or --cache")
    overrides = parse_settings(settings)
    check_settings(ctx, overrides)
    parts = {"base": base, "vae": vae, "text_encoder": text_encoder, "lora": lora, "names": names}
    given = {key: value for key, value in (parts | {"lowp": lowp}).items() if value is not None}
    folder = export_engine(
        model, preset, out=out, target=target, size=parse_size(size) if size else None, dtype=dtype, unroll=unroll,
        kv_dtype=kv_dtype, prefixes=prefixes, prompts=read_prompts(prompt) if prompt else (), lora_scale=lora_scale,
        offline=offline, force=force, progress=lambda line: typer.echo(line, err=True), **given, **overrides,
    )  # fmt: skip
    plan = read_plan(folder)
    programs, size_bytes = list(plan["programs"]), sum(facts["bytes"] for facts in plan["files"].values())
    if as_json:
        facts = {"out": str(folder), "plan": str(folder / FILE), "programs": programs, "bytes": size_bytes}
        typer.echo(json.dumps(facts))
    else:
        typer.echo(f"wrote {quoted(folder)}: {', '.join(programs)}; {size_bytes / 1e6:.1f} MB")


def export_to_cache(model: str | None, preset: str | None, size: tuple[int, int] | None, as_json: bool) -> None:
    from ..export.engine_cache import make_cached

    made = make_cached(model, preset, size, lambda line: typer.echo(line, err=True))
    if as_json:
        facts = {"out": str(made.folder), "seconds": dict(made.seconds), "speedup": made.speedup}
        return typer.echo(json.dumps(facts))
    eager, exported = made.seconds["eager"], made.seconds["exported"]
    used = "generate and play run it on a CPU" if made.speedup > 1 else "it is not used, since it is no faster"
    typer.echo(f"{quoted(made.folder)}: {exported:.3f} s a block, the model itself {eager:.3f} s; {used}")
