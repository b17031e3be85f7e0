"""Milliseconds of a block in each layout of some GPUs, for `inferix plan --measured FILE` and `parallel="auto"`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

from ..errors import UsageError, quoted
from ..runtime.capacity import planner
from ..runtime.capacity.device_name import card_of
from ..runtime.capacity.rank_planner import divided
from ..runtime.engine import Engine
from ..runtime.load import load
from ..runtime.parallel.ranked_worker import RankedWorker
from ..runtime.parallel.rendezvous import Place
from ..schemes.layouts import LAYERS
from ..schemes.page_needs import needs_negative
from .subject import random_prompt

COMPARED = ("gpus", "parallel", "shard_weights")  # settings that the rows of a table differ in


def measure(
    model: str,
    preset: str | None,
    gpus: int,
    device: str | None,
    size: tuple[int, int] | None,
    blocks: int,
    settings: Mapping[str, Any],
    log: Callable[[str], object],
) -> dict[str, Any]:
    """Time a stream on one GPU, and in every layout of each divisor of `gpus`.

    size: of pictures, None for the model's own. blocks: that are timed with a full window, of which the median counts.
    Returns a table for `inferix plan --measured`. UsageError under a launcher, whose ranks serve one engine, and for
    settings of a layout.
    """
    if given := [name for name in COMPARED if name in settings]:
        value = quoted(settings[given[0]])
        raise UsageError(f"settings have {given[0]} {value}, but every layout of gpus is timed; leave it out")
    if Place.of() is not None:
        raise UsageError("gpus were started by a launcher, whose ranks serve one engine; run this without torchrun")
    arguments: dict[str, Any] = {"device": device, "size": size, "text_prompts": False} | dict(settings)
    alone = load(model, preset, **arguments)
    pictures = size or alone.default_size
    counts = divided(alone.spec, pictures, alone.preset.sampler.guide)
    rows = [row("one", 1, timed(alone, pictures, blocks), log)]
    about = {
        "model": alone.spec.name, "preset": alone.preset.name, "size": list(pictures), "dtype": alone.config.dtype,
        "device": card_of(alone.device), "executor": alone.config.executor, "blocks": blocks,
        "kv_dtype": alone.config.kv_dtype or alone.config.dtype,
    }  # fmt: skip
    del alone
    for ranks in (count for count in range(2, gpus + 1) if gpus % count == 0):
        for layout in (name for name in counts.layouts(ranks) if name != LAYERS):
            engine = load(model, preset, gpus=ranks, parallel=layout, **arguments)
            worker = engine.resources.worker
            assert isinstance(worker, RankedWorker)
            try:
                rows.append(row(layout, ranks, timed(engine, pictures, blocks), log))
            finally:
                worker.end()
            del engine, worker  # before the next one's weights are read
    return {**about, "layouts": rows}


def row(layout: str, ranks: int, milliseconds: float, log: Callable[[str], object]) -> dict[str, Any]:
    log(f"{layout} on {ranks}: {milliseconds:.1f} ms a block")
    return {"layout": layout, "ranks": ranks, "shard_weights": False, "block_ms": milliseconds}


def timed(engine: Engine, size: tuple[int, int], blocks: int) -> float:
    """Median milliseconds of a block, decoder included, once the window is full."""
    before, prompt = planner.blocks_before_repeat(engine.preset), random_prompt(engine, 0)
    negative = random_prompt(engine, 1) if needs_negative(engine.preset) else None
    with engine.open(prompt_embeds=prompt, negative_embeds=negative, size=size) as session:
        marks = [time.perf_counter() for _ in session.stream(before + blocks + 1)]
    late = marks[before:]
    return median(later - earlier for earlier, later in pairwise(late)) * 1e3
