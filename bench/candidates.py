"""Candidates of a benchmark, executors and baselines over the same weights, and the check of their outputs.

A candidate is refused, with the reason, if its latents or frames differ from the eager executor's by more than the
tolerance, if it fails, or if a graph that should be captured is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import InferixError, UsageError, nearest, quoted
from ..runtime.engine import Engine
from ..runtime.executor_specs import EXECUTORS, executor_spec
from ..runtime.inputs import Pixels
from ..runtime.sessions.output_queue import Block
from .baseline import (
    BlockOutput,
    PlainLoop,
    compiled_layer,
    compiled_layers,
    run_layer,
    unsupported_reason,
)
from .diffusers_loop import DiffusersLoop
from .diffusers_loop import unsupported_reason as no_diffusers_loop
from .kernels import launch_errors
from .subject import ORACLE, Subject, end_ranks, full_precision_engine, uses_fewer_bits, with_executor

NONE = "none"  # no baseline
# Largest root mean square of the difference to the oracle's latents, relative to theirs, in any checked block.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.04}
BITS_MARGIN = 1.1  # times the eager executor's difference in the same low precision, where above the tolerance
LEVELS = 2.0  # of 255: the difference of frames allowed on top of that of their latents, which decoders pass on


class Stream(Protocol):
    """Stream of blocks of a candidate."""

    def step(self, decode: bool = True) -> BlockOutput:
        """Compute the next block."""

    def close(self) -> None:
        """Free the stream's memory."""


@dataclass(frozen=True)
class Candidate:
    """A candidate to time.

    about: one line for the report. open: begins a stream. owners: bytes of a stream by owner. drop: frees the memory
    that is shared between streams. fewer_bits: True if layers or pages have another precision than the oracle's.
    fallbacks: reasons why graphs could not be captured. compared: blocks that are compared, the first of a stream; None
    for all.
    """

    name: str
    about: str
    open: Callable[[], Stream]
    owners: Callable[[Any], dict[str, int]]
    drop: Callable[[], None] = lambda: None
    fewer_bits: bool = False
    fallbacks: Callable[[], list[str]] = list
    compared: int | None = None


class EngineStream:
    """A session of an engine as a stream."""

    def __init__(self, engine: Engine, rows: Tensor, seed: int, size: tuple[int, int]) -> None:
        self.session = engine.open(prompt_embeds=rows, seed=seed, size=size)

    def step(self, decode: bool = True) -> BlockOutput:
        (block,) = self.session.stream(1, decode)
        return block_output(block)

    def run(self, blocks: int) -> tuple[list[BlockOutput], list[float]]:
        """Run `blocks` + 1 more blocks of an endless stream; return them and the `blocks` intervals in seconds.

        Each block is decoded while the next is computed, also the last. The stream cannot continue afterwards.
        """
        finished, arrivals = [], []
        for block in islice(self.session.stream(), blocks + 1):
            arrivals.append(time.perf_counter())
            finished.append(block)
        return [block_output(block) for block in finished], [after - before for before, after in pairwise(arrivals)]

    def close(self) -> None:
        self.session.close()


def block_output(block: Block) -> BlockOutput:
    return BlockOutput(block.latents, block.frames, dict(block.timings), tuple(block.record.passes))


BASELINE_NOTES = {
    "plain": "a loop in the structure of the public reference: contiguous cache rolled by copying, embeddings in every "
    "pass, torch's attention",
    "compiled": "the plain loop with every layer through torch.compile",
    "reduce-overhead": "the plain loop with all layers of a pass through torch.compile(mode='reduce-overhead'), so in "
    "one CUDA graph on a GPU",
    "diffusers": "diffusers' transformer over the whole window in every step, without a cache; its outputs are another "
    "function of the weights after the first block, which alone is compared",
}


def candidates(engine: Engine, rows: Tensor, subject: Subject) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates that can run the engine's preset on its device, the oracle first, and the reasons of all others."""
    left_out = {
        name: f"it runs on {' or '.join(spec.devices)}"
        for name, spec in EXECUTORS.items() if engine.device.type not in spec.devices
    }  # fmt: skip
    if reason := unsupported_reason(engine.preset):
        left_out |= dict.fromkeys(BASELINE_NOTES, reason)
    if engine.config.gpus > 1:
        left_out |= dict.fromkeys(BASELINE_NOTES, "it runs on one GPU, without gpus")
    if reason := no_diffusers_loop(engine.spec, engine.preset):
        left_out["diffusers"] = reason
    available = [
        executor_candidate(engine, name, rows, subject) for name in EXECUTORS if name not in left_out
    ] + [baseline_candidate(engine, name, rows, subject) for name in BASELINE_NOTES if name not in left_out]
    return available, left_out


def executor_candidate(engine: Engine, name: str, rows: Tensor, subject: Subject) -> Candidate:
    """An executor of the engine: the oracle in full precision, others in the engine's precision.

    The first stream creates the candidate's engine; later streams share it.
    """
    engines: list[Engine] = []

    def begin() -> EngineStream:
        make = full_precision_engine if name == ORACLE else partial(with_executor, name=name)
        engines[:] = engines or [make(engine, subject=subject)]
        return EngineStream(engines[0], rows, subject.seed, subject.size or engine.default_size)

    def owners(stream: EngineStream) -> dict[str, int]:
        session = stream.session
        cache = sum(branch.cache.nbytes for branch in session.current.branches)
        return {"cache": cache, "decoder state": session.current.decoder.nbytes, **engines[0].executor.bytes_by_owner()}

    def fallbacks() -> list[str]:
        return [reason for one in engines for reason in one.executor.fallbacks()]

    def drop() -> None:
        for own in engines:
            if own is not engine:
                end_ranks(own)
        engines.clear()

    fewer_bits = name != ORACLE and uses_fewer_bits(engine.config)
    return Candidate(name, executor_spec(name).about, begin, owners, drop, fewer_bits, fallbacks)


def baseline_candidate(engine: Engine, name: str, rows: Tensor, subject: Subject) -> Candidate:
    """A loop over the engine's weights: the plain one, eager or compiled, or that of diffusers."""

    def begin() -> PlainLoop:
        if name == "diffusers":
            return DiffusersLoop(engine, rows, subject.seed, subject.size or engine.default_size)
        layer = compiled_layer() if name == "compiled" else run_layer
        layers = compiled_layers() if name == "reduce-overhead" else None
        return PlainLoop(engine, rows, subject.seed, subject.size or engine.default_size, layer, layers)

    def owners(stream: PlainLoop) -> dict[str, int]:
        return {"cache": stream.cache_bytes, "decoder state": stream.decoder.nbytes}

    return Candidate(name, BASELINE_NOTES[name], begin, owners, compared=1 if name == "diffusers" else None)


def choose(
    offered: list[Candidate],
    left_out: dict[str, str],
    executors: tuple[str, ...],
    baselines: tuple[str, ...],
    device: str,
) -> list[Candidate]:
    """Candidates named in `executors` and `baselines`; an empty tuple selects all.

    Those of torch.compile take minutes on a CPU, and `diffusers` on a GPU with a large model, so they must be named
    there; otherwise the reason goes into `left_out`. Raises UsageError for an unknown name and for a candidate that
    cannot run.
    """
    for name in ("compiled", "reduce-overhead") if torch.device(device).type == "cpu" else ():
        if name not in (*left_out, *baselines):
            left_out[name] = "torch.compile takes long on a CPU; name it in baselines to run it"
    if torch.device(device).type != "cpu" and "diffusers" not in (*left_out, *baselines):
        left_out["diffusers"] = "a whole window in every step takes long; name it in baselines to run it"
    names = [candidate.name for candidate in offered if candidate.name not in left_out]
    chosen: list[str] = []
    for option, asked, known in (
        ("executor", executors, [*EXECUTORS]), ("baseline", baselines, [*BASELINE_NOTES, NONE])
    ):  # fmt: skip
        for name in asked:
            if name not in known:
                raise UsageError(
                    f"no {option} {quoted(name)}{nearest(name, known)}; expected one of {', '.join(known)}"
                )
            if name in left_out:
                raise UsageError(f"{option} {quoted(name)} cannot run here: {left_out[name]}; choose another {option}")
        chosen += asked or [name for name in names if name in known]
    return [candidate for candidate in offered if candidate.name in chosen]


@dataclass(frozen=True)
class OutputChecker:
    """Comparison of a stream's blocks with a reference stream.

    The difference of latents is a root mean square relative to the reference's, and must stay within the tolerance in
    every block. Frames may differ by the same share of their contrast plus `LEVELS`.

    reference: blocks on the host, as many as the longest stream to compare, with frames where that stream has them.
    bits_off: difference of the eager executor with layers and pages in the engine's low precision; None in full
    precision. A candidate in low precision may differ by `BITS_MARGIN` times that, or by the tolerance if it is more.
    """

    reference: list[BlockOutput]
    tolerance: float
    bits_off: float | None = None

    @property
    def decoded(self) -> list[bool]:
        """True for each block of the reference that has frames."""
        return [block.frames is not None for block in self.reference]

    def allowed(self, candidate: Candidate) -> float:
        if not candidate.fewer_bits:
            return self.tolerance
        assert self.bits_off is not None
        return max(self.tolerance, BITS_MARGIN * self.bits_off)

    def largest_difference(self, outputs: Sequence[BlockOutput]) -> float | None:
        """Largest difference of the latents in a stream's first blocks; None for NaN and for another shape."""
        pairs = [(got.latents, want.latents) for got, want in zip(outputs, self.reference, strict=False)]
        values = [relative_difference(got, want) if got.shape == want.shape else math.nan for got, want in pairs]
        return max(values) if all(map(math.isfinite, values)) else None

    def mismatch(self, candidate: Candidate, outputs: Sequence[BlockOutput]) -> str | None:
        """The first of a stream's blocks that differs by more than allowed, as a message; None if none does.

        outputs: at most as many blocks as the reference has.
        """
        allowed, outputs = self.allowed(candidate), outputs[: candidate.compared]
        for index, (got, want) in enumerate(zip(outputs, self.reference[: len(outputs)], strict=True)):
            if got.latents.shape != want.latents.shape:
                return f"latents of block {index} are {list(got.latents.shape)}, expected {list(want.latents.shape)}"
            relative = relative_difference(got.latents, want.latents)
            if not relative <= allowed:
                return f"latents of block {index} differ by {relative:.1e} relative, allowed {allowed:.1e}"
            if want.frames is None:
                continue
            if got.frames is None or got.frames.shape != want.frames.shape:
                shape = None if got.frames is None else list(got.frames.shape)
                return f"frames of block {index} are {shape}, expected {list(want.frames.shape)}"
            levels = level_difference(got.frames, want.frames)
            limit = LEVELS + allowed * level_difference(want.frames, 127.5)
            if levels > limit:
                return f"frames of block {index} differ by {levels:.1f} levels, allowed {limit:.1f}"
        return None

    def refusal(self, candidate: Candidate, outputs: Sequence[BlockOutput]) -> str | None:
        """The reason to refuse a candidate after it computed `outputs`; None to accept it."""
        if fallbacks := candidate.fallbacks():
            return f"not captured: {fallbacks[0]}"
        return self.mismatch(candidate, outputs)

    def check(self, candidate: Candidate, blocks: int) -> tuple[float | None, str | None]:
        """Run a candidate's first blocks; return their largest difference and the reason to refuse it, if any."""
        try:
            outputs = outputs_of(candidate.open(), self.decoded[:blocks])
        except candidate_errors() as error:
            return None, failure_reason(error)
        return self.largest_difference(outputs[: candidate.compared]), self.refusal(candidate, outputs)


def make_checker(engine: Engine, rows: Tensor, subject: Subject, decoded: Sequence[bool]) -> OutputChecker:
    """Run the oracle for `len(decoded)` blocks, with frames where `decoded` is True, as the reference to check with."""
    tolerance, oracle = TOLERANCE[engine.dtype], executor_candidate(engine, ORACLE, rows, subject)
    try:
        outputs = outputs_of(oracle.open(), decoded)
    finally:
        oracle.drop()
    checker = OutputChecker([replace(block, latents=block.latents.cpu()) for block in outputs], tolerance)
    if not uses_fewer_bits(engine.config):
        return checker
    eager = with_executor(engine, ORACLE, subject)
    try:
        plain = EngineStream(eager, rows, subject.seed, subject.size or engine.default_size)
        bits_off = checker.largest_difference(outputs_of(plain, decoded))
    finally:
        if eager is not engine:
            end_ranks(eager)
    return replace(checker, bits_off=bits_off)


def outputs_of(stream: Stream, decoded: Sequence[bool]) -> list[BlockOutput]:
    """Run a stream for `len(decoded)` blocks, with frames where `decoded` is True, and close it."""
    try:
        return [cloned(stream.step(decode)) for decode in decoded]
    finally:
        stream.close()


def cloned(block: BlockOutput) -> BlockOutput:
    """Copy a block's latents, which the stream may overwrite."""
    return replace(block, latents=block.latents.clone())


def candidate_errors() -> tuple[type[Exception], ...]:
    """Error types of a candidate that cannot run; the benchmark continues with the others."""
    return (*launch_errors(), MemoryError)


def failure_reason(error: Exception) -> str:
    """First line of an error's message, or its type if it has none."""
    return f"cannot run: {(str(error).splitlines() or [type(error).__name__])[0]}"


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want, relative to that of want."""
    want = want.to(got.device).double()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def level_difference(got: Pixels, want: Pixels | float) -> float:
    """Root mean square of got - want in levels of 255."""
    return float(np.sqrt(np.square(np.subtract(got, want, dtype=np.float32)).mean()))


def check_executor(checker: OutputChecker, candidate: Candidate) -> dict[str, float | None]:
    """Difference of a candidate's stream to the oracle's, and the limits. Raises InferixError if it is refused."""
    largest, refused = checker.check(candidate, len(checker.reference))
    if refused:
        raise InferixError(f"executor {quoted(candidate.name)} is refused and nothing was timed: {refused}")
    return {"difference": largest, "tolerance": checker.allowed(candidate), "bits_off": checker.bits_off}
