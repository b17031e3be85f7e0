"""Dry runs of the configurations that the goals are about, as one file: what changed between two commits is a diff.

Write it: python -m inferix.bench.dry_run_table bench/results/dry-run-after.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from ..errors import UsageError, nearest, one_line_errors, quoted
from ..graphs.rewrites import chosen, rewritten
from ..graphs.rewrites.lowp import PrecisionMap
from ..kernels.spec import using
from ..models.registry import MODELS, family_of, make_preset
from ..runtime.capacity.rank_planner import divided
from ..runtime.config import EVERY_BLOCK
from ..runtime.files import write_atomically
from ..runtime.kv.page_store import KV_DTYPES, padded_width
from ..runtime.programs.block_graph import BlockGraphBuilder
from ..schemes.guidance import ALONE
from ..schemes.layouts import RankGrid, choose_layout
from .dry_run import MULTIPROCESSORS, dry_run, facts, fake_shard, run_decoder
from .result import CHECK
from .time_model import RATES


class Configuration(NamedTuple):
    """A block to run; fp8: linear layers and pages. decoders: names of the decoders to run beside it.

    ranks: GPUs that share each pass, of which the first is shown. shard_weights: they divide the weights. sessions: in
    one launch. dense: attention over the full window's run of pages through cuDNN. fuse_commit: the commit of the block
    before in the first pass. kernels: forms by op.
    """

    model: str
    preset: str
    fp8: bool = False
    decoders: tuple[str, ...] = ()
    ranks: int = 1
    shard_weights: bool = False
    sessions: int = 1
    dense: bool = False
    fuse_commit: bool = False
    kernels: tuple[tuple[str, str], ...] = ()


CONFIGURATIONS = {
    "self-forcing": Configuration("wan-1.3b", "self-forcing", decoders=("vae", "taehv")),
    "self-forcing-fp8": Configuration("wan-1.3b", "self-forcing", fp8=True),
    "self-forcing-fp8-qk": Configuration(
        "wan-1.3b", "self-forcing", fp8=True, kernels=(("block_attention", "fp8_qk"),)
    ),
    "self-forcing-dense": Configuration("wan-1.3b", "self-forcing", dense=True),
    "self-forcing-fuse-commit": Configuration("wan-1.3b", "self-forcing", fuse_commit=True),
    "framewise": Configuration("wan-1.3b", "self-forcing-framewise"),
    "longlive": Configuration("wan-1.3b", "longlive"),
    **{f"longlive-{count}": Configuration("wan-1.3b", "longlive", sessions=count) for count in (2, 4, 8)},
    "krea": Configuration("wan-14b", "krea"),
    **{
        preset: Configuration(preset.removesuffix("-distill"), preset)
        for preset in ("magi-4.5b", "magi-4.5b-distill", "magi-24b", "magi-24b-distill")
    },
}
SHORTENED = (2, 3)  # layers: a first and a last one, and one between them
SHARED = {
    f"{preset}-{ranks}": Configuration(model, preset, ranks=ranks)
    for model, preset in (("wan-1.3b", "self-forcing"), ("wan-14b", "krea"), ("magi-24b", "magi-24b-distill"))
    for ranks in (1, 2, 4, 8)
    if f"{preset}-{ranks}" not in ("self-forcing-1", "krea-1", "magi-24b-distill-1")
}


def run(configuration: Configuration, architecture: int, compiled: bool, layers: int | None = None) -> dict[str, Any]:
    """Facts of a configuration's dry run; those of its decoders under `decoders`.

    layers: of the model; None for all.
    """
    model, preset, fp8, decoders, ranks, shard_weights, sessions, dense, fuse_commit, kernels = configuration
    spec, scheme = MODELS[model], make_preset(preset)
    grid = choose_layout(divided(spec, spec.default_size, ALONE), ranks) if ranks > 1 else RankGrid()
    spec = spec if layers is None else replace(spec, num_layers=layers)
    builder = BlockGraphBuilder(
        spec, scheme, dtype=torch.bfloat16, kv_dtype=KV_DTYPES["fp8"] if fp8 else None,
        shard=fake_shard(grid, shard_weights), sessions=sessions, texts=1 if sessions > 1 else None,
        fuse_commit=fuse_commit,
    )  # fmt: skip
    run = (0, builder.max_pages) if dense else None
    builder.max_pages = padded_width(builder.max_pages)
    names = chosen(["lowp"] if fp8 else [], ["split-keys"] if "block_attention" in dict(kernels) else [])
    block = rewritten(builder.build(), names, PrecisionMap("fp8", EVERY_BLOCK), MULTIPROCESSORS[architecture], run)
    rates, family = RATES.get(architecture), family_of(spec)
    with using(**dict(kernels)):
        result = facts(dry_run(block, architecture, compiled), rates, block)
    latents, parts = (scheme.num_frame_per_block, *builder.latent), {}
    for name in decoders:
        sizes = family.chosen_decoder_spec(spec, name == "taehv")
        make = partial(family.build_decoder, sizes)
        decoded = run_decoder(architecture, make, latents, builder.dtype, compiled, family.with_fast_layers)
        parts[name] = facts(decoded, rates, block)["parts"]["decoder"]
    result |= {"decoders": parts, "sessions": sessions}
    return result | ({"ranks": ranks, "layout": grid.layout} if ranks > 1 else {})


def run_shortened(configuration: Configuration, architecture: int, compiled: bool) -> dict[str, Any]:
    """Facts of a configuration from runs of `SHORTENED` layers: each further layer adds what the last of them did."""
    fewer, more = (run(configuration, architecture, compiled, layers) for layers in SHORTENED)
    layers = MODELS[configuration.model].num_layers
    facts_of: dict[str, Any] = extended(fewer, more, layers - SHORTENED[0])
    return facts_of | {"from_layers": list(SHORTENED), "layers": layers}


def extended(fewer: Any, more: Any, layers: int) -> Any:
    """Values that grow with each of `layers` layers as from `fewer` to `more`, which has one more than `fewer`."""
    if isinstance(fewer, dict) and isinstance(more, dict):
        assert fewer.keys() == more.keys(), fewer.keys() ^ more.keys()
        return {key: extended(fewer[key], value, layers) for key, value in more.items()}
    if isinstance(fewer, int | float) and not isinstance(fewer, bool):
        return fewer + layers * (more - fewer)
    assert fewer == more, (fewer, more)
    return fewer


def main(
    file: Annotated[Path, typer.Argument(help="File to write; configurations that it has and that are not run stay.")],
    only: Annotated[
        list[str] | None, typer.Option(help=f"What to run; repeatable.  [default: {', '.join(CONFIGURATIONS)}]")
    ] = None,
    architecture: Annotated[int, typer.Option(help="Compute capability times ten.")] = 90,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the kernels.")] = True,
    shortened: Annotated[
        bool, typer.Option("--shortened", help="Run two and three layers, and add what the third added for each other.")
    ] = False,
) -> None:
    """Run configurations and write their facts as JSON, after each."""
    every = CONFIGURATIONS | SHARED
    for name in only or ():
        if name not in every:
            raise UsageError(f"only is {quoted(name)}{nearest(name, every)}; expected one of {', '.join(every)}")
    facts_of = json.loads(file.read_text("utf-8"))["configurations"] if file.exists() else {}
    for name in only or CONFIGURATIONS:
        facts_of[name] = (run_shortened if shortened else run)(every[name], architecture, compiled)
        block = facts_of[name]["parts"]["block"]
        print(f"{name}: {block['calls']} calls, {block.get('predicted', 0) * 1e3:.0f} ms predicted", file=sys.stderr)
        text = json.dumps({CHECK: True, "configurations": facts_of}, indent=1)
        write_atomically(file, lambda part, text=text: part.write_text(text + "\n", "utf-8"))  # type: ignore[misc]


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
