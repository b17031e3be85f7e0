"""The block benchmark: one block at a full window, stage by stage, against the plain loop, in one run.

A window is filled by running the stream, and the way there gives the growing curve. A candidate whose latents differ
from the eager executor's is refused before the clock starts; what was timed is compared once more after it. Layers and
pages in fewer bits are for our graph executors alone: the baselines and the oracle compute in full.
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
from .candidates import Candidate, EngineStream, Stream, candidates, choose, judge_of
from .inside import look_inside
from .machine import card_of, environment, measure_ceilings, synchronize
from .result import Result, Series
from .subject import ORACLE, Subject, described, in_fewer_bits, open_engine, random_prompt
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
    bench = Bench(wanted, tell)
    bench.check_outputs()
    for turn in range(wanted.rounds):
        for candidate in bench.in_turn(turn):
            tell(f"round {turn + 1} of {wanted.rounds}: {candidate.name}")
            bench.take(candidate)
    bench.look_inside()
    return bench.result()


class Bench:
    """One run: the engine, its candidates, what their outputs must be, and what was found so far."""

    def __init__(self, wanted: Wanted, tell: Tell) -> None:
        self.wanted, self.tell, subject = wanted, tell, wanted.subject
        self.engine = open_engine(replace(subject, executor=ORACLE))
        self.device = str(self.engine.device)
        self.environment = environment(self.device)
        self.full = blocks_until_full(self.engine.preset)
        self.plan = next(islice(plan_blocks(self.engine.preset), self.full, None))
        rows = random_prompt(self.engine, subject.seed)
        offered, self.left_out = candidates(self.engine, rows, subject)
        self.chosen = choose(offered, self.left_out, wanted.executors, wanted.baselines, self.device)
        for name, reason in self.left_out.items():
            tell(f"{name} is left out: {reason}")
        tell("measuring what the machine can do")
        self.ceilings = measure_ceilings(self.device, self.engine.dtype, self.engine.config.lowp)
        tell(f"the window is full at block {self.full}: {self.plan.context} latent frames")
        self.judge = judge_of(self.engine, rows, subject, self.full + 2)
        if self.judge.bits_off is not None:
            tell(f"in these bits the plain executor is off by {self.judge.bits_off:.1e}")
        self.told: dict[str, dict[str, Any]] = {}
        self.taken = {candidate.name: Taken() for candidate in self.chosen}
        self.clocks: list[dict[str, Any]] = []

    def check_outputs(self) -> None:
        """Refuse candidates whose outputs do not match; InferixError if none is left."""
        for candidate in self.chosen:
            off, refused = self.judge.check(candidate)
            self.told[candidate.name] = {
                "about": candidate.about, "difference": off, "allowed": self.judge.allowed(candidate),
                "refused": refused, "fewer_bits": candidate.fewer_bits,
            }  # fmt: skip
            said = f"refused, {refused}" if refused else f"outputs match (off by {off:.1e})"
            self.tell(f"{candidate.name}: {said}")
        if not self.accepted:
            raise InferixError("nothing was timed, since no candidate's outputs match those of the eager executor")

    @property
    def accepted(self) -> list[Candidate]:
        return [candidate for candidate in self.chosen if not self.told[candidate.name]["refused"]]

    def in_turn(self, turn: int) -> list[Candidate]:
        """The candidates of a round, another one first each time."""
        first = turn % max(1, len(self.accepted))
        return self.accepted[first:] + self.accepted[:first]

    def take(self, candidate: Candidate) -> None:
        """Time one stream of a candidate; one whose outputs differ now is refused after all."""
        stream = candidate.open()
        try:
            made = self.with_decoder(stream, self.taken[candidate.name])
            made += self.without_decoder(stream, self.taken[candidate.name], len(made))
            if isinstance(stream, EngineStream):
                for seconds in stream.intervals(self.wanted.blocks):
                    self.taken[candidate.name].add("interval", seconds)
        finally:
            stream.close()
        if card := card_of(self.device):
            self.clocks.append(card.state())
        if wrong := self.judge.mismatch(candidate, made):
            self.told[candidate.name]["refused"] = f"what was timed differs: {wrong}"

    def with_decoder(self, stream: Stream, taken: Taken) -> list[Tensor]:
        """Blocks until the window is full, then those wanted, with pixels; returns all latents."""
        card, made = card_of(self.device), list[Tensor]()
        joules, metered, counted = None, 0, 0
        for plan in plan_blocks(self.engine.preset):
            if plan.context == self.plan.context and not metered:
                joules = card.energy() if card else None
            block, seconds = timed(stream, self.device, decode=True)
            made.append(block.latents.clone())
            taken.growth.setdefault(plan.context, []).append(seconds)
            if plan.context < self.plan.context:
                metered = 0
                continue
            counted, metered = counted + 1, metered + 1
            self.note(block, seconds, plan, taken)
            if counted == self.wanted.blocks:
                break
        if card and joules is not None and (now := card.energy()) is not None:
            taken.add("energy", (now - joules) / metered)
        return made

    def note(self, block: Made, seconds: float, plan: BlockPlan, taken: Taken) -> None:
        """Keep the times of one block at a full window."""
        taken.add("block", seconds)
        for stage, part in block.timings.items():
            taken.add(stage, part)
        if len(block.passes) == len(plan.steps):
            for index, part in enumerate(block.passes):
                taken.add(f"pass {index}", part)
        if self.engine.preset.context.needs_pixels:  # its next block waits for the decoder, which cannot be left out
            taken.add("transformer", seconds - block.timings["decode"])

    def without_decoder(self, stream: Stream, taken: Taken, done: int) -> list[Tensor]:
        """As many more blocks of a stream, after `done`, without pixels; returns all latents."""
        made, counted = list[Tensor](), 0
        if self.engine.preset.context.needs_pixels:
            return made
        for plan in islice(plan_blocks(self.engine.preset), done, None):
            block, seconds = timed(stream, self.device, decode=False)
            made.append(block.latents.clone())
            if plan.context == self.plan.context:
                taken.add("transformer", seconds)
                counted += 1
            if counted == self.wanted.blocks:
                break
        return made

    def look_inside(self) -> None:
        for candidate in self.accepted:
            self.tell(f"looking inside {candidate.name}")
            self.told[candidate.name] |= look_inside(candidate, self.engine, self.full, self.ceilings)

    def result(self) -> Result:
        about, settings = described(self.engine, self.wanted.subject)
        right = {candidate.name: self.taken[candidate.name] for candidate in self.accepted}
        return Result(
            kind="block", clock=CLOCK, environment=self.environment, subject=about,
            settings=settings | {"rounds": self.wanted.rounds, "blocks": self.wanted.blocks}, ceilings=self.ceilings,
            series={
                f"{name}/{quantity}": Series("J" if quantity == "energy" else "s", tuple(samples))
                for name, one in right.items() for quantity, samples in one.series.items()
            },
            facts={
                "oracle": ORACLE, "tolerance": self.judge.tolerance, "bits_off": self.judge.bits_off,
                "candidates": self.told, "left_out": self.left_out,
                "block": block_facts(self.engine, self.plan, self.full),
                "work": work_facts(self.engine, self.plan, self.wanted.subject),
                "growth": {
                    name: {str(frames): samples for frames, samples in sorted(one.growth.items())}
                    for name, one in right.items()
                },
                "clocks_in_between": self.clocks,
            },
        )  # fmt: skip


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
    """FLOPs and bytes of each pass of the block and of decoding it, in the model's dtype; where layers or pages are in
    fewer bits, also those of the passes in these.
    """
    config, size = engine.config, subject.size or engine.default_size
    branches = 2 if engine.preset.sampler.guidance_scale != 1 else 1

    def counted(*bits: Any) -> dict[str, Any]:
        steps = [step for step in plan.steps for _ in range(branches)]
        passes = [pass_work(engine.spec, step.run, size, config.dtype, *bits) for step in steps]
        return {"passes": [asdict(work) for work in passes], "transformer": asdict(sum(passes, Work(0, 0)))}

    decoder = decoder_work(engine.parts.vae.spec, engine.spec.latent_size(size), len(plan.frames), config.dtype)
    return {
        **counted(),
        **({"fewer_bits": counted(config.kv_dtype, config.precision_map)} if in_fewer_bits(engine) else {}),
        "decoder": asdict(decoder),
        "counted": "from the sizes and passes of the block; bytes are the least that must move",
    }
