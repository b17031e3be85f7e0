"""Layout of an engine's ranks: the one that is named, or the planner's choice."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from ...schemes.layouts import AUTO, LAYERS, RankGrid, choose_layout
from ..config import EVERY_BLOCK, EngineConfig
from . import rank_planner
from .device_name import card_of
from .gpus import CARDS, card_named
from .links import LINKS
from .measured_layouts import MeasuredLayouts, read_measured
from .planner import Ceiling, Workload
from .rank_planner import RankPlan, divided_of

ASSUMED = CARDS["h200"]  # for devices without figures; layouts of equally many ranks differ by what they send


@dataclass(frozen=True)
class RankChoice:
    """Grid of ranks, whether they divide the weights, and the planner's reason; None where the layout was named."""

    grid: RankGrid
    shard_weights: bool
    reason: str | None = None


def choose_ranks(config: EngineConfig, load: Workload, memory: int | None) -> RankChoice:
    """The layout that `config.parallel` names; with auto, what `inferix plan --gpus` takes for one world of all ranks.

    memory: available bytes of a rank, None where they are not known. Where nothing fits, the fastest; the memory check
    refuses it. UsageError, with the nearest that works, for ranks that divide nothing, and for measured times of
    something else.
    """
    named = RankChoice(choose_layout(divided_of(load), config.gpus, config.parallel), config.shard_weights)
    if config.parallel != AUTO:
        return named
    device = card_of(torch.device(config.device))
    card = card_named(device) or ASSUMED
    measured = None if config.measured is None else read_measured(config.measured)
    if measured is not None:
        measured.check(load, device)
    link = LINKS["nvlink"] if measured is None or measured.link is None else measured.link
    listed = rank_planner.plans(
        load, config.gpus, sys.maxsize if memory is None else memory,
        Ceiling(card.tflops, card.bandwidth, card.name), link, measured, config.shard_weights,
        config.shard_decoder,
    )  # fmt: skip
    options = [option for option in listed if option.ranks == config.gpus and takes(config, load, option)]
    if not options:
        return named  # refused for the setting that it does not take
    if any(option.fits for option in options):
        best, reason = rank_planner.choose(options, "latency")
    else:
        best, reason = min(options, key=lambda option: option.block), "no layout fits"
    return RankChoice(grid_of(load, best), best.shard_weights, noted(reason, best, measured))


def noted(reason: str, best: RankPlan, measured: MeasuredLayouts | None) -> str:
    if measured is None or best.measured is not None:
        return reason
    return f"{reason}; {measured.file} has no layout of {best.ranks} ranks that fits"


def grid_of(load: Workload, option: RankPlan) -> RankGrid:
    grid = divided_of(load).grid_of(option.layout, option.ranks)
    assert grid is not None
    return grid


def takes(config: EngineConfig, load: Workload, option: RankPlan) -> bool:
    """True where a layout takes all settings of an engine."""
    if option.layout == LAYERS:
        return not config.shard_weights and not config.lowp_keep and config.lowp_layers == EVERY_BLOCK
    if grid_of(load, option).tokens > 1 and config.kv_dtype not in (None, config.dtype):
        return False
    return option.shard_weights >= config.shard_weights and not (option.shard_weights and config.lowp is not None)
