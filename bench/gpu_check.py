"""Checks and benchmarks that need a GPU, in stages of under nine minutes that can be resumed.

    python -m inferix.bench.gpu_check --stage tests --out results

tests: first the forms that no card has run yet; then every kernel against its reference on every case and dtype, and
that the code which runs is the one that `compile_gate` inspected, by resources, instructions and hash. kernels: the
microbenchmark. graph: executors against each other, one graph a block, one capture for all. captured: the nodes of
captured graphs against the calls of their programs. packages: kernels that AOTInductor compiles into packages, against
their references. block, stream: the benchmarks of real sizes. Each unit is a process of its own and leaves
OUT/STAGE/UNIT.json, or UNIT.failed.txt, so that one that breaks the card's context stops no other. Exit code 3: more
to do, run it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import InferixError, UsageError, nearest, one_line_errors, quoted
from ..kernels.catalog import SPECS
from ..kernels.spec import architecture
from ..kernels.triton_ops import triton_form
from ..runtime.engine import Engine
from ..runtime.execution.executors import GraphExecutor
from ..runtime.executor_specs import EXECUTORS
from ..runtime.files import write_atomically
from ..runtime.sampler import scheduled_blocks
from ..runtime.streams import make_current
from ..schemes.page_needs import least_pages, staging_slots
from . import block, candidates, compile_gate, kernels, stream
from .captured_check import check_graphs, faults_of
from .form_check import check_apart, check_op, unproved_forms
from .inspection import launches_of
from .machine import environment
from .package_check import check_packages
from .result import CHECK, FAILED, read_failures, write_result
from .subject import ORACLE, Subject, open_engine, random_prompt, with_executor
from .work import blocks_until_full

BUDGET = 500  # seconds of one call
MORE_TO_DO = 3  # exit code
Unit = Callable[[str, Path], None]  # device, file to write


def write_cases(file: Path, device: str, about: str, results: Mapping[str, str | None]) -> None:
    """Write the checked cases, of which `results` has a reason for each wrong one; InferixError if any is wrong."""
    wrong = {name: reason for name, reason in results.items() if reason}
    write_check(file, {"environment": environment(device), "checked": len(results), "wrong": wrong})
    if wrong:
        raise InferixError(f"{about}: {len(wrong)} of {len(results)} cases are wrong: {wrong}")


def unit_tests(op: str) -> Unit:
    def run(device: str, file: Path) -> None:
        write_cases(file, device, op, check_op(SPECS[op], device))

    return run


def unit_unproved(op: str, form: str) -> Unit:
    """A form that no card has run, in a process that ends within its own time."""

    def run(device: str, file: Path) -> None:
        facts = check_apart(op, form, device)
        write_check(file, {"environment": environment(device), **facts})
        if facts["wrong"]:
            raise InferixError(f"{op}, {form}: {len(facts['wrong'])} cases are wrong: {facts['wrong']}")

    return run


def unit_code() -> Unit:
    def run(device: str, file: Path) -> None:
        ran = compile_gate.executed(device)
        if not ran:
            raise InferixError("the compile gate does not inspect code for this card's compute capability")
        version, capability = compile_gate.triton_version(), architecture(torch.device(device))
        table = compile_gate.read_table(version)
        inspected = {
            name: row for name, row in table.items()
            if row["architecture"] == capability and not compile_gate.is_unproved(name)
        }  # fmt: skip
        wrong = compile_gate.differences(ran, inspected)
        write_check(file, {"environment": environment(device), "checked": len(ran), "wrong": wrong, "rows": ran})
        if wrong:
            raise InferixError(f"what ran is not what was inspected with Triton {version}: {'; '.join(wrong)}")

    return run


def unit_package(op: str) -> Unit:
    def run(device: str, file: Path) -> None:
        write_cases(file, device, f"{op} in a package", check_packages(SPECS[op], device))

    return run


def unit_kernels(op: str) -> Unit:
    def run(device: str, file: Path) -> None:
        write_result(kernels.run(kernels.Options((op,), device=device), print), file)

    return run


def check_graph(subject: Subject) -> tuple[dict[str, Any], list[str]]:
    """Check the executors of a preset at a full window; return the measurements and a line for each fault.

    `fused` must equal `eager` within the tolerance, and `captured` must equal `fused` bit for bit. A captured block is
    one graph launch, and one more if its context is rebuilt. A second session and a new prompt must not capture again.
    """
    engine = open_engine(replace(subject, executor=ORACLE))
    rows, full = random_prompt(engine, subject.seed), blocks_until_full(engine.preset)
    names = [name for name, spec in EXECUTORS.items() if spec.graphs and engine.device.type in spec.devices]
    checker = candidates.make_checker(engine, rows, subject, [True] * (full + 2))
    facts: dict[str, Any] = {"environment": environment(str(engine.device)), "bits_off": checker.bits_off}
    wrong, outputs = [], {}
    for candidate in (candidates.executor_candidate(engine, name, rows, subject) for name in names):
        outputs[candidate.name] = candidates.outputs_of(candidate.open(), checker.decoded)
        facts[f"{candidate.name} off by"] = checker.largest_difference(outputs[candidate.name])
        facts[f"{candidate.name} allowed"] = checker.allowed(candidate)
        if mismatch := checker.mismatch(candidate, outputs[candidate.name]):
            wrong.append(f"{candidate.name}: {mismatch}")
    if "captured" in outputs:
        pairs = zip(outputs["captured"], outputs["fused"], strict=True)
        equal = all(torch.equal(captured.latents, fused.latents) for captured, fused in pairs)
        wrong += [] if equal else ["captured: its latents are not those of fused bit for bit"]
        captured = with_executor(engine, "captured", kv_memory=room_for_two(engine, subject))
        captures, more = check_captures(captured, rows, subject, full)
        facts |= captures
        wrong += more
    return facts | {"wrong": wrong}, wrong


def room_for_two(engine: Engine, subject: Subject) -> int:
    """Bytes of pages for two sessions; a page store that grows would move pages and capture again."""
    form, preset = engine.kv_manager.form(subject.size or engine.default_size), engine.preset
    staging = staging_slots(preset) * form.slot_bytes(form.model_dtype) if form.staged else 0
    return staging + 2 * least_pages(preset) * form.nbytes


def check_captures(
    engine: Engine, rows: torch.Tensor, subject: Subject, full: int
) -> tuple[dict[str, Any], list[str]]:
    """Count launches of a block at a full window and captures of a second session and prompt; return them and faults.

    A preset that recomputes its cache after a new prompt captures a graph for that at the first such prompt.
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
    for _ in range(full + 2):  # as far as the first: a window that has not rolled recomputes its sink, another graph
        second.step(decode=False)
    second.session.prompt(embeds=random_prompt(engine, 1))
    second.step(decode=False)
    first.close()
    second.close()
    later, wrong = executor.launcher.captures - before, executor.fallbacks()
    plan = next(islice(scheduled_blocks(engine.preset), full + 1, None))
    expected = 1 + sum(scheduled.kind == "rebuild" for scheduled in plan.passes)
    if executor.supports_whole_block and launches["graphs"] != expected:
        wrong.append(f"captured: a block at a full window launches {launches['graphs']} graphs, expected {expected}")
    if later:
        wrong.append(f"captured: a second session and a new prompt captured {later} times more")
    return {"launches": launches, "captures": before, "captures later": later}, wrong


def unit_graph(subject: Subject) -> Unit:
    def run(device: str, file: Path) -> None:
        facts, wrong = check_graph(replace(subject, device=device))
        write_check(file, facts)
        if wrong:
            raise InferixError("; ".join(wrong))

    return run


def unit_captured(subject: Subject) -> Unit:
    def run(device: str, file: Path) -> None:
        results = check_graphs(replace(subject, device=device, executor="captured"))
        wrong = faults_of(results)
        write_check(file, {"environment": environment(device), "graphs": results, "wrong": wrong})
        if wrong:
            raise InferixError(f"{len(wrong)} faults of captured graphs: {'; '.join(wrong[:10])}")

    return run


def unit_block(options: block.Options) -> Unit:
    def run(device: str, file: Path) -> None:
        subject = replace(options.subject, device=device)
        write_result(block.run(replace(options, subject=subject), print), file)

    return run


def unit_stream(options: stream.Options) -> Unit:
    def run(device: str, file: Path) -> None:
        subject = replace(options.subject, device=device)
        write_result(stream.run(replace(options, subject=subject), print), file)

    return run


def random(model: str, preset: str, **settings: Any) -> Subject:
    return Subject(model, preset, random_weights=True, **settings)


SELF_FORCING = random("wan-1.3b", "self-forcing")
FP8 = replace(SELF_FORCING, overrides={"lowp": "fp8", "kv_dtype": "fp8"})
GRAPHS = {
    preset: random(model, preset)
    for model, preset in (
        ("wan-1.3b", "self-forcing"), ("wan-1.3b", "self-forcing-framewise"), ("wan-1.3b", "longlive"),
        ("wan-1.3b", "longlive-infinity"), ("wan-1.3b", "rolling-forcing"), ("wan-1.3b", "causvid"),
        ("wan-14b", "krea"),
    )
} | {"self-forcing-fp8": FP8}  # fmt: skip
STAGES: dict[str, dict[str, Unit]] = {
    "tests": {f"{spec.name}-{form.name}": unit_unproved(spec.name, form.name) for spec, form in unproved_forms()}
    | {op: unit_tests(op) for op in SPECS} | {"code": unit_code()},
    "kernels": {op: unit_kernels(op) for op in SPECS},
    "graph": {name: unit_graph(subject) for name, subject in GRAPHS.items()},
    "captured": {name: unit_captured(subject) for name, subject in GRAPHS.items()},
    "packages": {op: unit_package(op) for op, spec in SPECS.items() if triton_form(spec) is not None},
    "block": {
        "self-forcing": unit_block(block.Options(SELF_FORCING)),
        "self-forcing-taehv": unit_block(block.Options(replace(SELF_FORCING, vae="taehv"))),
        "self-forcing-fp8": unit_block(block.Options(FP8)),
        "longlive": unit_block(block.Options(random("wan-1.3b", "longlive"))),
        "krea": unit_block(block.Options(random("wan-14b", "krea"), rounds=2)),
        "framewise": unit_block(block.Options(random("wan-1.3b", "self-forcing-framewise"), rounds=2)),
    },
    "stream": {
        "self-forcing": unit_stream(stream.Options(SELF_FORCING, starts=2, sessions=1)),
        "sessions": unit_stream(stream.Options(random("wan-1.3b", "longlive"), blocks=8, starts=0, sessions=4)),
        "long": unit_stream(
            stream.Options(random("wan-1.3b", "longlive", vae="taehv"), blocks=8, starts=0, controls=0, minutes=5)
        ),
    },
}


@dataclass(frozen=True)
class Place:
    """Folder of a stage with its units' files."""

    folder: Path

    def file(self, unit: str) -> Path:
        return self.folder / f"{unit}.json"

    def failure(self, unit: str) -> Path:
        return self.folder / f"{unit}{FAILED}"


def run_stage(stage: str, place: Place, begin: Callable[[str, float], str | None], budget: float) -> list[str]:
    """Run the units without a file for `budget` seconds; return those not finished, without failed ones.

    begin: runs a unit with a timeout in seconds and returns an error text, None without error; raises
    subprocess.TimeoutExpired at the timeout. A unit at its timeout has failed only if it had the whole budget.
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


def write_check(path: Path, facts: dict[str, Any]) -> None:
    """Write the outcome of a check; the key `CHECK` distinguishes it from a benchmark's result."""
    write_text(path, json.dumps({CHECK: True, **facts}, indent=1))


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text + "\n", "utf-8"))


def begin_process(stage: str, out: Path, device: str) -> Callable[[str, float], str | None]:
    """Function that runs a unit in a new process: the `begin` of `run_stage`."""

    def begin(unit: str, seconds: float) -> str | None:
        command = [sys.executable, "-m", "inferix.bench.gpu_check", "--stage", stage, "--unit", unit]
        command += ["--out", str(out), "--device", device]
        done = subprocess.run(command, timeout=seconds, stderr=subprocess.PIPE, text=True, check=False)
        return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None

    return begin


def main(
    stage: Annotated[str, typer.Option(help="tests, kernels, graph, captured, packages, block or stream.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    unit: Annotated[str | None, typer.Option(help="One unit, in this process.  [default: all that are left]")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for this call.")] = BUDGET,
) -> None:
    """Run one stage on a GPU, without units that have a result. Remove UNIT.failed.txt to run a failed unit again."""
    if stage not in STAGES:
        raise UsageError(f"no stage {quoted(stage)}{nearest(stage, STAGES)}; expected one of {', '.join(STAGES)}")
    if unit is not None and unit not in STAGES[stage]:
        there = ", ".join(STAGES[stage])
        raise UsageError(f"no unit {quoted(unit)}{nearest(unit, STAGES[stage])}; expected one of {there}")
    if not torch.cuda.is_available():
        raise InferixError("no GPU is available; these stages need one")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # or the code's hash would hold the folder's name
    import_module("triton")  # its error names a missing package
    make_current(torch.device(device))
    place = Place(out / stage)
    place.folder.mkdir(parents=True, exist_ok=True)
    if unit is not None:
        STAGES[stage][unit](device, place.file(unit))
        return
    left = run_stage(stage, place, begin_process(stage, out, device), budget)
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
    with one_line_errors():
        app()
