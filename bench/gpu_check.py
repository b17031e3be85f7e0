"""Everything that needs a GPU, in stages of under nine minutes that pick up where they were stopped.

    python -m inferix.bench.gpu_check --stage tests --out results

tests: every kernel against its reference on every case and dtype, and that the code which runs is the one that
`compile_gate` inspected, by resources, instructions and hash. kernels: the microbenchmark. graph: executors against
each other, one graph a block, one capture for all. block, stream: the benchmarks of real sizes. Each unit is a process
of its own and leaves OUT/STAGE/UNIT.json, or UNIT.failed.txt, so that one that breaks the card's context stops no
other. Exit code 3: more to do, run it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import InferixError, UsageError, nearest, told_in_a_line
from ..kernels.catalog import SPECS
from ..kernels.spec import HALF, KernelSpec, architecture
from ..runtime.engine import Engine
from ..runtime.execution.executors import GraphExecutor
from ..runtime.files import write_atomically
from ..runtime.sampler import scheduled_blocks
from ..runtime.streams import make_current
from ..schemes.page_needs import least_pages, staging_slots
from . import block, candidates, compile_gate, kernels, stream
from .inside import launches_of
from .machine import environment
from .result import CHECK, FAILED, read_failures, write_result
from .rivals import bound
from .subject import ORACLE, Subject, open_engine, random_prompt, with_executor
from .work import blocks_until_full

BUDGET = 500  # seconds of one call
MORE_TO_DO = 3  # exit code
Unit = Callable[[str, Path], None]  # device, file to write


def check_op(spec: KernelSpec, device: str) -> dict[str, Any]:
    """Each of our forms, cases and dtypes -> None if it agrees with the reference, else what is wrong."""
    found: dict[str, Any] = {}
    capability = architecture(torch.device(device))
    for dtype in (*HALF, torch.float32):
        for case in (*spec.test_cases, spec.bench_cases[0]):
            inputs = spec.make_inputs(case, dtype, device, 0)
            like = inputs[spec.like]
            serving = [form for form in spec.implementations if form.serves(capability, like.dtype, like.shape[-1])]
            if not serving:
                continue
            expected = kernels.copied(inputs)
            spec.reference(**expected)
            for form in serving:
                wrong = kernels.mismatch(spec, bound(form.load()), inputs, expected, dtype)
                found[f"{form.name}, {case.name}, {str(dtype)[6:]}"] = wrong
    return found


def unit_tests(op: str) -> Unit:
    def run(device: str, file: Path) -> None:
        results = check_op(SPECS[op], device)
        wrong = {name: said for name, said in results.items() if said}
        found = {"environment": environment(device), "checked": len(results), "wrong": wrong}
        write_check(file, found)
        if wrong:
            raise InferixError(f"{op}: {len(wrong)} of {len(results)} cases are wrong: {wrong}")

    return run


def unit_code() -> Unit:
    def run(device: str, file: Path) -> None:
        ran = compile_gate.executed(device)
        if not ran:
            raise InferixError("the compile gate does not inspect code for this card's compute capability")
        version, capability = compile_gate.triton_version(), architecture(torch.device(device))
        table = compile_gate.read_table(version)
        inspected = {name: row for name, row in table.items() if row["architecture"] == capability}
        wrong = compile_gate.differences(ran, inspected)
        found = {"environment": environment(device), "checked": len(ran), "wrong": wrong, "rows": ran}
        write_check(file, found)
        if wrong:
            raise InferixError(f"what ran is not what was inspected with Triton {version}: {'; '.join(wrong)}")

    return run


def unit_kernels(op: str) -> Unit:
    def run(device: str, file: Path) -> None:
        write_result(kernels.run(kernels.Wanted((op,), device=device), print), file)

    return run


def check_graph(subject: Subject) -> tuple[dict[str, Any], list[str]]:
    """What the executors of a preset do at a full window, and what of it is wrong, one line each.

    Fused must equal eager as far as is allowed, and captured fused bit for bit; a captured block is one launch, and
    one more where its context is made anew before it; a second session and a new prompt capture nothing more.
    """
    engine = open_engine(replace(subject, executor=ORACLE))
    rows, full = random_prompt(engine, subject.seed), blocks_until_full(engine.preset)
    names = ["fused", "captured"] if engine.device.type == "cuda" else ["fused"]
    judge = candidates.judge_of(engine, rows, subject, [True] * (full + 2))
    found: dict[str, Any] = {"environment": environment(str(engine.device)), "bits_off": judge.bits_off}
    wrong, made = [], {}
    for candidate in (candidates.executor_candidate(engine, name, rows, subject) for name in names):
        made[candidate.name] = candidates.outputs_of(candidate.open(), judge.decoded)
        found[f"{candidate.name} off by"] = judge.off(made[candidate.name])
        found[f"{candidate.name} allowed"] = judge.allowed(candidate)
        if said := judge.mismatch(candidate, made[candidate.name]):
            wrong.append(f"{candidate.name}: {said}")
    if "captured" in made:
        pairs = zip(made["captured"], made["fused"], strict=True)
        equal = all(torch.equal(captured.latents, fused.latents) for captured, fused in pairs)
        wrong += [] if equal else ["captured: its latents are not those of fused bit for bit"]
        captured = with_executor(engine, "captured", kv_memory=room_for_two(engine, subject))
        told, more = check_captures(captured, rows, subject, full)
        found |= told
        wrong += more
    return found | {"wrong": wrong}, wrong


def room_for_two(engine: Engine, subject: Subject) -> int:
    """Bytes of pages for two sessions, so that the store need not grow, which moves pages and captures anew."""
    form, preset = engine.memory.form(subject.size or engine.default_size), engine.preset
    staging = staging_slots(preset) * form.slot_bytes(form.model) if form.staged else 0
    return staging + 2 * least_pages(preset) * form.nbytes


def check_captures(
    engine: Engine, rows: torch.Tensor, subject: Subject, full: int
) -> tuple[dict[str, Any], list[str]]:
    """Launches of a block at a full window, captures that another session and another prompt cause later, and what of
    both is wrong. A preset that caches anew after a prompt has a graph for that; it is captured at the first.
    """
    executor, size = engine.executor, subject.size or engine.default_size
    assert isinstance(executor, GraphExecutor)
    first = candidates.EngineStream(engine, rows, 0, size)
    for _ in range(full + 1):
        first.step(decode=False)
    launches = launches_of(first, str(engine.device))
    first.session.prompt(embeds=random_prompt(engine, 2))
    first.step(decode=False)
    before = executor.launcher.captures
    second = candidates.EngineStream(engine, rows, 1, size)
    for _ in range(full + 1):
        second.step(decode=False)
    second.session.prompt(embeds=random_prompt(engine, 1))
    second.step(decode=False)
    first.close()
    second.close()
    later, wrong = executor.launcher.captures - before, list(executor.launcher.fallbacks)
    plan = next(islice(scheduled_blocks(engine.preset), full + 1, None))
    expected = 1 + sum(scheduled.kind == "rebuild" for scheduled in plan.passes)
    if executor.supports_whole_block and launches["graphs"] != expected:
        wrong.append(f"captured: a block at a full window launches {launches['graphs']} graphs, expected {expected}")
    if later:
        wrong.append(f"captured: a second session and a new prompt captured {later} times more")
    return {"launches": launches, "captures": before, "captures later": later}, wrong


def unit_graph(subject: Subject) -> Unit:
    def run(device: str, file: Path) -> None:
        found, wrong = check_graph(replace(subject, device=device))
        write_check(file, found)
        if wrong:
            raise InferixError("; ".join(wrong))

    return run


def unit_block(wanted: block.Wanted) -> Unit:
    def run(device: str, file: Path) -> None:
        subject = replace(wanted.subject, device=device)
        write_result(block.run(replace(wanted, subject=subject), print), file)

    return run


def unit_stream(wanted: stream.Wanted) -> Unit:
    def run(device: str, file: Path) -> None:
        subject = replace(wanted.subject, device=device)
        write_result(stream.run(replace(wanted, subject=subject), print), file)

    return run


def random(model: str, preset: str, **settings: Any) -> Subject:
    return Subject(model, preset, random_weights=True, **settings)


SELF_FORCING = random("wan-1.3b", "self-forcing")
FP8 = replace(SELF_FORCING, overrides={"lowp": "fp8", "kv_dtype": "fp8"})
STAGES: dict[str, dict[str, Unit]] = {
    "tests": {op: unit_tests(op) for op in SPECS} | {"code": unit_code()},
    "kernels": {op: unit_kernels(op) for op in SPECS},
    "graph": {
        preset: unit_graph(random(model, preset))
        for model, preset in (
            ("wan-1.3b", "self-forcing"), ("wan-1.3b", "self-forcing-framewise"), ("wan-1.3b", "longlive"),
            ("wan-1.3b", "longlive-infinity"), ("wan-1.3b", "rolling-forcing"), ("wan-1.3b", "causvid"),
            ("wan-14b", "krea"),
        )
    } | {"self-forcing-fp8": unit_graph(FP8)},
    "block": {
        "self-forcing": unit_block(block.Wanted(SELF_FORCING)),
        "self-forcing-taehv": unit_block(block.Wanted(replace(SELF_FORCING, vae="taehv"))),
        "self-forcing-fp8": unit_block(block.Wanted(FP8)),
        "longlive": unit_block(block.Wanted(random("wan-1.3b", "longlive"))),
        "krea": unit_block(block.Wanted(random("wan-14b", "krea"), rounds=2)),
        "framewise": unit_block(block.Wanted(random("wan-1.3b", "self-forcing-framewise"), rounds=2)),
    },
    "stream": {
        "self-forcing": unit_stream(stream.Wanted(SELF_FORCING, starts=2, sessions=1)),
        "sessions": unit_stream(stream.Wanted(random("wan-1.3b", "longlive"), blocks=8, starts=0, sessions=4)),
        "long": unit_stream(
            stream.Wanted(random("wan-1.3b", "longlive", vae="taehv"), blocks=8, starts=0, controls=0, minutes=5)
        ),
    },
}


@dataclass(frozen=True)
class Place:
    """Where a stage leaves its units' files."""

    folder: Path

    def file(self, unit: str) -> Path:
        return self.folder / f"{unit}.json"

    def failure(self, unit: str) -> Path:
        return self.folder / f"{unit}{FAILED}"


def run_stage(stage: str, place: Place, begin: Callable[[str, float], str | None], budget: float) -> list[str]:
    """Run the units that have no file yet while there is time; returns those left, failed ones not among them.

    begin: runs a unit within so many seconds, and returns what went wrong; subprocess.TimeoutExpired if they were
    too few. A unit that is cut off has failed only if it had all the time there is.
    """
    until = time.monotonic() + budget
    left = [unit for unit in STAGES[stage] if not place.file(unit).exists() and not place.failure(unit).exists()]
    first = True
    while left and (seconds := until - time.monotonic()) > 0:
        print(f"{stage}: {left[0]}", flush=True)
        try:
            wrong = begin(left[0], seconds)
        except subprocess.TimeoutExpired:
            if not first:
                return left
            wrong = f"it took longer than {budget:.0f} s"
        if wrong:
            write_text(place.failure(left[0]), wrong)
            print(f"{stage}: {left[0]} failed: {wrong[-2000:]}", flush=True)
        left.pop(0)
        first = False
    return left


def write_check(path: Path, found: dict[str, Any]) -> None:
    """What was right and what was wrong: no result of a benchmark, and told apart from one by a reader."""
    write_text(path, json.dumps({CHECK: True, **found}, indent=1))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text + "\n", "utf-8"))


def begin_apart(stage: str, out: Path, device: str) -> Callable[[str, float], str | None]:
    """What runs a unit in a process of its own."""

    def begin(unit: str, seconds: float) -> str | None:
        command = [sys.executable, "-m", "inferix.bench.gpu_check", "--stage", stage, "--unit", unit]
        command += ["--out", str(out), "--device", device]
        done = subprocess.run(command, timeout=seconds, stderr=subprocess.PIPE, text=True, check=False)
        return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None

    return begin


def main(
    stage: Annotated[str, typer.Option(help="tests, kernels, graph, block or stream.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    unit: Annotated[str | None, typer.Option(help="One unit, in this process.  [default: all that are left]")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for this call.")] = BUDGET,
) -> None:
    """Run one stage on a GPU; units whose results are there are left out. Remove UNIT.failed.txt to try one again."""
    if stage not in STAGES:
        raise UsageError(f"no stage {stage!r}{nearest(stage, STAGES)}; there are {', '.join(STAGES)}")
    if unit is not None and unit not in STAGES[stage]:
        raise UsageError(f"no unit {unit!r}{nearest(unit, STAGES[stage])}; there are {', '.join(STAGES[stage])}")
    if not torch.cuda.is_available():
        raise InferixError("there is no GPU here; these stages need one")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # or the code's hash would hold the folder's name
    import_module("triton")  # says itself what is missing
    make_current(torch.device(device))
    place = Place(out / stage)
    place.folder.mkdir(parents=True, exist_ok=True)
    if unit is not None:
        STAGES[stage][unit](device, place.file(unit))
        return
    left = run_stage(stage, place, begin_apart(stage, out, device), budget)
    failed = read_failures(place.folder)
    print(f"{stage}: {len(STAGES[stage]) - len(left)} of {len(STAGES[stage])} units done", flush=True)
    if failed:
        print(f"{stage}: failed: {', '.join(failed)}", flush=True)
    if left:
        raise typer.Exit(MORE_TO_DO)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)  # plain tracebacks end with the reason, which the report shows
    app.command()(main)
    with told_in_a_line():
        app()
