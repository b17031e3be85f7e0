"""Milliseconds of a block in each layout of some GPUs, for `inferix plan --measured FILE` and `parallel="auto"`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from ..errors import RankFailed, UsageError, quoted
from ..runtime.capacity import planner
from ..runtime.capacity.device_name import card_of
from ..runtime.engine import Engine
from ..runtime.load import load
from ..runtime.parallel.rendezvous import Place
from ..schemes.layouts import LAYERS, LAYOUTS
from ..schemes.page_needs import needs_negative, page_needs
from ..schemes.presets import plain_fields
from .subject import end_ranks, random_prompt

ONE = "one"  # layout of one GPU
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
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Time a stream on one GPU, and in every layout of each divisor of `gpus` that fits; divided weights where only so.

    size: of pictures, None for the model's own. blocks: that are timed with a full window, of which the median counts.
    Returns a table for `inferix plan --measured`, which `keep` is given after each of its rows. A layout whose ranks
    fail, or that runs out of memory, is left out. UsageError under a launcher, whose ranks serve one engine, for
    settings of a layout, and where no layout fits.
    """
    if given := [name for name in COMPARED if name in settings]:
        value = quoted(settings[given[0]])
        raise UsageError(f"settings have {given[0]} {value}, but every layout of gpus is timed; leave it out")
    if Place.of() is not None:
        raise UsageError("gpus were started by a launcher, whose ranks serve one engine; run this without torchrun")
    arguments: dict[str, Any] = {"device": device, "size": size, "text_prompts": False} | dict(settings)
    rows, about, refused = list[dict[str, Any]](), dict[str, Any](), list[str]()
    for ranks in (count for count in range(1, gpus + 1) if gpus % count == 0):
        for layout in [name for name in LAYOUTS if name != LAYERS] if ranks > 1 else [ONE]:
            reasons = list[str]()
            for shard_weights in (False, True) if ranks > 1 else (False,):
                own: dict[str, Any] = {"gpus": ranks}
                own |= {"parallel": layout, "shard_weights": shard_weights} if ranks > 1 else {}
                try:
                    engine = load(model, preset, **own, **arguments)
                except UsageError as error:  # it does not divide, or does not fit
                    reasons.append(str(error))
                    continue
                about = about or described(engine, size or engine.default_size)
                try:
                    milliseconds = timed(engine, size or engine.default_size, blocks)
                except (RankFailed, torch.OutOfMemoryError) as error:
                    reasons.append(str(error))
                    continue
                finally:
                    end_ranks(engine)
                    del engine  # before the next one's weights are read
                log(f"{layout} on {ranks}: {milliseconds:.1f} ms a block")
                rows.append(
                    {"layout": layout, "ranks": ranks, "shard_weights": shard_weights, "block_ms": milliseconds}
                )
                keep({**about, "blocks": blocks, "layouts": rows})
                break
            else:
                refused += reasons
                log(f"{layout} on {ranks} is left out: {'; with divided weights: '.join(dict.fromkeys(reasons))}")
    if not rows:
        raise UsageError(refused[0])
    return {**about, "blocks": blocks, "layouts": rows}


def described(engine: Engine, size: tuple[int, int]) -> dict[str, Any]:
    """What the times are of, as `MeasuredLayouts.check` compares it."""
    config = engine.config
    return {
        "model": engine.spec.name, "preset": engine.preset.name, "settings": plain_fields(engine.preset),
        "size": list(size), "dtype": config.dtype, "device": card_of(engine.device), "executor": config.executor,
        "kv_dtype": config.kv_dtype or config.dtype,
    }  # fmt: skip


def timed(engine: Engine, size: tuple[int, int], blocks: int) -> float:
    """Median milliseconds of a block, decoder included, once the window is full; UsageError where it never is."""
    if page_needs(engine.preset).context is None:
        raise UsageError("local_attn_size is -1, so that no block is like another; give a window, such as 21")
    before, prompt = planner.blocks_before_repeat(engine.preset), random_prompt(engine, 0)
    negative = random_prompt(engine, 1) if needs_negative(engine.preset) else None
    with engine.open(prompt_embeds=prompt, negative_embeds=negative, size=size) as session:
        marks = [time.perf_counter() for _ in session.stream(before + blocks + 1)]
    late = marks[before:]
    return median(later - earlier for earlier, later in pairwise(late)) * 1e3
