"""`inferix graph`: what a block of a model and a preset runs, with no weights and no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ..errors import UsageError, nearest
from ..models.wan.spec import MODELS
from ..models.wan.transformer import PRECISIONS
from ..runtime.config import DTYPES, check_choice
from ..runtime.presets import default_preset, make_preset
from .generate import parse_settings, parse_size

DEFAULT_MODEL = "wan-1.3b"


def graph(
    model: str | None = typer.Option(None, help=f"Name of the model.  [default: the preset's, or {DEFAULT_MODEL}]"),
    preset: str | None = typer.Option(None, help="Named scheme.  [default: the model's own, or self-forcing]"),
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size.  [default: the model's]"),
    dtype: str = typer.Option("bfloat16", help="Of weights and activations: float32, bfloat16, float16."),
    precision: str = typer.Option("reference", help=f"Where a pass computes in more: {', '.join(PRECISIONS)}."),
    sessions: int = typer.Option(1, min=1, help="Streams side by side in one pass."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Setting of the preset; repeatable."),
    with_: list[str] = typer.Option([], "--with", metavar="REWRITE", help="Do this rewrite too; repeatable."),
    without: list[str] = typer.Option([], metavar="REWRITE", help="Leave this rewrite out, or all; repeatable."),
    lowp: str | None = typer.Option(None, help="Linear layers in fp8 or int8; the same as --with lowp."),
    layers: list[str] = typer.Option([], metavar="PATTERN", help="Layers of --lowp; repeatable.  [default: blocks.*]"),
    keep: list[str] = typer.Option([], metavar="PATTERN", help="Layers that --lowp leaves as they are; repeatable."),
    only: str | None = typer.Option(None, "--pass", metavar="NAME", help="One pass, call by call, as 'denoise 0'."),
    svg: Path | None = typer.Option(None, metavar="FILE", help="Draw it."),
    as_json: bool = typer.Option(False, "--json", help="The whole graph as one JSON line on stdout."),
    rewrites: bool = typer.Option(False, "--rewrites", help="List the rewrites, in order, and do nothing else."),
) -> None:
    """Show the passes of a block as a graph: what runs when, what each call computes and moves, what each rewrite did.

    The model is traced with weights that have shapes alone, so any size will do. To see what a rewrite is worth,
    leave it out.

    Example: inferix graph --model wan-1.3b --preset self-forcing --svg block.svg

    Example: inferix graph --preset longlive --without adaln --without gelu

    Example: inferix graph --preset krea --lowp fp8 --keep 'blocks.0.*' --pass commit
    """
    from ..graphs.rewrites import REWRITES, chosen, rewritten
    from ..graphs.rewrites.lowp import PrecisionMap
    from ..graphs.validate import validate
    from ..runtime.block_graph import build_block_graph

    if rewrites:
        for rewrite in REWRITES.values():
            typer.echo(f"{rewrite.name:<14}{'on ' if rewrite.default else 'off'}  {rewrite.claim}")
        return
    if model is not None and model not in MODELS:
        known = f"graph knows models by name: {', '.join(MODELS)}"
        raise UsageError(f"--model is {model!r}{nearest(model, MODELS)}; {known}")
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--precision", precision, PRECISIONS)
    scheme = make_preset(preset or default_preset(model or DEFAULT_MODEL), **parse_settings(settings))
    spec = MODELS[model or (scheme.about.base if preset else DEFAULT_MODEL)]
    if lowp is None and (layers or keep):
        raise UsageError(f"{'--layers' if layers else '--keep'} says which layers --lowp takes; give --lowp as well")
    asked = [*with_, *(["lowp"] if lowp is not None and "lowp" not in with_ else [])]
    left_out = [name for name in REWRITES if name not in asked] if "all" in without else without
    names = chosen(asked, left_out)
    packed = PrecisionMap(lowp or "fp8", tuple(layers) or ("blocks.*",), tuple(keep))

    pictures = parse_size(size) if size else None
    fuse = "fuse-commit" in names
    traced = build_block_graph(spec, scheme, pictures, DTYPES[dtype], "cpu", precision, sessions, fuse_commit=fuse)
    block = rewritten(traced, names, packed)
    validate(block)
    if only is not None and only not in {found.name for found in block.graphs}:
        there = ", ".join(repr(found.name) for found in block.graphs)
        raise UsageError(f"--pass is {only!r}; this block has {there}")
    if svg is not None:
        from ..graphs.svg import svg as drawn

        write_text(svg, drawn(block))
    if as_json:
        from ..graphs.dump import to_dict

        typer.echo(json.dumps(to_dict(block)))
    else:
        from ..graphs.text import text

        typer.echo(text(block, only))


def write_text(path: Path, content: str) -> None:
    """Write a file whole or not at all; UsageError if there is no such folder."""
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(content, "utf-8")
    unfinished.replace(path)
