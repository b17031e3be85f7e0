"""Times of exported engines beside the executors of the model that they were made of, in one run.

All make the same stream, a block of each in turn, so that load from elsewhere meets all alike. A block is timed from
asking for it to its frames; its parts are the denoising passes, the commit and the decoder. Latents are compared with
the first executor's, block by block, before a time counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import InferixError, UsageError, quoted
from ..export.plan import Plan, preset_values, read_plan
from ..export.run import ExportedEngine
from ..models.registry import make_preset
from ..runtime.load import load
from ..schemes.page_needs import window
from ..schemes.presets import FIELDS, Preset
from .machine import command, environment

TOLERANCE = 1e-3  # largest difference of latents, relative to the largest latent
PARTS = ("denoise", "commit", "decode")
Maker = Callable[[], tuple[Any, dict[str, float]]]  # makes the next block: its latents, and seconds by part


@dataclass(frozen=True)
class Times:
    """Samples of one candidate: seconds of each block, and of each part of it. difference: largest, relative."""

    blocks: list[float]
    parts: dict[str, list[float]]
    difference: float

    @property
    def median(self) -> float:
        return median(self.blocks)


def measure(
    folders: Sequence[Path], executors: Sequence[str], blocks: int, seed: int, threads: int, log: Callable[[str], None]
) -> dict[str, Times]:
    """Time each engine and each executor over `blocks` blocks at a full window.

    Raises UsageError for engines of different models, InferixError for an engine whose latents differ.
    """
    plans = [read_plan(folder) for folder in folders]
    for plan in plans[1:]:
        if differing := [key for key in ("model", "preset", "size") if plan[key] != plans[0][key]]:
            raise UsageError(f"engine {quoted(plan.folder)} has another {differing[0]} than "
                             f"{quoted(plans[0].folder)}; time engines of one model")  # fmt: skip
    makers: dict[str, Maker] = {}
    for name in executors:
        log(f"loading executor {name}")
        makers[name] = executor_maker(plans[0], name, seed)
    for plan in plans:
        log(f"loading {plan.folder}")
        makers[str(plan.folder)] = engine_maker(plan, seed, threads)
    preset, samples, reference = plans[0].preset, {name: list[float]() for name in makers}, executors[0]
    parts = {name: {part: list[float]() for part in PARTS} for name in makers}
    differences, largest = dict.fromkeys(makers, 0.0), 0.0
    first = -(-window(preset) // preset.num_frame_per_block) + 1
    log(f"{first} blocks to a full window, then {blocks} that are timed")
    for index in range(first + blocks):
        made = {}
        for name, make in makers.items():
            begun = perf_counter()
            latents, seconds = make()
            if index >= first:
                samples[name].append(perf_counter() - begun)
                for part in PARTS:
                    parts[name][part].append(seconds[part])
            made[name] = np.asarray(latents)
        largest = max(largest, float(np.abs(made[reference]).max()))
        for name, latents in made.items():
            differences[name] = max(differences[name], float(np.abs(latents - made[reference]).max()))
            if not differences[name] <= TOLERANCE * largest:
                raise InferixError(f"latents of {name} differ from those of {reference} by {differences[name]:.1e} in "
                                   f"block {index}; export it again")  # fmt: skip
    return {name: Times(samples[name], parts[name], differences[name] / largest) for name in makers}


def changed_settings(preset: Preset) -> dict[str, Any]:
    """Fields of a preset that differ from the named one."""
    named, given = preset_values(make_preset(preset.name)), preset_values(preset)
    pairs = {key: (named[part][key], given[part][key]) if part else (named[key], given[key])
             for key, (part, _) in FIELDS.items()}  # fmt: skip
    return {key: after for key, (before, after) in pairs.items() if before != after}


def executor_maker(plan: Plan, name: str, seed: int) -> Maker:
    """Blocks of the model that an engine was made of."""
    settings = changed_settings(plan.preset) | ({} if plan["decoder"]["encodes"] else {"vae": "taehv"})
    engine = load(plan["model"]["source"], plan.preset.name, device="cpu", executor=name, **settings)
    size = (plan["size"]["picture"][0], plan["size"]["picture"][1])
    session = engine.open(plan["defaults"]["prompt"], seed=seed, size=size)

    def make() -> tuple[Any, dict[str, float]]:
        (block,) = session.stream(1)
        return block.latents, {part: block.timings.get(part, 0.0) for part in PARTS}

    return make


def engine_maker(plan: Plan, seed: int, threads: int) -> Maker:
    """Blocks of an engine by its runtime alone, as inferix-run makes them."""
    stream = ExportedEngine(plan.folder, threads).open(plan["defaults"]["prompt"], seed)

    def make() -> tuple[Any, dict[str, float]]:
        block = stream.next_block()
        return block.latents, block.seconds

    return make


def facts(times: dict[str, Times]) -> dict[str, Any]:
    """The result as plain values. over_first: median of the ratios of the first candidate's blocks to its own."""
    first = next(iter(times.values()))
    return {
        "candidates": {
            name: {
                "seconds": one.blocks, "parts": one.parts, "difference": one.difference,
                "over_first": median(a / b for a, b in zip(first.blocks, one.blocks, strict=True)),
            }
            for name, one in times.items()
        },
        "command": command(), "environment": environment("cpu"),
    }  # fmt: skip
