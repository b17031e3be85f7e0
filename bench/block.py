"""The block benchmark: one block at a full window, stage by stage, against the plain loop, in one run.

A window is filled by running the stream, and the way there gives the growing curve. All candidates have the same
weights. One whose latents differ from the eager executor's is refused before the clock starts; what was timed is
compared once more after it.
Candidates take turns, so that a card that heats up slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InferixError, UsageError, nearest
from ..runtime.engine import Engine
from ..runtime.session import Block
from .baseline import PlainLoop, compiled_layer, run_layer, why_not
from .machine import card_of, environment, measure_ceilings, process_memory, synchronize
from .result import Result, Series
from .subject import Subject, described, open_engine, random_prompt
from .work import (
    BlockPlan,
    Work,
    blocks_until_full,
    decoder_work,
    pass_work,
    plan_blocks,
)

Tell = Callable[[str], None]
ORACLE = "eager"
# Largest root mean square of the difference to the oracle's latents, relative to theirs, over all checked blocks.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.04}
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
CLOCK = (
    "block: host's wall clock from asking for a block until its uint8 frames lie in host memory and the device is "
    "idle: noise, prompt and context work, all denoising passes, the commit, the decoder, conversion and copy. "
    "transformer: the same without decoder and frames. Left out: loading, text encoder, compilation (a whole stream "
    "runs before), video encoding, network. Where the next block needs the last one's pixels, transformer is block "
    "less the decoder."
)


class Stream(Protocol):
    """A candidate's stream of blocks."""

    def step(self, decode: bool = True) -> Block:
        """The next block."""

    def close(self) -> None:
        """Free its memory."""


@dataclass(frozen=True)
class Candidate:
    """What is timed: `open` begins a stream, `owners` tells the bytes a stream holds, by owner."""

    name: str
    about: str
    open: Callable[[], Stream]
    owners: Callable[[Any], dict[str, int]]


@dataclass(frozen=True)
class Wanted:
    """rounds: streams per candidate; blocks: timed at a full window in each, with the decoder and again without.

    only: names of candidates; empty for all that suit the device.
    """

    subject: Subject
    rounds: int = 3
    blocks: int = 5
    only: tuple[str, ...] = ()

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


class EngineStream:
    """A session as a stream."""

    def __init__(self, engine: Engine, rows: Tensor, seed: int, size: tuple[int, int]) -> None:
        self.session = engine.open(prompt_embeds=rows, seed=seed, size=size)

    def step(self, decode: bool = True) -> Block:
        (block,) = self.session.stream(1, decode)
        return block

    def close(self) -> None:
        self.session.close()


def candidates(engine: Engine, rows: Tensor, subject: Subject) -> tuple[list[Candidate], dict[str, str]]:
    """All that can run this preset here, the oracle first, and why others cannot."""
    size = subject.size or engine.default_size

    def engine_owners(stream: EngineStream) -> dict[str, int]:
        session = stream.session
        cache = sum(branch.cache.nbytes for branch in session.branches)
        return {"cache": cache, "decoder state": session.decoder.nbytes}

    def plain_owners(stream: PlainLoop) -> dict[str, int]:
        return {"cache": stream.cache_bytes, "decoder state": stream.decoder.nbytes}

    found = [
        Candidate(
            ORACLE, "the engine's plain executor, pass by pass: what all others must equal",
            lambda: EngineStream(engine, rows, subject.seed, size), engine_owners,
        )
    ]  # fmt: skip
    if reason := why_not(engine.preset):
        return found, dict.fromkeys(("plain", "compiled"), reason)
    found.append(
        Candidate(
            "plain", "a loop in the structure of the public reference: contiguous cache rolled by copying, embeddings "
            "in every pass, torch's attention",
            lambda: PlainLoop(engine, rows, subject.seed, size, run_layer), plain_owners,
        )
    )  # fmt: skip
    found.append(
        Candidate(
            "compiled", "the plain loop with every layer through torch.compile",
            lambda: PlainLoop(engine, rows, subject.seed, size, compiled_layer()), plain_owners,
        )
    )  # fmt: skip
    return found, {}


def run(wanted: Wanted, tell: Tell) -> Result:
    """Check, then time, every candidate. UsageError for what cannot be measured, InferixError if nothing matches."""
    subject = wanted.subject
    engine = open_engine(subject)
    device = str(engine.device)
    begun = environment(device)
    full = blocks_until_full(engine.preset)
    plan = nth_plan(engine, full)
    rows = random_prompt(engine, subject.seed)
    offered, left_out = candidates(engine, rows, subject)
    chosen = choose(offered, left_out, wanted, device, tell)
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
            told[candidate.name] |= look_inside(candidate, engine, full, device)

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
            "weights": weights_facts(engine), "clocks_in_between": clocks,
        },
    )  # fmt: skip


def nth_plan(engine: Engine, index: int) -> BlockPlan:
    return next(islice(plan_blocks(engine.preset), index, None))


def choose(
    offered: list[Candidate], left_out: dict[str, str], wanted: Wanted, device: str, tell: Tell
) -> list[Candidate]:
    """The candidates asked for; without a word, all but what takes minutes to compile on a CPU."""
    names = [candidate.name for candidate in offered]
    for name in wanted.only:
        if name in left_out:
            raise UsageError(f"{name} cannot run this preset: {left_out[name]}; leave it out of --only")
        if name not in names:
            raise UsageError(f"no candidate {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    if wanted.only:
        return [candidate for candidate in offered if candidate.name in wanted.only]
    for name, reason in left_out.items():
        tell(f"{name} is left out: {reason}")
    if torch.device(device).type == "cpu" and "compiled" in names:
        left_out["compiled"] = "torch.compile takes long on a CPU; name it with --only to run it"
        tell(f"compiled is left out: {left_out['compiled']}")
        return [candidate for candidate in offered if candidate.name != "compiled"]
    return offered


def latents_of(candidate: Candidate, blocks: int) -> list[Tensor]:
    """The latents of a stream's first blocks."""
    stream = candidate.open()
    try:
        return [stream.step().latents.clone() for _ in range(blocks)]
    finally:
        stream.close()


def check(candidate: Candidate, reference: list[Tensor], tolerance: float) -> tuple[float | None, str | None]:
    """How far its latents are from the reference, and why it may not be timed, if so."""
    try:
        made = latents_of(candidate, len(reference))
    except (RuntimeError, InferixError) as error:
        return None, f"cannot run: {str(error).splitlines()[0]}"
    return max(map(difference, made, reference)), mismatch(made, reference, tolerance)


def difference(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want, relative to that of want."""
    want = want.double()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def mismatch(made: list[Tensor], reference: list[Tensor], tolerance: float) -> str | None:
    """The first block that is further off than the tolerance, in words; the last may be missing."""
    for index, (got, want) in enumerate(zip(made, reference, strict=False)):
        if got.shape != want.shape:
            return f"block {index} is {list(got.shape)}, expected {list(want.shape)}"
        off = difference(got, want)
        if not off <= tolerance:
            return f"the latents of block {index} are off by {off:.1e} of their size, allowed {tolerance:.1e}"
    return None


def one_round(candidate: Candidate, engine: Engine, blocks: int, taken: Taken) -> list[Tensor]:
    """One stream: filling its window, then `blocks` with and as many without the decoder; returns all latents."""
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
    finally:
        stream.close()
    return made


def timed(stream: Stream, device: str, decode: bool) -> tuple[Block, float]:
    """The next block and its seconds, the device idle before and after."""
    synchronize(device)
    begun = time.perf_counter()
    block = stream.step(decode)
    synchronize(device)
    return block, time.perf_counter() - begun


def look_inside(candidate: Candidate, engine: Engine, full: int, device: str) -> dict[str, Any]:
    """Memory by owner and launches of a block at a full window; not timed, since looking slows it down."""
    stream = candidate.open()
    try:
        for _ in range(full):
            stream.step()
        memory: dict[str, int | None] = {**weights_facts(engine), **candidate.owners(stream)}
        if torch.device(device).type == "cpu":
            stream.step()
            return {"memory": memory | {"process": process_memory()}, "launches": None}
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        stream.step()
        memory |= {
            "scratch": torch.cuda.max_memory_allocated(device) - before,
            "peak": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.memory_reserved(device),
        }  # fmt: skip
        return {"memory": memory, "launches": launches_of(stream, device)}
    finally:
        stream.close()


def launches_of(stream: Stream, device: str) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        stream.step()
        synchronize(device)
    return count_launches(event.name for event in profiled.events())


def count_launches(names: Iterable[str]) -> int:
    """Calls that hand the device work: single kernels, and whole graphs as one."""
    return sum(name in LAUNCHES for name in names)


def weights_facts(engine: Engine) -> dict[str, int]:
    return {
        "transformer weights": sum(weight.nbytes for weight in engine.parts.transformer.parameters()),
        "decoder weights": sum(weight.nbytes for weight in engine.parts.vae.parameters()),
    }


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
