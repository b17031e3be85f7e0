"""What is timed, and whether it may be: our executors and the baselines, over the same weights, held against `eager`.

A candidate whose latents or frames differ from the eager executor's by more than is allowed is refused, with the
reason; so is one that fails, or whose programs were to be captured and are not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InferixError, UsageError, nearest
from ..runtime.engine import Engine
from ..runtime.execution.executors import GraphExecutor
from ..runtime.inputs import Pixels
from ..runtime.sessions.output_queue import Block
from .baseline import Made, PlainLoop, compiled_layer, run_layer, why_not
from .kernels import cannot_run
from .subject import ORACLE, Subject, in_fewer_bits, in_full, with_executor

NONE = "none"  # no baseline
# Largest root mean square of the difference to the oracle's latents, relative to theirs, over all checked blocks.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.04}
BITS_MARGIN = 1.1  # how much further off than the plain executor in the same bits, where that is above the tolerance
LEVELS = 2.0  # of 255, that pixels may be off beside what their latents are: decoders hand that on about as it is


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
    `fallbacks` says what could not be captured so far.
    """

    name: str
    about: str
    open: Callable[[], Stream]
    owners: Callable[[Any], dict[str, int]]
    drop: Callable[[], None] = lambda: None
    fewer_bits: bool = False
    fallbacks: Callable[[], list[str]] = list


class EngineStream:
    """A session as a stream."""

    def __init__(self, engine: Engine, rows: Tensor, seed: int, size: tuple[int, int]) -> None:
        self.session = engine.open(prompt_embeds=rows, seed=seed, size=size)

    def step(self, decode: bool = True) -> Made:
        (block,) = self.session.stream(1, decode)
        return made_of(block)

    def run(self, blocks: int) -> tuple[list[Made], list[float]]:
        """So many more blocks and one before them, and the seconds between them, of a stream without an end: decoding
        is beside the next block, and the clock stops while another one is being made. Nothing can follow.
        """
        taken, arrivals = [], []
        for block in islice(self.session.stream(), blocks + 1):
            arrivals.append(time.perf_counter())
            taken.append(block)
        return [made_of(block) for block in taken], [after - before for before, after in pairwise(arrivals)]

    def close(self) -> None:
        self.session.close()


def made_of(block: Block) -> Made:
    return Made(block.latents, block.frames, dict(block.timings), tuple(block.record.passes))


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
        cache = sum(branch.cache.nbytes for branch in session.current.branches)
        return {"cache": cache, "decoder state": session.current.decoder.nbytes, **made[0].executor.bytes_by_owner()}

    def fallbacks() -> list[str]:
        executors = [one.executor for one in made]
        return [said for one in executors if isinstance(one, GraphExecutor) for said in one.launcher.fallbacks]

    fewer_bits = name != ORACLE and in_fewer_bits(engine.config)
    return Candidate(name, EXECUTOR_NOTES[name], begin, owners, made.clear, fewer_bits, fallbacks)


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
    """What a stream's blocks must be, and how far from that they may be: root mean square relative to theirs, in any
    block; of frames as much of their contrast, and `LEVELS` more.

    reference: on the host, as long as the longest stream that is held against it, with frames where that has any.
    bits_off: how far the latents of the plain executor are with layers and pages in the engine's bits; None where those
    are the model's own. Who is further off than that, and a tenth more, has made another mistake than the bits, unless
    it is within the tolerance.
    """

    reference: list[Made]
    tolerance: float
    bits_off: float | None = None

    @property
    def decoded(self) -> list[bool]:
        """Which blocks have frames."""
        return [block.frames is not None for block in self.reference]

    def allowed(self, candidate: Candidate) -> float:
        if not candidate.fewer_bits:
            return self.tolerance
        assert self.bits_off is not None
        return max(self.tolerance, BITS_MARGIN * self.bits_off)

    def off(self, made: Sequence[Made]) -> float | None:
        """The furthest of the latents of a stream's first blocks; None where any is no number, or of another size."""
        pairs = [(got.latents, want.latents) for got, want in zip(made, self.reference, strict=False)]
        found = [difference(got, want) if got.shape == want.shape else math.nan for got, want in pairs]
        return max(found) if all(map(math.isfinite, found)) else None

    def mismatch(self, candidate: Candidate, made: Sequence[Made]) -> str | None:
        """The first of a stream's blocks that is further off than allowed, in words; there may be fewer of them than
        the reference has.
        """
        allowed = self.allowed(candidate)
        for index, (got, want) in enumerate(zip(made, self.reference[: len(made)], strict=True)):
            if got.latents.shape != want.latents.shape:
                return f"block {index} is {list(got.latents.shape)}, expected {list(want.latents.shape)}"
            off = difference(got.latents, want.latents)
            if not off <= allowed:
                return f"the latents of block {index} are off by {off:.1e} of their size, allowed {allowed:.1e}"
            if want.frames is None:
                continue
            if got.frames is None or got.frames.shape != want.frames.shape:
                found = None if got.frames is None else list(got.frames.shape)
                return f"the frames of block {index} are {found}, expected {list(want.frames.shape)}"
            levels, most = levels_off(got.frames, want.frames), LEVELS + allowed * levels_off(want.frames, 127.5)
            if levels > most:
                return f"the frames of block {index} are off by {levels:.1f} levels, allowed {most:.1f}"
        return None

    def refusal(self, candidate: Candidate, made: Sequence[Made]) -> str | None:
        """Why what a candidate has made must not count; None if it may."""
        if fallen := candidate.fallbacks():
            return f"not captured: {fallen[0]}"
        return self.mismatch(candidate, made)

    def check(self, candidate: Candidate, blocks: int) -> tuple[float | None, str | None]:
        """How far a candidate's first blocks are off, and why it may not be timed, if so."""
        try:
            made = outputs_of(candidate.open(), self.decoded[:blocks])
        except failures() as error:
            return None, trouble(error)
        return self.off(made), self.refusal(candidate, made)


def judge_of(engine: Engine, rows: Tensor, subject: Subject, decoded: Sequence[bool]) -> Judge:
    """By so many blocks of a stream of the oracle, each with frames or without."""
    tolerance, oracle = TOLERANCE[engine.dtype], executor_candidate(engine, ORACLE, rows, subject)
    made = outputs_of(oracle.open(), decoded)
    judge = Judge([replace(block, latents=block.latents.cpu()) for block in made], tolerance)
    if not in_fewer_bits(engine.config):
        return judge
    plain = EngineStream(with_executor(engine, ORACLE), rows, subject.seed, subject.size or engine.default_size)
    return replace(judge, bits_off=judge.off(outputs_of(plain, decoded)))


def outputs_of(stream: Stream, decoded: Sequence[bool]) -> list[Made]:
    """A stream's first blocks, with frames or without; it is closed."""
    try:
        return [kept(stream.step(decode)) for decode in decoded]
    finally:
        stream.close()


def kept(block: Made) -> Made:
    """A block whose latents nobody else writes to."""
    return replace(block, latents=block.latents.clone())


def failures() -> tuple[type[Exception], ...]:
    """What a candidate raises that cannot run here, and that the others go on after."""
    return (*cannot_run(), MemoryError)


def trouble(error: Exception) -> str:
    """An error in one line, also where it says nothing."""
    return f"cannot run: {(str(error).splitlines() or [type(error).__name__])[0]}"


def difference(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want, relative to that of want."""
    want = want.to(got.device).double()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def levels_off(got: Pixels, want: Pixels | float) -> float:
    """Root mean square of got - want in levels of 255."""
    return float(np.sqrt(np.square(np.subtract(got, want, dtype=np.float32)).mean()))


def check_executor(judge: Judge, candidate: Candidate) -> dict[str, float | None]:
    """How far a candidate's stream is from the oracle's, and what is allowed; InferixError if it is refused."""
    off, refused = judge.check(candidate, len(judge.reference))
    if refused:
        raise InferixError(f"executor {candidate.name} is refused and nothing was timed: {refused}")
    return {"difference": off, "tolerance": judge.allowed(candidate), "bits_off": judge.bits_off}
