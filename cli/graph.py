"""`inferix graph`: what a block of a model and a preset runs, with no weights and no GPU; and graphs on disk."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..errors import UsageError, nearest, quoted
from ..models.wan.spec import MODELS
from ..models.wan.transformer import PRECISIONS
from ..runtime.config import DTYPES, EVERY_BLOCK, check_choice, check_device, default_device, default_dtype
from ..runtime.files import check_output, check_paths, write_atomically
from ..runtime.kv.page_store import KV_DTYPES
from ..schemes.presets import default_preset, make_preset
from .generate import parse_settings, parse_size

if TYPE_CHECKING:
    from ..graphs.lowered import Lowered
    from ..runtime.programs.graph_builder import GraphBuilder, GraphKey

DEFAULT_MODEL = "wan-1.3b"


def graph(
    model: str | None = typer.Option(None, help=f"Name of the model.  [default: the preset's, or {DEFAULT_MODEL}]"),
    preset: str | None = typer.Option(None, help="Named scheme.  [default: the model's own, or self-forcing]"),
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size.  [default: the model's]"),
    dtype: str | None = typer.Option(
        None, help="Of weights and activations.  [default: bfloat16; with --save and --load what suits --device]"
    ),
    kv_dtype: str | None = typer.Option(None, help="Of KV pages, such as fp8 or int8.  [default: as --dtype]"),
    precision: str = typer.Option("reference", help=f"Where a pass computes in more: {', '.join(PRECISIONS)}."),
    sessions: int = typer.Option(1, min=1, help="Streams side by side in one pass."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Setting of the preset; repeatable."),
    with_: list[str] = typer.Option([], "--with", metavar="REWRITE", help="Do this rewrite too; repeatable."),
    without: list[str] = typer.Option([], metavar="REWRITE", help="Leave this rewrite out, or all; repeatable."),
    lowp: str | None = typer.Option(None, help="Linear layers in fp8 or int8; the same as --with lowp."),
    layers: list[str] = typer.Option([], metavar="PATTERN", help="Layers of --lowp; repeatable.  [default: blocks.*]"),
    keep: list[str] = typer.Option([], metavar="PATTERN", help="Layers that --lowp leaves as they are; repeatable."),
    only: str | None = typer.Option(None, "--pass", metavar="NAME", help="One pass, call by call, as 'denoise 0'."),
    plan: bool = typer.Option(False, "--plan", help="Where scratch lies: the arena, and what holds its peak."),
    svg: Path | None = typer.Option(None, metavar="FILE", help="Draw it."),
    as_json: bool = typer.Option(False, "--json", help="The whole graph as one JSON line on stdout."),
    rewrites: bool = typer.Option(False, "--rewrites", help="List the rewrites, in order, and do nothing else."),
    save: Path | None = typer.Option(
        None, metavar="DIR", help="Store the graphs of a whole stream, for generate --graphs DIR."
    ),
    load: Path | None = typer.Option(None, metavar="DIR", help="Read stored graphs, as generate would, and tell them."),
    device: str | None = typer.Option(None, help="Of --save and --load.  [default: cuda if there is one, else cpu]"),
) -> None:
    """Show the passes of a block as a graph: what runs when, what each call computes and moves, what each rewrite did.

    The model is traced with weights that have shapes alone, so any size will do. To see what a rewrite is worth,
    leave it out.

    --save makes all graphs that a stream asks for, from its first block to a full window and a new prompt, and stores
    them in a folder, which is for one model, preset, precision, card and set of versions: a run with --graphs DIR then
    traces nothing. --load reads them back, and refuses them if they are for another model or preset than those named.

    Example: inferix graph --model wan-1.3b --preset self-forcing --svg block.svg

    Example: inferix graph --preset longlive --without adaln --without gelu

    Example: inferix graph --preset krea --lowp fp8 --keep 'blocks.0.*' --pass recompute

    Example: inferix graph --model tinyworld --save graphs/ && inferix generate --executor fused --graphs graphs/
    """
    from ..graphs.lowered import lower_block
    from ..graphs.rewrites import REWRITES, chosen, rewritten
    from ..graphs.rewrites.lowp import PrecisionMap
    from ..graphs.validate import validate
    from ..runtime.programs.block_graph import build_block_graph
    from ..runtime.programs.graph_builder import GraphBuilder
    from ..runtime.programs.graph_store import stored_for

    if rewrites:
        for rewrite in REWRITES.values():
            typer.echo(f"{rewrite.name:<14}{'on ' if rewrite.default else 'off'}  {rewrite.claim}")
        return
    if model is not None and model not in MODELS:
        known = f"graph knows models by name: {', '.join(MODELS)}"
        raise UsageError(f"--model is {model!r}{nearest(model, MODELS)}; {known}")
    if svg is not None:
        if not svg.parent.is_dir():
            raise UsageError(f"cannot write {quoted(str(svg))}: there is no folder {quoted(str(svg.parent))}")
        check_paths({"--load": load}, {"--svg": svg})
        check_output(svg)
    stored = save or load
    if device is not None and stored is None:
        raise UsageError(f"--device is {device!r}, which stored graphs are for; give --save or --load as well")
    device = device or default_device()
    if load is not None and model is None and preset is None:  # whatever the folder is for
        model, preset = stored_for(load)
    dtype = dtype or (default_dtype(device) if stored else "bfloat16")
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--kv-dtype", kv_dtype or dtype, dict.fromkeys((dtype, *KV_DTYPES)))
    check_choice("--precision", precision, PRECISIONS)
    kept = None if kv_dtype in (None, dtype) else KV_DTYPES[kv_dtype]
    scheme = make_preset(preset or default_preset(model or DEFAULT_MODEL), **parse_settings(settings))
    spec = MODELS[model or (scheme.about.base if preset else DEFAULT_MODEL)]
    if lowp is None and (layers or keep):
        raise UsageError(f"{'--layers' if layers else '--keep'} says which layers --lowp takes; give --lowp as well")
    asked = [*with_, *(["lowp"] if lowp is not None and "lowp" not in with_ else [])]
    left_out = [name for name in REWRITES if name not in asked] if "all" in without else without
    names = chosen(asked, left_out)
    packed = PrecisionMap(lowp or "fp8", tuple(layers) or EVERY_BLOCK, tuple(keep))
    pictures = parse_size(size) if size else None
    if stored is not None:
        check_device(device)
        shown = {"--pass": only, "--svg": svg, "--json": as_json, "--sessions": sessions > 1}
        changed = {"--with": with_, "--without": without}
        if unfit := [option for option, given in (shown | changed).items() if given]:
            raise UsageError(f"{unfit[0]} is for a graph that is shown, not for what an engine runs; leave it out")
        if save is not None and load is not None:
            raise UsageError("--save makes graphs and --load reads them; give one of them")
        low = packed if lowp is not None else None
        graphs = GraphBuilder(spec, scheme, precision, DTYPES[dtype], device, tuple(names), low, kept)
        tell_stored(graphs, pictures or spec.default_size, stored, save is not None, plan)
        return
    if plan and (only is not None or as_json):
        raise UsageError(f"--plan prints where scratch lies; leave {'--json' if as_json else '--pass'} out")
    fuse = "fuse-commit" in names
    told = (spec, scheme, pictures, DTYPES[dtype], "cpu", precision, sessions)
    traced = build_block_graph(*told, fuse_commit=fuse, kv_dtype=kept)
    block = rewritten(traced, names, packed)
    validate(block)
    if only is not None and only not in {found.name for found in block.graphs}:
        there = ", ".join(repr(found.name) for found in block.graphs)
        raise UsageError(f"--pass is {only!r}; this block has {there}")
    if svg is not None:
        from ..graphs.show.svg import svg as drawn

        picture = drawn(block)
        write_atomically(svg, lambda part: part.write_text(picture, "utf-8"))
    if as_json:
        from ..graphs.show.plain import to_dict

        typer.echo(json.dumps(to_dict(block)))
    elif plan:
        typer.echo("\n\n".join(told_plan(lower_block(block))))
    else:
        from ..graphs.show.text import text

        typer.echo(text(block, only))


def tell_stored(graphs: GraphBuilder, size: tuple[int, int], folder: Path, make: bool, plan: bool) -> None:
    """Fill a folder with the graphs of a stream, or only open it, and say what is there."""
    import torch

    from ..runtime.programs.graph_store import GraphStore, card_of
    from ..runtime.programs.warmup import graph_keys

    wanted = graph_keys(graphs.spec, graphs.preset, size, graphs.kv_dtype is not None) if make else []
    store = GraphStore.open(folder, graphs, create=make)
    made = store.fill(graphs, wanted)
    programs = store.programs()
    dtype, card = str(graphs.dtype).removeprefix("torch."), card_of(torch.device(graphs.device))
    count = f"{len(programs)} graph{'s' * (len(programs) != 1)}"
    typer.echo(
        f"{count} in {folder}{f', {made} of them new' if make else ''}: {graphs.spec.name}, preset "
        f"{graphs.preset.name}, {dtype}, for {card}"
    )
    for key, lowered in programs:
        typer.echo(f"  {describe_key(key)}: {len(lowered.body.program.calls)} calls")
        if plan:
            typer.echo(textwrap.indent("\n".join(told_plan(lowered)), "    "))


def describe_key(key: GraphKey) -> str:
    """What a stored graph is for."""
    channels, height, width = key.latent[1:]
    groups = " + ".join(f"{rows} x {each}" if rows > 1 else f"{each}" for rows, each in key.parts)
    kind = "block" if key.whole else "pass"
    return f"{kind} of {groups} frames of {channels}x{height}x{width}, {key.pages} pages in the store"


def told_plan(lowered: Lowered) -> list[str]:
    """Where the scratch of each of its programs lies."""
    parts = {"block": lowered.body, "prompt": lowered.prompt, "fold": lowered.fold}
    return [f"{name}: {part.plan.text(part.program)}" for name, part in parts.items() if part is not None]


