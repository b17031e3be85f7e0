"""Planner of several GPUs: layouts that fit, memory of a rank, predicted times, and the choice among them.

Times are a model's, not measured: operations at a share of the maker's figure, bytes at a link's bandwidth, and a
latency for each collective, one after another. Every constant is here, and a measured link replaces the assumed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError, nearest, quoted
from ...graphs.passes import Pass
from ...models.files import parse_json
from ...schemes.block_schedule import ScheduledBlock
from ...schemes.layouts import Divided, PassShape, bytes_sent
from ...schemes.page_needs import branches
from . import costs, planner
from .costs import ITEMSIZE
from .planner import Ceiling, Workload

EFFICIENCY = 0.627  # share of the maker's figure that passes reach: 620 of 989 TFLOP/s on one GPU
GOALS = ("latency", "throughput")


@dataclass(frozen=True)
class Link:
    """bandwidth: GB/s that a GPU sends. latency: microseconds of a collective. source: where they are from."""

    bandwidth: float
    latency: float
    source: str


LINKS = {
    "nvlink": Link(300, 15, "nvlink, assumed"),
    "pcie": Link(20, 30, "pcie, assumed"),
}


def read_link(name: str) -> Link:
    """A link by name, or of a JSON file with `bandwidth` (GB/s) and `latency` (us); UsageError for anything else."""
    if name in LINKS:
        return LINKS[name]
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"link is {quoted(name)}{nearest(name, LINKS)}; expected {', '.join(LINKS)}, or a JSON file")
    try:
        content = parse_json(path.read_text("utf-8"))
        bandwidth, latency = float(content["bandwidth"]), float(content["latency"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"link is {quoted(name)}; expected bandwidth and latency in it"
        raise UsageError(f"{message}: {quoted(str(error))}") from error
    if not (0 < bandwidth < float("inf") and 0 <= latency < float("inf")):
        raise UsageError(f"link is {quoted(name)} with bandwidth {bandwidth} and latency {latency}; expected above 0")
    return Link(bandwidth, latency, f"{path.name}, measured")


def divided(load: Workload) -> Divided:
    """Heads and token grid of a workload, which ranks divide."""
    spec, (height, width) = load.spec, load.latent
    return Divided(spec.num_heads, spec.kv_heads, (height // spec.patch[0], width // spec.patch[1]))


# Bytes


def pass_bytes(load: Workload, run: Pass, layout: str, ranks: int) -> int:
    """Bytes that each rank sends in one pass of one branch."""
    frames, (height, width) = len(run.frames), load.latent
    shape = PassShape(
        frames * load.tokens, load.preset.context.rotates_sink, frames * load.spec.out_channels * height * width
    )
    spec = load.spec
    return bytes_sent(layout, ranks, shape, divided(load), spec.head_dim, spec.num_layers, ITEMSIZE[load.dtype])


def block_bytes(load: Workload, block: ScheduledBlock, layout: str, ranks: int) -> int:
    """Bytes that each rank sends in a block whose passes run one by one."""
    return branches(load.preset) * sum(pass_bytes(load, one.run, layout, ranks) for one in block.passes)


def collectives(load: Workload, layout: str) -> int:
    """Collectives of one pass: two or three a layer, and one for the velocity."""
    return load.spec.num_layers * (3 if layout == "pass-q" and load.preset.context.rotates_sink else 2) + 1


# Plans


@dataclass(frozen=True)
class RankPlan:
    """Ranks of one world, and worlds side by side.

    memory: bytes of a rank. computing, sending, waiting: predicted milliseconds of a steady block's passes; decoding:
    of its decoder, on one rank. sent: bytes that a rank sends in a block.
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

    @property
    def block(self) -> float:
        """Predicted milliseconds of a block."""
        return self.computing + self.sending + self.waiting + self.decoding

    @property
    def per_pass(self) -> float:
        return (self.block - self.decoding) / self.passes

    @property
    def fps(self) -> float:
        """Predicted frames per second of all worlds together."""
        return self.replicas * self.frames * 1000 / self.block

    def __str__(self) -> str:
        world = "one GPU" if self.ranks == 1 else f"{self.layout} on {self.ranks}"
        return world if self.replicas == 1 else f"{self.replicas} x {world}"


def rank_memory(load: Workload, ranks: int, sessions: int) -> int:
    """Bytes of rank 0, which decodes: all weights, and its part of each page."""
    split = planner.memory(load)
    page_parts = {"pages", "page_buffer", "moving_sink"}
    once = sum(-(-count // ranks) if name in page_parts else count for name, count in split.once.items())
    each = sum(-(-count // ranks) if name in page_parts else count for name, count in split.each.items())
    return once + sessions * each


def plans(load: Workload, gpus: int, memory: int, ceiling: Ceiling, link: Link) -> Iterator[RankPlan]:
    """Every layout of `gpus` GPUs: replicas of one GPU, of all, and of each divisor between."""
    for ranks in (count for count in range(1, gpus + 1) if gpus % count == 0):
        for layout in divided(load).layouts(ranks) if ranks > 1 else ("one",):
            yield plan(load, layout, ranks, gpus // ranks, memory, ceiling, link)


def plan(
    load: Workload, layout: str, ranks: int, replicas: int, memory: int, ceiling: Ceiling, link: Link
) -> RankPlan:
    """Predict one layout. memory: bytes of a GPU."""
    blocks, times = planner.steady_blocks(load.preset), branches(load.preset)
    speed = planner.steady_speed(load, Ceiling(ceiling.tflops * EFFICIENCY, ceiling.bandwidth, ceiling.source))
    runs = [one.run for block in blocks for one in block.passes]
    flops = times * sum(costs.pass_flops(load.spec, load.tokens, run).total for run in runs) / len(blocks)
    passes = times * len(runs) / len(blocks)
    sent = 0 if ranks == 1 else sum(block_bytes(load, block, layout, ranks) for block in blocks) // len(blocks)
    waits = 0.0 if ranks == 1 else passes * collectives(load, layout) * link.latency / 1e3
    need = rank_memory(load, ranks, -(-load.sessions // replicas))
    return RankPlan(
        layout, ranks, replicas, need, need <= memory, passes,
        computing=flops / ranks / (ceiling.tflops * EFFICIENCY * 1e12) * 1e3,
        sending=sent / (link.bandwidth * 1e9) * 1e3,
        waiting=waits,
        decoding=speed.decoder_seconds * 1e3,
        frames=speed.frames,
        sent=sent,
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
    if goal == "throughput":
        best = max(fitting, key=lambda option: option.fps)
        return best, f"{best}: most frames of all streams together, {best.fps:.1f} a second predicted"
    best = min(fitting, key=lambda option: (option.block, option.ranks))
    others = [option for option in fitting if option.ranks == 1]
    beside = f", {others[0].block / best.block:.2f} x as fast as one GPU" if others and best.ranks > 1 else ""
    return best, f"{best}: the shortest block, {best.block:.0f} ms predicted{beside}"
