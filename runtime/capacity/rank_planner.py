"""Planner of several GPUs: layouts that fit, memory of a rank, predicted times, and the choice among them.

Times are a model's, not measured: operations at a share of the maker's figure, bytes at a link's bandwidth, and a
latency for each collective, one after another. Every constant is here, and a measured link replaces the assumed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...errors import UsageError
from ...graphs.passes import Pass
from ...graphs.shards import Shard
from ...graphs.tiles import shares
from ...models.registry import family_of
from ...models.spec import ModelSpec
from ...models.weight_shards import part_of
from ...schemes.block_schedule import ScheduledBlock
from ...schemes.guidance import Guidance
from ...schemes.layouts import LAYERS, Divided, PassShape, RankGrid, bytes_sent, check_size, collectives
from ...schemes.page_needs import least_pages
from . import costs, planner
from .costs import ITEMSIZE
from .links import Link
from .measured_layouts import MeasuredLayouts
from .planner import Ceiling, Workload

EFFICIENCY = 0.627  # share of the maker's figure that passes reach: 620 of 989 TFLOP/s on one GPU
GOALS = ("latency", "throughput")


def divided(spec: ModelSpec, size: tuple[int, int], guide: Guidance) -> Divided:
    """Counts of a model, of its pictures of `size` and of a preset's guidance, which ranks divide."""
    height, width = spec.latent_size(size)
    grid = height // spec.patch[0], width // spec.patch[1]
    return Divided(spec.num_heads, spec.kv_heads, grid, len(set(guide.caches)), guide.is_even, spec.num_layers)


def divided_of(load: Workload) -> Divided:
    return divided(load.spec, load.size, load.preset.sampler.guide)


# Bytes


def frame_entries(load: Workload) -> int:
    """Numbers of a latent frame."""
    return load.spec.out_channels * math.prod(load.latent)


def divided_matrices(load: Workload) -> list[tuple[int, int]]:
    """Numbers of each matrix that ranks divide with `shard_weights`, and bytes of each."""
    layers = costs.token_layers(load.spec)
    return [(inputs * outputs, costs.layer_item(load.spec, name, load.dtype)) for name, inputs, outputs in layers]


def weight_bytes(load: Workload, grid: RankGrid) -> int:
    """Bytes that each rank sends in one pass for the others to gather the weights."""
    return (grid.tiles - 1) * sum(item * part_of(count, grid.tiles) for count, item in divided_matrices(load))


def pass_bytes(load: Workload, run: Pass, grid: RankGrid, stage: int = 0) -> int:
    """Bytes that each rank sends in one pass of one branch, besides weights. stage: of ranks that hold layers."""
    frames, spec = len(run.frames), load.spec
    shape = PassShape(frames * load.tokens, load.preset.context.rotates_sink, frames * frame_entries(load))
    return bytes_sent(grid, shape, divided_of(load), spec.head_dim, spec.num_layers, ITEMSIZE[load.dtype], place=stage)


def runs_at(load: Workload, block: ScheduledBlock, grid: RankGrid, place: int) -> list[Pass]:
    """Passes of a block that ranks run, of all branches of guidance or of those of their place."""
    guide = load.preset.sampler.guide
    return [
        run for scheduled in block.passes for number, run in scheduled.branch_runs(guide).items()
        if grid.branches == 1 or guide.caches[number] == place
    ]  # fmt: skip


def block_bytes(
    load: Workload, block: ScheduledBlock, grid: RankGrid, place: int = 0, shard_weights: bool = False, stage: int = 0
) -> int:
    """Bytes that the first rank of a place sends in a block whose passes run one by one.

    place: of branches of guidance; ranks of others than 0 send their velocities to rank 0. shard_weights: ranks gather
    the weights in each pass. stage: of a rank that holds layers.
    """
    runs = runs_at(load, block, grid, place)
    velocities = sum(len(run.frames) for run in runs) * frame_entries(load) * ITEMSIZE[load.dtype]
    weights = len(runs) * weight_bytes(load, grid) if shard_weights else 0
    return sum(pass_bytes(load, run, grid, stage) for run in runs) + weights + (velocities if place > 0 else 0)


def block_collectives(
    load: Workload, block: ScheduledBlock, grid: RankGrid, place: int = 0, shard_weights: bool = False
) -> int:
    """Collectives, and sent velocities, of the first rank of a place in a block; of all where ranks hold layers."""
    runs = len(runs_at(load, block, grid, place))
    each = collectives(grid, load.spec.num_layers, load.preset.context.rotates_sink)
    return runs * (each + (place > 0) + (len(divided_matrices(load)) if shard_weights else 0))


# Decoder


def decoder_ranks(spec: ModelSpec, size: tuple[int, int], ranks: int, asked: bool | None = None) -> int:
    """Ranks that decode some columns of each picture: all, or rank 0 alone.

    asked: the setting `shard_decoder`; UsageError where it is True and ranks cannot.
    """
    if asked is False or ranks == 1:
        return 1
    if (reason := against_columns(spec, size, ranks)) is None:
        return ranks
    if asked:
        raise UsageError(f"shard_decoder is True, but {reason}; leave shard_decoder out")
    return 1


def against_columns(spec: ModelSpec, size: tuple[int, int], ranks: int) -> str | None:
    """Why ranks cannot decode some columns each of pictures of `size`; None where they can."""
    columns = spec.latent_size(size)[1]
    if not family_of(spec).decodes_columns:
        return f"the decoder of {spec.name} attends to whole tiles, which ranks do not divide"
    return f"{size[0]}x{size[1]} has {columns} columns of latents for {ranks} ranks" if columns < ranks else None


def check_pictures(spec: ModelSpec, size: tuple[int, int], guide: Guidance, shard: Shard) -> None:
    """UsageError for pictures that the ranks of an engine cannot divide."""
    if shard.ranks > 1:
        check_size(divided(spec, size, guide), RankGrid(shard.heads.size, shard.tokens.size, shard.branches.size))
    if shard.columns.size > 1 and (reason := against_columns(spec, size, shard.columns.size)) is not None:
        raise UsageError(f"size is too small: {reason}; give a larger one, or load with shard_decoder=False")


def decoding_sent(load: Workload, block: ScheduledBlock, ranks: int, rank: int) -> tuple[int, int]:
    """Bytes that a rank sends while all decode the frames of a block, and how often it sends.

    Of its edges to each neighbour, of what all columns need, and of its pictures to rank 0.
    """
    rows, columns = load.latent
    widths, item, decoder = shares(columns, ranks), ITEMSIZE[load.dtype], load.decoder
    sides, sent, calls, pictures = (rank > 0) + (rank < ranks - 1), 0, 0, 0
    for frame in range(block.decoded):
        first = frame == 0 and block.decoder_begins and not load.preset.context.decoder_zero_start
        entries, times = decoder.edge_entries(first)
        sent += sides * rows * entries * item
        calls += times + (decoder.attended_entries > 0)
        pictures += load.spec.first_pictures if first else decoder.temporal_stride
    sent += (ranks - 1) * block.decoded * decoder.attended_entries * rows * max(widths) * item
    if rank > 0:
        sent += 3 * pictures * decoder.spatial_stride**2 * rows * widths[rank] * item
        calls += 1
    return sent, calls


# Plans


@dataclass(frozen=True)
class RankPlan:
    """Ranks of one world, and worlds side by side.

    layout: its name, `one` for one GPU. memory: bytes of a rank. computing, sending, waiting: predicted milliseconds of
    a steady block's passes; decoding: of its decoder, on all ranks where they divide it. sent: bytes that a rank sends
    in a block's passes. shard_weights: ranks divide the weights. measured: milliseconds of a block that replace the
    predicted ones; source: file that they are from.
    """

    layout: str
    ranks: int
    replicas: int
    memory: int
    fits: bool
    passes: float
    computing: float
    sending: float
    waiting: float
    decoding: float
    frames: float
    sent: int
    shard_weights: bool = False
    measured: float | None = None
    source: str | None = None

    @property
    def block(self) -> float:
        """Milliseconds of a block: measured where they are, else predicted."""
        return self.predicted if self.measured is None else self.measured

    @property
    def predicted(self) -> float:
        """Predicted milliseconds of a block."""
        return self.computing + self.sending + self.waiting + self.decoding

    @property
    def per_pass(self) -> float:
        """Predicted milliseconds of a pass."""
        return (self.predicted - self.decoding) / self.passes

    @property
    def how(self) -> str:
        """Origin of the time of a block."""
        return "predicted" if self.measured is None else f"measured ({self.source})"

    @property
    def fps(self) -> float:
        """Frames per second of all worlds together."""
        return self.replicas * self.frames * 1000 / self.block

    def __str__(self) -> str:
        world = "one GPU" if self.ranks == 1 else f"{self.layout} on {self.ranks}"
        world += ", shard_weights" if self.shard_weights else ""
        return world if self.replicas == 1 else f"{self.replicas} x {world}"


def rank_memory(load: Workload, grid: RankGrid, sessions: int, shard_weights: bool = False, decoders: int = 1) -> int:
    """Bytes of rank 0, which decodes: all weights, or its part and the largest whole, and its part of each page.

    What a pass computes is divided too, where no rank gathers the queries of others. decoders: ranks that decode.
    """
    if grid.layers > 1:
        load = replace(load, spec=replace(load.spec, num_layers=max(shares(load.spec.num_layers, grid.layers))))
    split, guide = planner.memory(load), load.preset.sampler.guide
    each, once = dict(split.each), dict(split.once)
    if grid.branches > 1:
        numbers = set(guide.caches)
        most = max(least_pages(load.preset, number) for number in numbers)
        each["pages"] = each["pages"] * most // least_pages(load.preset)
        each["moving_sink"] //= len(numbers)
    if shard_weights:
        sizes = divided_matrices(load)
        away = sum(item * (count - part_of(count, grid.tiles)) for count, item in sizes)
        once["transformer"] -= away - max(item * count for count, item in sizes)
    scratch = {"pass_scratch"} if grid.tokens == 1 else set()
    for part in (once, each):
        for name in part.keys() & ({"pages", "page_buffer", "moving_sink"} | scratch):
            part[name] = -(-part[name] // grid.tiles)
        for name in part.keys() & {"decode_scratch", "decoder_state"}:
            part[name] = -(-part[name] // decoders)
    return sum(once.values()) + sessions * sum(each.values())


def plans(
    load: Workload, gpus: int, memory: int, ceiling: Ceiling, link: Link, measured: MeasuredLayouts | None = None,
    shard_weights: bool = False, shard_decoder: bool | None = None,
) -> Iterator[RankPlan]:  # fmt: skip
    """Every layout of `gpus` GPUs: replicas of one GPU, of all, and of each divisor between.

    Divided weights are listed where a layout does not fit without, or with `shard_weights`; ranks that hold layers
    where nothing else of as many ranks or fewer fits, divided weights aside. measured: times that replace predicted
    ones. shard_decoder: the setting; None where the decoder is divided if it can be.
    """
    parts, fit = divided_of(load), False

    def plan_of(grid: RankGrid, ranks: int, divided: bool = False) -> RankPlan:
        return plan(load, grid, gpus // ranks, memory, ceiling, link, divided, measured, shard_decoder)

    for ranks in (count for count in range(1, gpus + 1) if gpus % count == 0):
        layouts = [layout for layout in parts.layouts(ranks) if layout != LAYERS]
        grids = [parts.grid_of(layout, ranks) for layout in layouts] if ranks > 1 else [RankGrid()]
        for grid in grids:
            assert grid is not None
            whole = plan_of(grid, ranks)
            yield whole
            fit = fit or whole.fits
            if grid.tiles > 1 and (shard_weights or not whole.fits):
                yield plan_of(grid, ranks, divided=True)
        if not fit and ranks > 1 and (grid := parts.grid_of(LAYERS, ranks)) is not None:
            yield plan_of(grid, ranks)


def plan(
    load: Workload, grid: RankGrid, replicas: int, memory: int, ceiling: Ceiling, link: Link,
    shard_weights: bool = False, measured: MeasuredLayouts | None = None, shard_decoder: bool | None = None,
) -> RankPlan:  # fmt: skip
    """Predict one layout. memory: bytes of a GPU. Of branches of guidance, the longest is waited for."""
    blocks = planner.steady_blocks(load.preset)
    speed = planner.steady_speed(load, Ceiling(ceiling.tflops * EFFICIENCY, ceiling.bandwidth, ceiling.source))

    def per_block(what: Callable[[ScheduledBlock, int], float]) -> float:
        """Mean over the blocks of the most that a place of branches has."""
        return sum(max(what(block, place) for place in range(grid.branches)) for block in blocks) / len(blocks)

    def flops(block: ScheduledBlock, place: int) -> int:
        return sum(costs.pass_flops(load.spec, load.tokens, run).total for run in runs_at(load, block, grid, place))

    sent = int(per_block(lambda block, place: block_bytes(load, block, grid, place, shard_weights)))
    last = per_block(lambda block, place: block_bytes(load, block, grid, place, shard_weights, grid.layers - 1))
    passed = sent + (grid.layers - 2) * (sent - last) if grid.layers > 1 else sent  # from rank to rank, one by one
    waits = per_block(lambda block, place: block_collectives(load, block, grid, place, shard_weights))
    decoders = decoder_ranks(load.spec, load.size, grid.ranks, shard_decoder)
    decoding = speed.decoder_seconds * 1e3
    if decoders > 1:
        parts = [decoding_sent(load, block, decoders, 1) for block in blocks]
        moved, times = (sum(part) / len(blocks) for part in zip(*parts, strict=True))
        decoding = (speed.encoder_seconds + (speed.decoder_seconds - speed.encoder_seconds) / decoders) * 1e3
        decoding += moved / (link.bandwidth * 1e9) * 1e3 + times * link.latency / 1e3
    need = rank_memory(load, grid, -(-load.sessions // replicas), shard_weights, decoders)
    name = grid.layout or "one"
    return RankPlan(
        name, grid.ranks, replicas, need, need <= memory,
        passes=per_block(lambda block, place: len(runs_at(load, block, grid, place))),
        computing=per_block(flops) / grid.tiles / (ceiling.tflops * EFFICIENCY * 1e12) * 1e3,
        sending=passed / (link.bandwidth * 1e9) * 1e3,
        waiting=waits * link.latency / 1e3,
        decoding=decoding,
        frames=speed.frames,
        sent=sent,
        shard_weights=shard_weights,
        measured=None if measured is None else measured.block(name, grid.ranks, shard_weights),
        source=None if measured is None else measured.file,
    )  # fmt: skip


def choose(options: list[RankPlan], goal: str) -> tuple[RankPlan, str]:
    """The plan for a goal of `GOALS`, and the reason in one line; UsageError where none fits."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        least = min(options, key=lambda option: option.memory)
        raise UsageError(
            f"no layout of {options[0].ranks * options[0].replicas} GPUs fits: the least, {least}, needs "
            f"{least.memory / 1e9:.1f} GB a GPU; give a smaller window, size or kv_dtype"
        )
    timed = [option for option in fitting if option.measured is not None]  # a model's times are not compared with these
    among = timed or fitting
    if goal == "throughput":
        best = max(among, key=lambda option: option.fps)
        return best, f"{best}: most frames of all streams together, {best.fps:.1f} a second {best.how}"
    best = min(among, key=lambda option: (option.block, option.ranks))
    others = [option for option in among if option.ranks == 1]
    beside = f", {others[0].block / best.block:.2f} x as fast as one GPU" if others and best.ranks > 1 else ""
    rest = [option for option in options if option.layout != LAYERS]
    if best.layout == LAYERS and rest and not any(option.fits for option in rest):
        least = min(rest, key=lambda option: option.memory)
        beside = f"; nothing else fits, the least of which, {least}, needs {least.memory / 1e9:.1f} GB a GPU"
    return best, f"{best}: the shortest block, {best.block:.0f} ms {best.how}{beside}"
