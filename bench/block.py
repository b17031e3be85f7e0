"""The block benchmark: one block at a full window, stage by stage, against the plain loop, in one run.

A window is filled by running the stream, and the way there gives the growing curve. A candidate whose latents differ
from the eager executor's is refused before the clock starts; what was timed is compared once more after it.
Candidates take turns, so that a card that heats up slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from torch import Tensor

from ..errors import InferixError, UsageError
from ..runtime.engine import Engine
from .baseline import Made
from .candidates import (
    ORACLE,
    TOLERANCE,
    Candidate,
    EngineStream,
    Stream,
    candidates,
    check,
    choose,
    latents_of,
    mismatch,
)
from .inside import look_inside
from .machine import card_of, environment, measure_ceilings, synchronize
from .result import Result, Series
from .subject import Subject, described, open_engine, random_prompt
from .work import BlockPlan, Work, blocks_until_full, decoder_work, pass_work, plan_blocks

Tell = Callable[[str], None]
CLOCK = (
    "block: host's wall clock from asking for a block until its uint8 frames lie in host memory and the device is "
    "idle: noise, prompt and context work, all denoising passes, the commit, the decoder, conversion and copy. "
    "transformer: the same without decoder and frames. interval: from one block to the next where several are asked "
    "for at once, so that one is decoded while the next is made. Left out: loading, text encoder, compilation (a "
    "whole stream runs before), video encoding, network. Where the next block needs the last one's pixels, "
    "transformer is block less the decoder."
)


@dataclass(frozen=True)
class Wanted:
    """rounds: streams per candidate; blocks: timed at a full window in each, with the decoder and again without.

    executors, baselines: by name; empty for all that suit the device, and `none` for no baseline.
    """

    subject: Subject
    rounds: int = 3
    blocks: int = 5
    executors: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("rounds", "blocks"):
            if getattr(self, key) < 1:
                raise UsageError(f"--{key} is {getattr(self, key)}; expected 1 or more")


@dataclass
class Taken:
    """Samples of one candidate as they come in."""

    series: dict[str, list[float]] = field(default_factory=dict)
    growth: dict[int, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.series.setdefault(name, []).append(value)


def run(wanted: Wanted, tell: Tell) -> Result:
    """Check, then time, every candidate. UsageError for what cannot be measured, InferixError if nothing matches."""
    subject = wanted.subject
    engine = open_engine(replace(subject, executor=ORACLE))
    device = str(engine.device)
    begun = environment(device)
    full = blocks_until_full(engine.preset)
    plan = nth_plan(engine, full)
    rows = random_prompt(engine, subject.seed)
    offered, left_out = candidates(engine, rows, subject)
    chosen = choose(offered, left_out, wanted.executors, wanted.baselines, device)
    for name, reason in left_out.items():
        tell(f"{name} is left out: {reason}")
    tell("measuring what the machine can do")
    ceilings = measure_ceilings(device, engine.dtype)
    tell(f"the window is full at block {full}: {plan.context} latent frames")

    reference = latents_of(offered[0], full + 2)
    tolerance = TOLERANCE[engine.dtype]
    told: dict[str, dict[str, Any]] = {}
    accepted = []
    for candidate in chosen:
        off, refused = check(candidate, reference, tolerance)
        told[candidate.name] = {"about": candidate.about, "difference": off, "refused": refused}
        tell(f"{candidate.name}: " + (f"refused, {refused}" if refused else f"outputs match (off by {off:.1e})"))
        accepted += [] if refused else [candidate]
    if not accepted:
        raise InferixError("nothing was timed, since no candidate's outputs match those of the eager executor")

    taken = {candidate.name: Taken() for candidate in accepted}
    clocks = []
    for turn in range(wanted.rounds):
        for candidate in accepted[turn % len(accepted) :] + accepted[: turn % len(accepted)]:
            if told[candidate.name]["refused"]:
                continue
            tell(f"round {turn + 1} of {wanted.rounds}: {candidate.name}")
            made = one_round(candidate, engine, wanted.blocks, taken[candidate.name])
            clocks += [card.state()] if (card := card_of(device)) else []
            if wrong := mismatch(made, reference, tolerance):
                told[candidate.name]["refused"] = f"what was timed differs: {wrong}"
    for candidate in accepted:
        if not told[candidate.name]["refused"]:
            tell(f"looking inside {candidate.name}")
            told[candidate.name] |= look_inside(candidate, engine, full, ceilings)

    about, settings = described(engine, subject)
    right = {name: one for name, one in taken.items() if not told[name]["refused"]}
    return Result(
        kind="block", clock=CLOCK, environment=begun, subject=about,
        settings=settings | {"rounds": wanted.rounds, "blocks": wanted.blocks}, ceilings=ceilings,
        series={
            f"{name}/{quantity}": Series("J" if quantity == "energy" else "s", tuple(samples))
            for name, one in right.items() for quantity, samples in one.series.items()
        },
        facts={
            "oracle": ORACLE, "tolerance": tolerance, "candidates": told, "left_out": left_out,
            "block": block_facts(engine, plan, full),
            "work": work_facts(engine, plan, subject),
            "growth": {
                name: {str(frames): samples for frames, samples in sorted(one.growth.items())}
                for name, one in right.items()
            },
            "clocks_in_between": clocks,
        },
    )  # fmt: skip


def nth_plan(engine: Engine, index: int) -> BlockPlan:
    return next(islice(plan_blocks(engine.preset), index, None))


def one_round(candidate: Candidate, engine: Engine, blocks: int, taken: Taken) -> list[Tensor]:
    """One stream: filling its window, then `blocks` with the decoder, as many without it, and as many asked for at
    once; returns the latents of the first two kinds.
    """
    device, plans = str(engine.device), plan_blocks(engine.preset)
    full = nth_plan(engine, blocks_until_full(engine.preset)).context
    card = card_of(device)
    stream, made = candidate.open(), []
    try:
        joules, counted = card.energy() if card else None, 0
        while counted < blocks:
            plan = next(plans)
            block, seconds = timed(stream, device, decode=True)
            made.append(block.latents.clone())
            if plan.context < full:
                taken.growth.setdefault(plan.context, []).append(seconds)
                joules = card.energy() if card else None
                continue
            counted += 1
            taken.growth.setdefault(full, []).append(seconds)
            taken.add("block", seconds)
            for stage, part in block.timings.items():
                taken.add(stage, part)
            if len(block.passes) == len(plan.steps):
                for index, part in enumerate(block.passes):
                    taken.add(f"pass {index}", part)
            if engine.preset.context.needs_pixels:  # its next block waits for the decoder, which cannot be left out
                taken.add("transformer", seconds - block.timings["decode"])
        if card and joules is not None and (now := card.energy()) is not None:
            taken.add("energy", (now - joules) / counted)
        counted = 0
        while counted < blocks and not engine.preset.context.needs_pixels:
            plan = next(plans)
            block, seconds = timed(stream, device, decode=False)
            made.append(block.latents.clone())
            if plan.context == full:
                counted += 1
                taken.add("transformer", seconds)
        if isinstance(stream, EngineStream):
            for seconds in stream.intervals(blocks):
                taken.add("interval", seconds)
    finally:
        stream.close()
    return made


def timed(stream: Stream, device: str, decode: bool) -> tuple[Made, float]:
    """The next block and its seconds, the device idle before and after."""
    synchronize(device)
    begun = time.perf_counter()
    block = stream.step(decode)
    synchronize(device)
    return block, time.perf_counter() - begun


def block_facts(engine: Engine, plan: BlockPlan, full: int) -> dict[str, Any]:
    return {
        "latent_frames": len(plan.frames), "pixel_frames": len(plan.frames) * engine.spec.vae_stride[0],
        "window_frames": plan.context, "blocks_before_full": full, "fps": engine.fps,
        "passes": [
            {"kind": step.kind, "frames": len(step.run.frames), "context": step.context} for step in plan.steps
        ],
    }  # fmt: skip


def work_facts(engine: Engine, plan: BlockPlan, subject: Subject) -> dict[str, Any]:
    """FLOPs and bytes of each pass of the block and of decoding it."""
    size, dtype = subject.size or engine.default_size, engine.config.dtype
    branches = 2 if engine.preset.sampler.guidance_scale != 1 else 1
    passes = [pass_work(engine.spec, step.run, size, dtype) for step in plan.steps for _ in range(branches)]
    decoder = decoder_work(engine.parts.vae.spec, engine.spec.latent_size(size), len(plan.frames), dtype)
    return {
        "passes": [asdict(work) for work in passes],
        "transformer": asdict(sum(passes, Work(0, 0))),
        "decoder": asdict(decoder),
        "counted": "from the sizes and passes of the block; bytes are the least that must move",
    }
