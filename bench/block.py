"""The block benchmark: one block at a full window, stage by stage, against the plain loop, in one run.

A window is filled by running the stream, and the way there gives the growing curve. A candidate whose outputs differ
from the eager executor's is refused before the clock starts; then all that was timed is held against a stream of that
executor that is as long. Layers and pages in fewer bits are for our graph executors alone: the others compute in full.
Candidates take turns, so that a card that heats up slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from ..errors import InferixError, UsageError
from ..runtime.capacity.planner import long_on_cpu
from ..runtime.engine import Engine
from ..runtime.sampler import scheduled_blocks
from ..schemes.block_schedule import ScheduledBlock
from .baseline import Made
from .candidates import Candidate, EngineStream, Stream, candidates, choose, failures, judge_of, kept, trouble
from .inside import look_inside
from .machine import card_of, environment, measure_ceilings, synchronize
from .result import Result, Series
from .subject import ORACLE, Subject, described, in_fewer_bits, open_engine, random_prompt
from .work import (
    Work,
    blocks_until_full,
    decoder_work,
    pass_work,
    stays_full,
    until_seen,
)

Tell = Callable[[str], None]
CLOCK = (
    "block: host's wall clock from asking for a block until its uint8 frames lie in host memory and the device is "
    "idle: noise, prompt and context work, all denoising passes, the commit, the decoder, conversion and copy. "
    "transformer: the same without decoder and frames. interval: from one block to the next in a stream without an "
    "end, so that each is decoded while the next is made; taken where all later blocks see a full window. Left out: "
    "loading, text encoder, compilation (a whole stream runs before), video encoding, network. Where the next block "
    "needs the last one's pixels, transformer is block less the decoder."
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
            bench.take(candidate, turn)
    bench.look_inside()
    return bench.result()


class Bench:
    """One run: the engine, its candidates, what their outputs must be, and what was found so far."""

    def __init__(self, wanted: Wanted, tell: Tell) -> None:
        self.wanted, self.tell, subject = wanted, tell, wanted.subject
        self.engine = open_engine(replace(subject, executor=ORACLE))
        self.device = str(self.engine.device)
        self.environment = environment(self.device)
        preset = self.engine.preset
        size = subject.size or self.engine.default_size
        said = long_on_cpu(self.engine.spec, preset, self.engine.parts.vae.spec, size)
        if self.engine.device.type == "cpu" and said:
            tell(said)
        self.full = blocks_until_full(preset)
        self.plan = next(islice(scheduled_blocks(preset), self.full, None))
        rows = random_prompt(self.engine, subject.seed)
        offered, self.left_out = candidates(self.engine, rows, subject)
        self.chosen = choose(offered, self.left_out, wanted.executors, wanted.baselines, self.device)
        for name, reason in self.left_out.items():
            tell(f"{name} is left out: {reason}")
        tell("measuring what the machine can do")
        self.ceilings = measure_ceilings(self.device, self.engine.dtype, self.engine.config.lowp)
        tell(f"the window is full at block {self.full}: {self.plan.context} latent frames")
        plans, window, needs_pixels = scheduled_blocks(preset), self.plan.context, preset.context.needs_pixels
        self.shown = until_seen(plans, window, wanted.blocks)  # first with pictures, then without, if that can be
        self.bare = [] if needs_pixels else until_seen(plans, window, wanted.blocks)
        self.steady = stays_full(preset)
        lasting = wanted.blocks + 1 if self.steady else 0
        decoded = [True] * len(self.shown) + [False] * len(self.bare) + [True] * lasting
        self.judge = judge_of(self.engine, rows, subject, decoded)
        if self.judge.bits_off is not None:
            tell(f"in these bits the plain executor is off by {self.judge.bits_off:.1e}")
        self.told: dict[str, dict[str, Any]] = {}
        self.taken = {candidate.name: Taken() for candidate in self.chosen}
        self.clocks: list[dict[str, Any]] = []

    def check_outputs(self) -> None:
        """Refuse candidates whose outputs do not match."""
        for candidate in self.chosen:
            off, refused = self.judge.check(candidate, self.full + 2)
            self.told[candidate.name] = {
                "about": candidate.about, "difference": off, "allowed": self.judge.allowed(candidate),
                "refused": refused, "fewer_bits": candidate.fewer_bits,
            }  # fmt: skip
            said = f"refused, {refused}" if refused else f"outputs match (off by {off:.1e})"
            self.tell(f"{candidate.name}: {said}")

    @property
    def accepted(self) -> list[Candidate]:
        """Candidates that have not been refused; InferixError if there is none."""
        found = [candidate for candidate in self.chosen if not self.told[candidate.name]["refused"]]
        if not found:
            reasons = "; ".join(f"{name}: {one['refused']}" for name, one in self.told.items())
            raise InferixError(f"nothing was timed, since no candidate's outputs match those of {ORACLE}: {reasons}")
        return found

    def in_turn(self, turn: int) -> list[Candidate]:
        """The candidates of a round, another one first each time."""
        accepted = self.accepted
        first = turn % len(accepted)
        return accepted[first:] + accepted[:first]

    def take(self, candidate: Candidate, turn: int) -> None:
        """Time one stream of a candidate; one that fails, or whose outputs differ now, is refused after all."""
        try:
            wrong = self.judge.refusal(candidate, self.time_stream(candidate, turn))
        except failures() as error:
            wrong = trouble(error)
        if wrong:
            self.told[candidate.name]["refused"] = f"in round {turn + 1}: {wrong}"
            self.tell(f"{candidate.name}: refused in round {turn + 1}, {wrong}")

    def time_stream(self, candidate: Candidate, turn: int) -> list[Made]:
        """Take the times of one stream; returns all its blocks."""
        stream, taken = candidate.open(), self.taken[candidate.name]
        try:
            made = self.with_decoder(stream, taken)
            made += self.without_decoder(stream, taken)
            if isinstance(stream, EngineStream) and self.steady:
                more, intervals = stream.run(self.wanted.blocks)
                made += more
                for seconds in intervals:
                    taken.add("interval", seconds)
            if card := card_of(self.device):
                self.clocks.append({"round": turn + 1, "candidate": candidate.name, **card.state()})
        finally:
            stream.close()
        return made

    def with_decoder(self, stream: Stream, taken: Taken) -> list[Made]:
        """Blocks until the window is full, then those wanted, with pixels; returns all."""
        card, made = card_of(self.device), list[Made]()
        joules, metered = None, 0
        for plan in self.shown:
            if plan.context == self.plan.context and not metered:
                joules = card.energy() if card else None
            block, seconds = timed(stream, self.device, decode=True)
            made.append(kept(block))
            taken.growth.setdefault(plan.context, []).append(seconds)
            if plan.context < self.plan.context:
                metered = 0
                continue
            metered += 1
            self.note(block, seconds, plan, taken)
        if card and joules is not None and (now := card.energy()) is not None:
            taken.add("energy", (now - joules) / metered)
        return made

    def note(self, block: Made, seconds: float, plan: ScheduledBlock, taken: Taken) -> None:
        """Keep the times of one block at a full window."""
        taken.add("block", seconds)
        for stage, part in block.timings.items():
            taken.add(stage, part)
        if len(block.passes) == len(plan.passes):
            for index, part in enumerate(block.passes):
                taken.add(f"pass {index}", part)
        if self.engine.preset.context.needs_pixels:  # its next block waits for the decoder, which cannot be left out
            taken.add("transformer", seconds - block.timings["decode"])

    def without_decoder(self, stream: Stream, taken: Taken) -> list[Made]:
        """The blocks after them, without pixels; returns all."""
        made = []
        for plan in self.bare:
            block, seconds = timed(stream, self.device, decode=False)
            made.append(kept(block))
            if plan.context == self.plan.context:
                taken.add("transformer", seconds)
        return made

    def look_inside(self) -> None:
        """With one candidate's engine there at a time, or one's memory would be counted with another's."""
        for candidate in self.accepted:
            self.tell(f"looking inside {candidate.name}")
            for one in self.chosen:
                one.drop()
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


def block_facts(engine: Engine, plan: ScheduledBlock, full: int) -> dict[str, Any]:
    return {
        "latent_frames": len(plan.span.frames), "pixel_frames": len(plan.span.frames) * engine.spec.vae_stride[0],
        "window_frames": plan.context, "blocks_before_full": full, "fps": engine.fps,
        "passes": [
            {"kind": scheduled.kind, "frames": len(scheduled.run.frames), "context": scheduled.context}
            for scheduled in plan.passes
        ],
    }  # fmt: skip


def work_facts(engine: Engine, plan: ScheduledBlock, subject: Subject) -> dict[str, Any]:
    """FLOPs and bytes of each pass of the block and of decoding it, in the model's dtype; where layers or pages are in
    fewer bits, also those of the passes in these.
    """
    config, size = engine.config, subject.size or engine.default_size
    branches = 2 if engine.preset.sampler.guidance_scale != 1 else 1

    def counted(*bits: Any) -> dict[str, Any]:
        runs = [scheduled.run for scheduled in plan.passes for _ in range(branches)]
        passes = [pass_work(engine.spec, run, size, config.dtype, *bits) for run in runs]
        return {"passes": [asdict(work) for work in passes], "transformer": asdict(sum(passes, Work(0, 0)))}

    decoder = decoder_work(engine.parts.vae.spec, engine.spec.latent_size(size), len(plan.span.frames), config.dtype)
    return {
        **counted(),
        **({"fewer_bits": counted(config.kv_dtype, config.precision_map)} if in_fewer_bits(engine.config) else {}),
        "decoder": asdict(decoder),
        "counted": "from the sizes and passes of the block; bytes are the least that must move",
    }
