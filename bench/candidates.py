"""What is timed, and whether it may be: our executors and the baselines, over the same weights, held against `eager`.

A candidate whose latents differ from the eager executor's by more than is allowed is refused, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InferixError, UsageError, nearest
from ..runtime.engine import Engine
from .baseline import Made, PlainLoop, compiled_layer, run_layer, why_not
from .subject import ORACLE, Subject, in_fewer_bits, in_full, random_prompt, with_executor
from .work import blocks_until_full

NONE = "none"  # no baseline
# Largest root mean square of the difference to the oracle's latents, relative to theirs, over all checked blocks.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.04}
BITS_MARGIN = 1.1  # how much further off than the plain executor in the same bits; another error may be 0.46 of theirs


class Stream(Protocol):
    """A candidate's stream of blocks."""

    def step(self, decode: bool = True) -> Made:
        """The next block."""

    def close(self) -> None:
        """Free its memory."""


@dataclass(frozen=True)
class Candidate:
    """What is timed: `open` begins a stream, `owners` tells the bytes a stream holds, by owner. `drop` lets go of what
    is kept between streams. fewer_bits: whether layers or pages are in another precision than the oracle's.
    """

    name: str
    about: str
    open: Callable[[], Stream]
    owners: Callable[[Any], dict[str, int]]
    drop: Callable[[], None] = lambda: None
    fewer_bits: bool = False


class EngineStream:
    """A session as a stream."""

    def __init__(self, engine: Engine, rows: Tensor, seed: int, size: tuple[int, int]) -> None:
        self.begun_with = (rows, seed, size)
        self.session = engine.open(prompt_embeds=rows, seed=seed, size=size)

    def again(self, engine: Engine) -> EngineStream:
        """The same stream from its beginning, on another engine."""
        return EngineStream(engine, *self.begun_with)

    def step(self, decode: bool = True) -> Made:
        (block,) = self.session.stream(1, decode)
        return Made(block.latents, block.frames, dict(block.timings), tuple(block.record.passes))

    def intervals(self, blocks: int) -> list[float]:
        """Seconds between so many blocks that are asked for at once, so that decoding is beside the next block."""
        arrivals = [time.perf_counter() for _ in self.session.stream(blocks + 1)]
        return [after - before for before, after in pairwise(arrivals)]

    def close(self) -> None:
        self.session.close()


EXECUTOR_NOTES = {
    ORACLE: "the engine's plain executor, pass by pass, all in the model's dtype: what all others must equal",
    "fused": "the rewritten graph, its calls launched one by one",
    "captured": "the rewritten graph, a whole block replayed as one CUDA graph where the preset allows it",
}
BASELINE_NOTES = {
    "plain": "a loop in the structure of the public reference: contiguous cache rolled by copying, embeddings in every "
    "pass, torch's attention",
    "compiled": "the plain loop with every layer through torch.compile",
}


def candidates(engine: Engine, rows: Tensor, subject: Subject) -> tuple[list[Candidate], dict[str, str]]:
    """All that can run this preset here, the oracle first, and why others cannot."""
    left_out = {} if engine.device.type == "cuda" else {"captured": "it needs a GPU"}
    if reason := why_not(engine.preset):
        left_out |= dict.fromkeys(BASELINE_NOTES, reason)
    found = [
        executor_candidate(engine, name, rows, subject) for name in EXECUTOR_NOTES if name not in left_out
    ] + [baseline_candidate(engine, name, rows, subject) for name in BASELINE_NOTES if name not in left_out]
    return found, left_out


def executor_candidate(engine: Engine, name: str, rows: Tensor, subject: Subject) -> Candidate:
    """One of our executors, the oracle in full precision and others in the engine's bits; its engine is made when it is
    first asked for a stream, and kept.
    """
    made: list[Engine] = []

    def begin() -> EngineStream:
        made[:] = made or [in_full(engine) if name == ORACLE else with_executor(engine, name)]
        return EngineStream(made[0], rows, subject.seed, subject.size or engine.default_size)

    def owners(stream: EngineStream) -> dict[str, int]:
        session = stream.session
        cache = sum(branch.cache.nbytes for branch in session.branches)
        return {"cache": cache, "decoder state": session.track.nbytes, **made[0].executor.bytes_by_owner()}

    return Candidate(name, EXECUTOR_NOTES[name], begin, owners, made.clear, name != ORACLE and in_fewer_bits(engine))


def baseline_candidate(engine: Engine, name: str, rows: Tensor, subject: Subject) -> Candidate:
    """The plain loop over the engine's weights, as it is or compiled."""

    def begin() -> PlainLoop:
        layer = compiled_layer() if name == "compiled" else run_layer
        return PlainLoop(engine, rows, subject.seed, subject.size or engine.default_size, layer)

    def owners(stream: PlainLoop) -> dict[str, int]:
        return {"cache": stream.cache_bytes, "decoder state": stream.decoder.nbytes}

    return Candidate(name, BASELINE_NOTES[name], begin, owners)


def choose(
    offered: list[Candidate],
    left_out: dict[str, str],
    executors: tuple[str, ...],
    baselines: tuple[str, ...],
    device: str,
) -> list[Candidate]:
    """Those asked for by name; without a word, all but what takes minutes to compile on a CPU, noted in `left_out`."""
    if torch.device(device).type == "cpu" and "compiled" not in (*left_out, *baselines):
        left_out["compiled"] = "torch.compile takes long on a CPU; name it with --baseline to run it"
    names = [candidate.name for candidate in offered if candidate.name not in left_out]
    chosen: list[str] = []
    for option, asked, known in (
        ("executor", executors, [*EXECUTOR_NOTES]), ("baseline", baselines, [*BASELINE_NOTES, NONE])
    ):  # fmt: skip
        for name in asked:
            if name not in known:
                raise UsageError(f"no {option} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
            if name in left_out:
                raise UsageError(f"--{option} {name} cannot run here: {left_out[name]}")
        chosen += asked or [name for name in names if name in known]
    return [candidate for candidate in offered if candidate.name in chosen]


@dataclass(frozen=True)
class Judge:
    """What latents must be, and how far from that they may be: root mean square relative to theirs, in any block.

    bits_off: how far the plain executor is with layers and pages in the engine's bits; None where those are the
    model's own. Who is further off than that, and a tenth more, has made another mistake than the bits.
    """

    reference: list[Tensor]
    tolerance: float
    bits_off: float | None = None

    def allowed(self, candidate: Candidate) -> float:
        if not candidate.fewer_bits:
            return self.tolerance
        assert self.bits_off is not None
        return max(self.tolerance, BITS_MARGIN * self.bits_off)

    def off(self, made: list[Tensor]) -> float:
        """The furthest of some blocks from the stream's beginning."""
        return max(map(difference, made, self.reference))

    def mismatch(self, candidate: Candidate, made: list[Tensor]) -> str | None:
        """The first block that is further off than allowed, in words; the last may be missing."""
        allowed = self.allowed(candidate)
        for index, (got, want) in enumerate(zip(made, self.reference, strict=False)):
            if got.shape != want.shape:
                return f"block {index} is {list(got.shape)}, expected {list(want.shape)}"
            off = difference(got, want)
            if not off <= allowed:
                return f"the latents of block {index} are off by {off:.1e} of their size, allowed {allowed:.1e}"
        return None

    def check(self, candidate: Candidate) -> tuple[float | None, str | None]:
        """How far a candidate's latents are off, and why it may not be timed, if so."""
        try:
            made = latents_of(candidate.open(), len(self.reference))
        except (RuntimeError, InferixError) as error:
            return None, f"cannot run: {str(error).splitlines()[0]}"
        return self.off(made), self.mismatch(candidate, made)


def judge_of(engine: Engine, rows: Tensor, subject: Subject, blocks: int) -> Judge:
    """By the first blocks of a stream of the oracle."""
    tolerance, oracle = TOLERANCE[engine.dtype], executor_candidate(engine, ORACLE, rows, subject)
    judge = Judge(latents_of(oracle.open(), blocks), tolerance)
    if not in_fewer_bits(engine):
        return judge
    plain = EngineStream(with_executor(engine, ORACLE), rows, subject.seed, subject.size or engine.default_size)
    return replace(judge, bits_off=judge.off(latents_of(plain, blocks)))


def latents_of(stream: Stream, blocks: int) -> list[Tensor]:
    """The latents of a stream's first blocks; it is closed."""
    try:
        return [stream.step().latents.clone() for _ in range(blocks)]
    finally:
        stream.close()


def difference(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want, relative to that of want."""
    want = want.double()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def check_executor(engine: Engine, subject: Subject) -> dict[str, float | None]:
    """How far an engine's executor is from the oracle, and what is allowed; InferixError if that is too far."""
    name, rows = engine.config.executor, random_prompt(engine, subject.seed)
    if name == ORACLE and not in_fewer_bits(engine):
        return {"difference": 0.0, "tolerance": TOLERANCE[engine.dtype], "bits_off": None}
    judge = judge_of(engine, rows, subject, blocks_until_full(engine.preset) + 2)
    if name == ORACLE:  # what the others' bits are held against
        return {"difference": judge.bits_off, "tolerance": judge.tolerance, "bits_off": judge.bits_off}
    ours = executor_candidate(engine, name, rows, subject)
    off, refused = judge.check(ours)
    if refused:
        raise InferixError(f"executor {name} is refused and nothing was timed: {refused}")
    return {"difference": off, "tolerance": judge.allowed(ours), "bits_off": judge.bits_off}
