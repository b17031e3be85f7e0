"""Paired benchmark on a CPU: an older tree, this one, the public loop, diffusers and exported engines.

Each candidate has a process of its own, so that the older tree runs its own code. The processes take turns, one at a
time, and each round begins with another candidate; a ratio is the median of the ratios within a round. CPU time is that
of the candidate's process, so other programs disturb it less than wall time. The older tree is given as a path:
`git worktree add /tmp/before ee59dc9`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from ..errors import InferixError, UsageError, one_line_errors, quoted
from ..export.checkpoint import new_folder
from ..export.engine_folder import write_engine
from ..export.targets import TARGETS, find_target
from ..models.registry import MODELS, family_of
from ..models.spec import ModelSpec
from ..runtime.capacity.cpu_features import bfloat16_unit, cpu_flags
from ..runtime.load import load
from .cpu_worker import prompt_rows
from .machine import environment, measure_ceilings
from .result import Result, Series, write_result

WORKER = Path(__file__).with_name("cpu_worker.py")
BEFORE, AFTER = "before", "after"
CANDIDATES = (BEFORE, AFTER, "fused", "plain", "diffusers")  # diffusers and plain: the transformer alone
LOOPS = ("plain", "diffusers")
PICTURES = 2  # blocks whose pictures are compared
CLOCK = (
    "cpu: time of the candidate's process on all its cores; wall: time of the wall clock. block: from asking for a "
    "block to its frames, with the decoder; transformer: the same without decoder, in streams that are not decoded. "
    "A full window; the seconds of a command's blocks over their number. Left out: start, loading, the blocks before."
)


@dataclass(frozen=True)
class Case:
    """A model and a picture size. fill: blocks before the window is full. blocks: per command, with the decoder or not.

    slow: left out in bfloat16 where the CPU has no instructions for it.
    """

    name: str
    spec: ModelSpec
    preset: str
    size: tuple[int, int]
    settings: dict[str, Any]
    fill: int
    blocks: int
    slow: bool = False


MIDDLE = replace(
    MODELS["wan-tiny"], name="wan-tiny-118m", dim=768, ffn_dim=3072, num_heads=12, kv_heads=12, num_layers=12,
    default_size=(96, 96),
)  # fmt: skip
CASE_HELP = "small world, wan-tiny 64x64, wan-tiny 128x128 or 118M 96x96; repeatable.  [default: all]"
INT8 = "-int8"  # behind a target: its linear layers are on INT8 operands
ENGINES = (*TARGETS, f"onnx{INT8}")
TARGET_HELP = f"An engine exported to a target as well: {', '.join(ENGINES)}; repeatable."
WINDOW = {"local_attn_size": 21}
CASES = (
    Case("small world", MODELS["tinyworld"], "tinyworld", (64, 64), {}, 8, 6),
    Case("wan-tiny 64x64", MODELS["wan-tiny"], "self-forcing", (64, 64), WINDOW, 8, 3),
    Case("wan-tiny 128x128", MODELS["wan-tiny"], "self-forcing", (128, 128), WINDOW, 8, 1, slow=True),
    Case("118M 96x96", MIDDLE, "self-forcing", (96, 96), WINDOW, 8, 1, slow=True),
)


@dataclass
class Worker:
    """A candidate's process; `measure` sends it a command and waits for the answer."""

    name: str
    process: subprocess.Popen[str]
    samples: dict[str, list[float]] = field(default_factory=dict)

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise InferixError(f"candidate {quoted(self.name)} of cpu_pairs ended with code {self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def measure(self, threads: int, blocks: int, decode: bool) -> dict[str, float]:
        """Run blocks; returns the CPU and wall seconds of each."""
        assert self.process.stdin is not None
        print(json.dumps({"threads": threads, "blocks": blocks, "decode": decode}), file=self.process.stdin, flush=True)
        return {clock: seconds / blocks for clock, seconds in self.answer().items()}


@contextmanager
def worker(
    name: str, case: Case, model: str, dtype: str, tree: Path, frames: Path | None, engine: Path | None,
    threads: Sequence[int],
) -> Iterator[Worker]:  # fmt: skip
    """Start a candidate over the package in `tree`, and wait until its window is full.

    engine: folder of an exported engine, in place of the model. threads: counts that commands will ask for.
    """
    given = {
        "candidate": name, "model": model, "preset": case.preset, "size": case.size, "dtype": dtype,
        "settings": case.settings, "fill": case.fill, "pictures": PICTURES, "frames": frames and str(frames),
        "engine": engine and str(engine), "threads": list(threads),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "inferix").symlink_to(tree.resolve(), target_is_directory=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")} | {"PYTHONPATH": place}
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=env,
        )  # fmt: skip
        try:
            started = Worker(name, process)
            started.answer()
            yield started
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def write_model(spec: ModelSpec, folder: Path) -> Path:
    """Write random weights of a model."""
    with new_folder(folder) as part:
        family_of(spec).write_random(part, spec, "diffusers", 0, torch.float32)
    return folder


def export_case(case: Case, model: str, target: str, folder: Path) -> Path:
    """Export the model of a case, with the prompt of the other candidates. target: with `INT8` behind it, or without.
    """
    lowp = "int8" if target.endswith(INT8) else None
    engine = load(model, case.preset, device="cpu", executor="eager", dtype="float32", lowp=lowp, **case.settings)
    found = find_target(target.removesuffix(INT8))
    return write_engine(engine, folder, case.size, found, {"bench": prompt_rows(engine)})


def candidates_of(case: Case) -> list[str]:
    """Candidates that can run a case: the loops have no windows that move, and diffusers must be there."""
    if case.spec.actions:
        return [name for name in CANDIDATES if name not in LOOPS]
    return [name for name in CANDIDATES if name != "diffusers" or find_spec("diffusers")]


def run_case(
    case: Case, dtype: str, before: Path, rounds: int, threads: Sequence[int], targets: Sequence[str], place: Path
) -> tuple[dict[str, Series], dict[str, int]]:
    """Measure one case; returns its series and the largest difference of pictures to `before`, in levels of 255."""
    shipped = "tinyworld" if case.spec.actions else str(write_model(case.spec, place / case.spec.name))
    here, samples = Path(__file__).parent.parent, dict[str, list[float]]()
    engines: dict[str, Path] = {}
    for target in targets:
        print(f"{case.name}: exporting to {target}", flush=True)
        engines[target] = export_case(case, shipped, target, place / target)
    with ExitStack() as stack:
        workers, pictures = [], dict[str, Path]()
        for name in [*candidates_of(case), *engines]:
            if name not in LOOPS:
                pictures[name] = place / f"{name}.npy"
            tree = before if name == BEFORE else here
            opened = worker(name, case, shipped, dtype, tree, pictures.get(name), engines.get(name), threads)
            workers.append(stack.enter_context(opened))
            print(f"{case.name}, {dtype}: {name} is ready", flush=True)
        for index in range(rounds):
            first = index % len(workers)
            for count in threads:
                for part in ("transformer", "block"):
                    for one in workers[first:] + workers[:first]:
                        if part == "block" and one.name in LOOPS:
                            continue
                        for clock, seconds in one.measure(count, case.blocks, part == "block").items():
                            samples.setdefault(f"{case.name}/{count}/{one.name}/{part} {clock}", []).append(seconds)
            print(f"{case.name}, {dtype}: round {index + 1} of {rounds}", flush=True)
        frames = {name: np.load(path).astype(np.int16) for name, path in pictures.items()}
    levels = {name: int(np.abs(one - frames[BEFORE]).max()) for name, one in frames.items() if name != BEFORE}
    return {name: Series("s", tuple(values)) for name, values in samples.items()}, levels


def run(
    before: Path, dtype: str, cases: Sequence[Case], rounds: int, threads: Sequence[int], targets: Sequence[str] = ()
) -> Iterator[Result]:
    """Measure the cases in one dtype; yields the result of all cases so far after each.

    Exported engines are in float32 only.
    """
    targets = targets if dtype == "float32" else ()
    begun, series, levels = environment("cpu"), dict[str, Series](), dict[str, dict[str, int]]()
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    ceilings = measure_ceilings("cpu", kind)
    commit = subprocess.run(
        ["git", "-C", str(before), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    for index, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as place:
            found, levels[case.name] = run_case(case, dtype, before, rounds, threads, targets, Path(place))
            series |= found
        done = cases[: index + 1]
        yield Result(
            kind="pairs", clock=CLOCK, environment=begun, subject={"model": ", ".join(case.name for case in done)},
            settings={"config": {"dtype": dtype}, "rounds": rounds, "threads": list(threads)}, ceilings=ceilings,
            series=dict(series),
            facts={
                "before": commit.stdout.strip() or before.name, "bfloat16_unit": bfloat16_unit(cpu_flags()),
                "levels": dict(levels), "cases": {case.name: asdict(case) | {"spec": case.spec.name} for case in done},
                "candidates": [*CANDIDATES, *targets],
            },
        )  # fmt: skip


def main(
    before: Path = typer.Option(..., help="Folder with the older tree, such as a git worktree of its commit."),
    out: Path = typer.Option(Path("results"), help="Folder for pairs-cpu-DTYPE.json."),
    rounds: int = typer.Option(5, min=1, help="Rounds of each case."),
    dtype: list[str] = typer.Option(["float32", "bfloat16"], help="float32 or bfloat16; repeatable."),
    case: list[str] = typer.Option([], help=CASE_HELP),
    threads: list[int] = typer.Option([1, 2], help="Threads of torch; repeatable."),
    target: list[str] = typer.Option([], help=TARGET_HELP),
) -> None:
    """Measure an older tree, this one, the public loop, diffusers and engines in turns, and write the results.

    In bfloat16, the larger cases are left out where the CPU has no instructions for it.

    Example: python -m inferix.bench.cpu_pairs --before /tmp/before --out bench/results
    """
    names = [one.name for one in CASES]
    for name in case:
        if name not in names:
            raise UsageError(f"case is {quoted(name)}; expected one of {', '.join(names)}")
    for name in dtype:
        if name not in ("float32", "bfloat16"):
            raise UsageError(f"dtype is {quoted(name)}; expected float32 or bfloat16")
    for name in target:
        if name not in ENGINES:
            raise UsageError(f"target is {quoted(name)}; expected one of {', '.join(ENGINES)}")
        find_target(name.removesuffix(INT8))
    if not (before / "runtime" / "engine.py").is_file():
        raise UsageError(f"before is {quoted(str(before))}, which is no tree of this package; expected a checkout")
    out.mkdir(parents=True, exist_ok=True)
    for name in dtype:
        slow = name == "bfloat16" and bfloat16_unit(cpu_flags()) is None
        chosen = [one for one in CASES if (not case or one.name in case) and not (slow and one.slow)]
        for result in run(before, name, chosen, rounds, threads, target):  # written after each case: none is lost
            print(write_result(result, out / f"pairs-cpu-{name}.json"), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
