"""`inferix graph`: show the graph of a model's block without weights or a GPU; store graphs on disk."""

from __future__ import annotations

import json
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InferixError, UsageError, quoted
from ..runtime.files import check_output, check_paths, write_atomically
from ..schemes.layouts import AUTO, MOST_RANKS, choose_layout
from .options import DEFAULT_MODEL, NAMES, PARALLEL, PRESET, check_settings, parse_settings, parse_size

if TYPE_CHECKING:
    from ..bench.time_model import Rates
    from ..graphs.lowered import Lowered
    from ..graphs.types import BlockGraph
    from ..runtime.programs.block_graph import BlockGraphBuilder
    from ..runtime.programs.graph_builder import GraphBuilder, GraphKey
    from ..schemes.presets import Preset


def graph(
    ctx: typer.Context,
    model: str | None = typer.Option(
        None, help=f"Name of a model, or a checkpoint.  [default: the preset's, or {DEFAULT_MODEL}]"
    ),
    preset: str | None = PRESET,
    names: Path | None = NAMES,
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size.  [default: the model's]"),
    dtype: str | None = typer.Option(
        None, help="Of weights and activations.  [default: bfloat16; with --save and --load the device's default]"
    ),
    kv_dtype: str | None = typer.Option(None, help="Of KV pages, such as fp8 or int8.  [default: as --dtype]"),
    precision: str = typer.Option("reference", help="Parts of a pass in wider dtypes: reference, diffusers."),
    sessions: int = typer.Option(1, min=1, help="Sessions batched in one pass; with --save 1, 2, 4 ... up to this."),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Setting of the preset; repeatable."),
    with_: list[str] = typer.Option([], "--with", metavar="REWRITE", help="Also apply this rewrite; repeatable."),
    without: list[str] = typer.Option([], metavar="REWRITE", help="Skip this rewrite, or all; repeatable."),
    lowp: str | None = typer.Option(None, help="Linear layers in fp8 or int8; the same as --with lowp."),
    layers: list[str] = typer.Option([], metavar="PATTERN", help="Layers of --lowp; repeatable.  [default: blocks.*]"),
    keep: list[str] = typer.Option([], metavar="PATTERN", help="Layers that --lowp skips; repeatable."),
    only: str | None = typer.Option(None, "--pass", metavar="NAME", help="Show one pass call by call, as 'denoise 0'."),
    plan: bool = typer.Option(False, "--plan", help="Show the buffer plan: the arena and the buffers at its peak."),
    svg: Path | None = typer.Option(None, metavar="FILE", help="Draw the graph to an SVG file."),
    as_json: bool = typer.Option(False, "--json", help="The whole graph as one JSON line on stdout."),
    rewrites: bool = typer.Option(False, "--rewrites", help="List the rewrites in order and exit."),
    save: Path | None = typer.Option(
        None, metavar="DIR", help="Store the graphs of a whole stream, for generate --graphs DIR."
    ),
    load: Path | None = typer.Option(None, metavar="DIR", help="Read stored graphs, as generate would, and list them."),
    dry_run: str | None = typer.Option(
        None, "--dry-run", metavar="cuda:ARCH", help="Run the block on fake tensors of a GPU, such as cuda:90."
    ),
    gpus: int = typer.Option(1, min=1, max=MOST_RANKS, metavar="N", help="The graph of one of this many ranks."),
    parallel: str | None = PARALLEL,
    captured: bool = typer.Option(
        False, "--captured", help="On a GPU: capture a stream's graphs and compare their nodes with the calls."
    ),
    compiled: bool = typer.Option(True, "--compile/--no-compile", help="Compile the kernels of --dry-run."),
    vae: str | None = typer.Option(None, help="Decoder of --dry-run: taehv, or none.  [default: the model's own]"),
    assume: list[str] = typer.Option(
        [], metavar="KEY=VALUE", help="Constant of the time model of --dry-run, such as attention=600; repeatable."
    ),
    device: str | None = typer.Option(None, help="For --save and --load.  [default: cuda if there is one, else cpu]"),
) -> None:
    """Show the passes of a block as a graph: its calls in order, their cost, and the effect of each rewrite.

    The model is traced on the meta device, so no weights are needed and every size works. To see the effect of a
    rewrite, skip it with --without.

    --save makes all graphs that a stream needs, from its first block to a full window and a new prompt, and stores them
    in a folder for one model, preset, precision, GPU and set of versions. A run with --graphs DIR then traces nothing.
    --load reads them back and refuses graphs for another model or preset than the named one.

    --dry-run launches the block on fake tensors of a GPU of compute capability ARCH / 10, on any machine: each op takes
    the form of such a card, and its kernels are compiled with the block's own arguments. It prints calls, allocations,
    FLOPs and bytes by kind of work, a time predicted by a stated model, and what a CUDA graph could not capture, with
    exit code 1 if there is anything.

    --captured runs a stream with random weights on a GPU until its window is full, reads each captured CUDA graph
    through cuda-bindings and compares it with its program: a kernel that is missing or in another place, an extra copy,
    a kernel on memory that its call does not touch. Exit code 1 if there is any:
    inferix graph --model wan-1.3b --preset self-forcing --captured.

    Example: inferix graph --model wan-tiny --preset self-forcing --svg block.svg

    Example: inferix graph --model wan-tiny --preset longlive --without adaln --without gelu

    Example: inferix graph --model wan-tiny --preset krea --lowp fp8 --keep 'blocks.0.*' --pass recompute

    Example: inferix graph --model wan-tiny --dry-run cuda:90 --no-compile --assume attention=600

    Example: inferix graph --preset krea --dry-run cuda:90 --no-compile --gpus 4 --parallel ulysses

    Example: inferix graph --model tinyworld --save graphs/ && inferix generate --executor fused --graphs graphs/
    """
    from ..graphs.cost import PassCost
    from ..graphs.lowered import lower_block
    from ..graphs.rewrites import REWRITES, chosen, rewritten
    from ..graphs.rewrites.lowp import PrecisionMap
    from ..graphs.shards import ALONE
    from ..graphs.validate import validate
    from ..kernels.spec import multiprocessors_of
    from ..models.registry import default_preset, find_spec, make_preset
    from ..models.transformer import PRECISIONS
    from ..runtime.capacity.rank_planner import divided
    from ..runtime.config import DTYPES, EVERY_BLOCK, check_choice, check_device, default_device, default_dtype
    from ..runtime.kv.page_store import KV_DTYPES, padded_width
    from ..runtime.programs.block_graph import BlockGraphBuilder
    from ..runtime.programs.graph_builder import GraphBuilder
    from ..runtime.programs.graph_store import stored_for
    from ..schemes.guidance import ALONE as ALONE_GUIDANCE
    from ..schemes.presets import with_settings

    own = parse_settings(settings)
    check_settings(ctx, own)
    if rewrites:
        for rewrite in REWRITES.values():
            typer.echo(f"{rewrite.name:<14}{'on ' if rewrite.default else 'off'}  {rewrite.claim}")
        return
    if svg is not None:
        if not svg.parent.is_dir():
            raise UsageError(f"cannot write {quoted(str(svg))}: there is no folder {quoted(str(svg.parent))}")
        check_paths({"--load": load}, {"--svg": svg})
        check_output(svg)
    if dry_run is not None:
        from ..bench.dry_run import check_architecture
        from ..bench.time_model import rates_of

        architecture = architecture_of(dry_run)
        check_architecture(architecture)
        rates = rates_of(architecture, {key: str(value) for key, value in parse_settings(assume).items()})
        shown = {"--save": save, "--load": load, "--plan": plan, "--pass": only, "--svg": svg}
        if unfit := [option for option, value in shown.items() if value]:
            raise UsageError(f"--dry-run launches a block and prints what it saw; leave {unfit[0]} out")
        if vae not in (None, "taehv", "none"):
            raise UsageError(f"--vae is {quoted(vae)}; a dry run takes taehv or none, or the model's own without it")
    elif assume or vae is not None or not compiled:
        option = "--assume" if assume else "--vae" if vae is not None else "--no-compile"
        raise UsageError(f"{option} is for --dry-run; give --dry-run cuda:90, too, or leave it out")
    if captured:
        given: dict[str, object] = {"--dry-run": dry_run, "--save": save, "--load": load, "--plan": plan}
        given |= {"--svg": svg, "--pass": only}
        given |= {"--with": with_, "--without": without, "--sessions": sessions > 1, "--gpus": gpus > 1}
        given |= {"--parallel": parallel, "--names": names, "--layers": layers, "--keep": keep}
        given |= {"--precision": precision != "reference", "--device": device}
        if unfit := [option for option, value in given.items() if value]:
            raise UsageError(f"--captured runs a stream as an engine does; leave {unfit[0]} out")
        bits = {"lowp": lowp, "kv_dtype": kv_dtype}
        overrides = own | {key: value for key, value in bits.items() if value}
        print_captured(model, preset, size, dtype, overrides, as_json)
        return
    stored, shard = save or load, ALONE
    if device is not None and stored is None:
        raise UsageError(f"--device is {quoted(device)}, which is only for stored graphs; give --save or --load, too")
    device = device or default_device()
    if load is not None and model is None and preset is None:
        model, preset = stored_for(load)
    dtype = dtype or (default_dtype(device) if stored else "bfloat16")
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--kv-dtype", kv_dtype or dtype, dict.fromkeys((dtype, *KV_DTYPES)))
    check_choice("--precision", precision, PRECISIONS)
    page_dtype = None if kv_dtype in (None, dtype) else KV_DTYPES[kv_dtype]
    scheme = make_preset(preset or default_preset(model or DEFAULT_MODEL), **own)
    spec = find_spec(model or (scheme.about.base if preset else DEFAULT_MODEL), names)
    if stored is None and dry_run is None and (steps := drawn_steps(scheme)) is not None:
        typer.echo(f"{steps} of {scheme.sampler.steps} steps are shown: the others differ in their timesteps", err=True)
        scheme = with_settings(scheme, num_steps=steps)
    if lowp is None and (layers or keep):
        raise UsageError(f"{'--layers' if layers else '--keep'} chooses layers of --lowp; give --lowp as well")
    added = [*with_, *(["lowp"] if lowp is not None and "lowp" not in with_ else [])]
    skipped = [name for name in REWRITES if name not in added] if "all" in without else without
    applied = chosen(added, skipped)
    packed = PrecisionMap(lowp or "fp8", tuple(layers) or EVERY_BLOCK, tuple(keep))
    pictures = parse_size(size) if size else None
    if stored is not None:
        check_device(device)
        shown = {"--pass": only, "--svg": svg, "--json": as_json, "--sessions": sessions > 1 and save is None}
        shown |= {"--gpus": gpus > 1, "--parallel": parallel}
        changed = {"--with": with_, "--without": without}
        if unfit := [option for option, is_set in (shown | changed).items() if is_set]:
            raise UsageError(f"{unfit[0]} changes the shown graph, not stored graphs; leave it out")
        if save is not None and load is not None:
            raise UsageError("--save makes graphs and --load reads them; give one of them")
        low = packed if lowp is not None else None
        graphs = GraphBuilder(
            spec, scheme, precision, DTYPES[dtype], device, tuple(applied), low, page_dtype,
            multiprocessors=multiprocessors_of(device),
        )  # fmt: skip
        print_stored(graphs, pictures or spec.default_size, stored, save is not None, plan, sessions)
        return
    if plan and (only is not None or as_json):
        raise UsageError(f"--plan prints the buffer plan; leave {'--json' if as_json else '--pass'} out")
    if gpus > 1 or parallel is not None:
        from ..bench.dry_run import fake_shard

        counts = divided(spec, pictures or spec.default_size, ALONE_GUIDANCE)  # a block has all branches of guidance
        shard = fake_shard(choose_layout(counts, gpus, parallel or AUTO))
    fuse = "fuse-commit" in applied
    builder = BlockGraphBuilder(
        spec, scheme, pictures, DTYPES[dtype], "cpu", precision, sessions, fuse_commit=fuse, kv_dtype=page_dtype,
        shard=shard,
    )
    multiprocessors = 0
    if dry_run is not None:
        from ..bench.dry_run import MULTIPROCESSORS

        multiprocessors = MULTIPROCESSORS[architecture]
        builder.max_pages = padded_width(builder.max_pages)  # as an engine has its tables
    block = rewritten(builder.build(), applied, packed, multiprocessors)
    validate(block)
    if dry_run is not None:
        print_dry_run(block, builder, architecture, rates, compiled, vae, as_json)
        return
    if only is not None and only not in {graph.name for graph in block.graphs}:
        passes = ", ".join(repr(graph.name) for graph in block.graphs)
        raise UsageError(f"--pass is {quoted(only)}; this block has {passes}")
    costs: list[PassCost] = []
    if svg is not None:
        from ..graphs.show.svg import svg as drawn

        costs = [PassCost(graph) for graph in block.graphs]
        picture = drawn(block, costs)
        write_atomically(svg, lambda part: part.write_text(picture, "utf-8"))
    if as_json:
        from ..graphs.show.plain import to_dict

        typer.echo(json.dumps(to_dict(block)))
    elif plan:
        typer.echo("\n\n".join(format_plans(lower_block(block))))
    else:
        from ..graphs.show.text import text

        typer.echo(text(block, only, costs))


def drawn_steps(preset: Preset) -> int | None:
    """Fewer steps with the same kinds of passes, for a preset of many steps between two joins; None for any other."""
    if preset.window_blocks == 1 or preset.steps_between_joins <= 2 or preset.sampler.has_step_list:
        return None
    return 2 * preset.window_blocks


def architecture_of(device: str) -> int:
    """Compute capability, times ten, of `cuda:90`; UsageError for anything else."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number.isdecimal():
        raise UsageError(f"--dry-run is {quoted(device)}; expected cuda:ARCH, such as cuda:90 for sm_90")
    return int(number)


def print_dry_run(
    block: BlockGraph,
    builder: BlockGraphBuilder,
    architecture: int,
    rates: Rates | None,
    compiled: bool,
    vae: str | None,
    as_json: bool,
) -> None:
    """Run a block and its decoder on fake tensors of a GPU and print the launches; exit code 1 for a fault."""
    from ..bench.dry_run import dry_run, facts, joined, report, run_decoder
    from ..models.registry import family_of

    runs = [dry_run(block, architecture, compiled)]
    if vae != "none":
        family, spec = family_of(builder.spec), builder.spec
        sizes = family.chosen_decoder_spec(spec, vae == "taehv")
        latents = (builder.preset.num_frame_per_block, *builder.latent)
        make = partial(family.build_decoder, sizes)
        runs.append(run_decoder(architecture, make, latents, builder.dtype, compiled, family.with_fast_layers))
    run = joined(runs)
    if as_json:
        typer.echo(json.dumps(facts(run, rates, block)))
    else:
        typer.echo(report(run, rates))
    for fault in (faults := run.faults()):
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


def print_captured(
    model: str | None,
    preset: str | None,
    size: str | None,
    dtype: str | None,
    overrides: dict[str, Any],
    as_json: bool,
) -> None:
    """Check the graphs that a stream of random weights captures on a GPU, and print them; exit code 1 for a fault."""
    import torch

    from ..bench.captured_check import check_graphs, faults_of, report
    from ..bench.subject import Subject
    from ..models.registry import default_preset, find_preset

    if not torch.cuda.is_available():
        raise InferixError("--captured reads CUDA graphs, and no GPU is available; --dry-run cuda:90 needs none")
    scheme = preset or default_preset(model or DEFAULT_MODEL)
    base = model or (find_preset(scheme).about.base if preset else DEFAULT_MODEL)
    subject = Subject(
        base, scheme, random_weights=True, size=parse_size(size) if size else None, device="cuda", dtype=dtype,
        executor="captured", overrides=overrides,
    )  # fmt: skip
    results = check_graphs(subject)
    faults = faults_of(results)
    typer.echo(json.dumps(results) if as_json else report(results))
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


def print_stored(
    graphs: GraphBuilder, size: tuple[int, int], folder: Path, make: bool, plan: bool, sessions: int
) -> None:
    """Open a folder of graphs, add those of streams in batches up to `sessions` if `make`, and list its graphs."""
    import torch

    from ..runtime.capacity.device_name import card_of
    from ..runtime.programs.graph_store import GraphStore
    from ..runtime.programs.warmup import graph_keys

    batches = [1 << power for power in range(sessions.bit_length())]
    keys = graph_keys(graphs.spec, graphs.preset, size, graphs.kv_dtype is not None, batches) if make else []
    store = GraphStore.open(folder, graphs, create=make)
    made = store.fill(graphs, keys)
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
            typer.echo(textwrap.indent("\n".join(format_plans(lowered)), "    "))


def describe_key(key: GraphKey) -> str:
    """Describe the key of a stored graph: its frames, latent shape and pages."""
    channels, height, width = key.latent[1:]
    groups = " + ".join(f"{rows} x {each}" if rows > 1 else f"{each}" for rows, each in key.parts)
    kind = "block" if key.whole else "pass"
    batch = f" of {key.sessions} sessions" if key.sessions > 1 else ""
    return f"{kind} of {groups} frames of {channels}x{height}x{width}{batch}, {key.pages} pages in the store"


def format_plans(lowered: Lowered) -> list[str]:
    """Format the buffer plan of each program."""
    parts = {"block": lowered.body, "frames": lowered.frames, "prompt": lowered.prompt, "fold": lowered.fold}
    return [f"{name}: {part.plan.text(part.program)}" for name, part in parts.items() if part is not None]
