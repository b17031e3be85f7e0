"""Block benchmark: one block at a full window, stage by stage, executors beside the plain loop, in one run.

The window is filled by running the stream; these blocks give the curve of block time over window size. A candidate
whose outputs differ from the eager executor's is refused before it is timed. Afterwards all timed outputs are compared
with an equally long stream of that executor. Only the graph executors have low-precision layers and pages. Candidates
run in rounds, so that a GPU that heats up slows all of them.
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
from ..schemes.page_needs import branches
from .baseline import BlockOutput
from .candidates import (
    Candidate,
    EngineStream,
    Stream,
    candidate_errors,
    candidates,
    choose,
    cloned,
    failure_reason,
    make_checker,
)
from .inspection import inspect_block
from .machine import card_of, environment, measure_ceilings, synchronize
from .result import Result, Series
from .subject import ORACLE, Subject, describe, end_ranks, open_engine, random_prompt, uses_fewer_bits
from .work import (
    Work,
    blocks_until_full,
    decoder_work,
    pass_work,
    stays_full,
    until_seen,
)

Log = Callable[[str], None]
CLOCK = (
    "block: host's wall clock from asking for a block until its uint8 frames lie in host memory and the device is "
    "idle: noise, prompt and context work, all denoising passes, the commit, the decoder, conversion and copy. "
    "transformer: the same without decoder and frames. interval: from one block to the next in a stream without an "
    "end, so that each is decoded while the next is made; taken where all later blocks see a full window. Left out: "
    "loading, text encoder, compilation (a whole stream runs before), video encoding, network. Where the next block "
    "needs the last one's pixels, transformer is block less the decoder."
)


@dataclass(frozen=True)
class Options:
    """Options of a run; raises UsageError for a count below 1.

    rounds: streams per candidate. blocks: blocks timed at a full window of each stream, with the decoder and again
    without. executors, baselines: names; empty for all that suit the device, `none` for no baseline.
    """

    subject: Subject
    rounds: int = 3
    blocks: int = 5
    executors: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("rounds", "blocks"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} is {getattr(self, key)}; expected 1 or more")


@dataclass
class Samples:
    """Samples of one candidate by quantity, and block times by frames in the window."""

    series: dict[str, list[float]] = field(default_factory=dict)
    growth: dict[int, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.series.setdefault(name, []).append(value)


def run(options: Options, log: Log) -> Result:
    """Check, then time, every candidate.

    Raises UsageError for a subject that cannot be measured and InferixError if no candidate's outputs match.
    """
    bench = Bench(options, log)
    try:
        bench.check_outputs()
        for index in range(options.rounds):
            for candidate in bench.in_round_order(index):
                log(f"round {index + 1} of {options.rounds}: {candidate.name}")
                bench.time_candidate(candidate, index)
        bench.inspect_candidates()
        return bench.result()
    finally:
        bench.end_ranks()


class Bench:
    """One run: the engine, its candidates, the reference for their outputs, and the measurements so far."""

    def __init__(self, options: Options, log: Log) -> None:
        self.options, self.log, subject = options, log, options.subject
        self.engine = open_engine(replace(subject, executor=ORACLE))
        self.device = str(self.engine.device)
        self.environment = environment(self.device)
        if self.engine.layout_reason is not None:
            log(f"parallel={self.engine.config.parallel}: {self.engine.layout_reason}")
        preset = self.engine.preset
        size = subject.size or self.engine.default_size
        warning = long_on_cpu(self.engine.spec, preset, self.engine.parts.vae.spec, size)
        if self.engine.device.type == "cpu" and warning:
            log(warning)
        self.full = blocks_until_full(preset)
        self.plan = next(islice(scheduled_blocks(preset), self.full, None))
        rows = random_prompt(self.engine, subject.seed)
        offered, self.left_out = candidates(self.engine, rows, subject)
        self.chosen = choose(offered, self.left_out, options.executors, options.baselines, self.device)
        for name, reason in self.left_out.items():
            log(f"{name} is left out: {reason}")
        log("measuring the machine's ceilings")
        self.ceilings = measure_ceilings(self.device, self.engine.dtype, self.engine.config.lowp)
        log(f"the window is full at block {self.full}: {self.plan.context} latent frames")
        plans, window, needs_pixels = scheduled_blocks(preset), self.plan.context, preset.context.needs_pixels
        self.decoded = until_seen(plans, window, options.blocks)  # blocks with the decoder, then without, if possible
        self.undecoded = [] if needs_pixels else until_seen(plans, window, options.blocks)
        self.steady = stays_full(preset)
        continuous = options.blocks + 1 if self.steady else 0
        decoded = [True] * len(self.decoded) + [False] * len(self.undecoded) + [True] * continuous
        self.checker = make_checker(self.engine, rows, subject, decoded)
        if self.checker.bits_off is not None:
            log(f"difference of the eager executor in low precision: {self.checker.bits_off:.1e}")
        self.candidate_facts: dict[str, dict[str, Any]] = {}
        self.samples = {candidate.name: Samples() for candidate in self.chosen}
        self.clocks: list[dict[str, Any]] = []

    def check_outputs(self) -> None:
        """Refuse candidates whose outputs do not match."""
        for candidate in self.chosen:
            difference, refused = self.checker.check(candidate, self.full + 2)
            self.candidate_facts[candidate.name] = {
                "about": candidate.about, "difference": difference, "allowed": self.checker.allowed(candidate),
                "refused": refused, "fewer_bits": candidate.fewer_bits,
            }  # fmt: skip
            verdict = f"refused, {refused}" if refused else f"outputs match (difference {difference:.1e})"
            self.log(f"{candidate.name}: {verdict}")

    @property
    def accepted(self) -> list[Candidate]:
        """Candidates that have not been refused; InferixError if there is none."""
        accepted = [candidate for candidate in self.chosen if not self.candidate_facts[candidate.name]["refused"]]
        if not accepted:
            reasons = "; ".join(f"{name}: {facts['refused']}" for name, facts in self.candidate_facts.items())
            raise InferixError(f"no candidate's outputs match those of {ORACLE}, so nothing was timed: {reasons}")
        return accepted

    def in_round_order(self, index: int) -> list[Candidate]:
        """Candidates in the order of a round: each round begins with another one."""
        accepted = self.accepted
        first = index % len(accepted)
        return accepted[first:] + accepted[:first]

    def time_candidate(self, candidate: Candidate, index: int) -> None:
        """Time one stream of a candidate; refuse the candidate if the stream fails or its outputs differ."""
        try:
            wrong = self.checker.refusal(candidate, self.time_stream(candidate, index))
        except candidate_errors() as error:
            wrong = failure_reason(error)
        if wrong:
            self.candidate_facts[candidate.name]["refused"] = f"in round {index + 1}: {wrong}"
            self.log(f"{candidate.name}: refused in round {index + 1}, {wrong}")

    def time_stream(self, candidate: Candidate, index: int) -> list[BlockOutput]:
        """Time one stream; return all its blocks."""
        stream, samples = candidate.open(), self.samples[candidate.name]
        try:
            outputs = self.with_decoder(stream, samples)
            outputs += self.without_decoder(stream, samples)
            if isinstance(stream, EngineStream) and self.steady:
                more, intervals = stream.run(self.options.blocks)
                outputs += more
                for seconds in intervals:
                    samples.add("interval", seconds)
            if card := card_of(self.device):
                self.clocks.append({"round": index + 1, "candidate": candidate.name, **card.state()})
        finally:
            stream.close()
        return outputs

    def with_decoder(self, stream: Stream, samples: Samples) -> list[BlockOutput]:
        """Fill the window, then time decoded blocks at a full window; return all of them."""
        card = card_of(self.device) if self.engine.config.gpus == 1 else None  # energy is that of all GPUs
        outputs = list[BlockOutput]()
        joules, metered = None, 0
        for plan in self.decoded:
            if plan.context == self.plan.context and not metered:
                joules = card.energy() if card else None
            block, seconds = timed(stream, self.device, decode=True)
            outputs.append(cloned(block))
            samples.growth.setdefault(plan.context, []).append(seconds)
            if plan.context < self.plan.context:
                metered = 0
                continue
            metered += 1
            self.add_block(block, seconds, plan, samples)
        if card and joules is not None and (now := card.energy()) is not None:
            samples.add("energy", (now - joules) / metered)
        return outputs

    def add_block(self, block: BlockOutput, seconds: float, plan: ScheduledBlock, samples: Samples) -> None:
        """Add the times of one block at a full window to the samples."""
        samples.add("block", seconds)
        for stage, part in block.timings.items():
            samples.add(stage, part)
        if len(block.passes) == len(plan.passes):
            for index, part in enumerate(block.passes):
                samples.add(f"pass {index}", part)
        if self.engine.preset.context.needs_pixels:  # the next block waits for the decoder, so every block is decoded
            samples.add("transformer", seconds - block.timings["decode"])

    def without_decoder(self, stream: Stream, samples: Samples) -> list[BlockOutput]:
        """Time the blocks after them without decoding; return all of them."""
        outputs = []
        for plan in self.undecoded:
            block, seconds = timed(stream, self.device, decode=False)
            outputs.append(cloned(block))
            if plan.context == self.plan.context:
                samples.add("transformer", seconds)
        return outputs

    def inspect_candidates(self) -> None:
        """Inspect each candidate while no other has an engine: memory would be counted together."""
        for candidate in self.accepted:
            self.log(f"inspecting {candidate.name}")
            for other in self.chosen:
                other.drop()
            self.candidate_facts[candidate.name] |= inspect_block(candidate, self.engine, self.full, self.ceilings)

    def end_ranks(self) -> None:
        """End the ranks of all candidates."""
        for candidate in self.chosen:
            candidate.drop()
        end_ranks(self.engine)

    def result(self) -> Result:
        about, settings = describe(self.engine, self.options.subject)
        accepted = {candidate.name: self.samples[candidate.name] for candidate in self.accepted}
        return Result(
            kind="block", clock=CLOCK, environment=self.environment, subject=about,
            settings=settings | {"rounds": self.options.rounds, "blocks": self.options.blocks}, ceilings=self.ceilings,
            series={
                f"{name}/{quantity}": Series("J" if quantity == "energy" else "s", tuple(samples))
                for name, one in accepted.items() for quantity, samples in one.series.items()
            },
            facts={
                "oracle": ORACLE, "tolerance": self.checker.tolerance, "bits_off": self.checker.bits_off,
                "candidates": self.candidate_facts, "left_out": self.left_out,
                "block": block_facts(self.engine, self.plan, self.full),
                "work": work_facts(self.engine, self.plan, self.options.subject),
                "growth": {
                    name: {str(frames): samples for frames, samples in sorted(one.growth.items())}
                    for name, one in accepted.items()
                },
                "clocks_in_between": self.clocks,
            },
        )  # fmt: skip


def timed(stream: Stream, device: str, decode: bool) -> tuple[BlockOutput, float]:
    """Compute the next block; return it and its seconds, from an idle device to an idle device."""
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
    """FLOPs and bytes of each pass of a block and of its decoding, in the model's dtype.

    With low-precision layers or pages, `fewer_bits` has the same for the passes in that precision.
    """
    config, size = engine.config, subject.size or engine.default_size
    runs_each = branches(engine.preset)

    def count(*bits: Any) -> dict[str, Any]:
        runs = [scheduled.run for scheduled in plan.passes for _ in range(runs_each)]
        passes = [pass_work(engine.spec, run, size, config.dtype, *bits) for run in runs]
        return {"passes": [asdict(work) for work in passes], "transformer": asdict(sum(passes, Work(0, 0)))}

    decoder = decoder_work(engine.parts.vae.spec, engine.spec.latent_size(size), len(plan.span.frames), config.dtype)
    return {
        **count(),
        **({"fewer_bits": count(config.kv_dtype, config.precision_map)} if uses_fewer_bits(engine.config) else {}),
        "decoder": asdict(decoder),
        "counted": "from the sizes and passes of the block; bytes are the least that must move",
    }
