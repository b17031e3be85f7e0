"""Everything that needs a GPU, in stages of under nine minutes that pick up where they were stopped.

    python -m inferix.bench.gpu_check --stage tests --out results
    python -m inferix.bench.gpu_check --stage kernels --out results

tests: every kernel against its reference on every case and dtype. kernels: the microbenchmark. Each writes
OUT/STAGE.json after every op.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import InferixError, UsageError
from ..kernels.catalog import SPECS
from ..kernels.spec import HALF, KernelSpec
from .kernels import Wanted, machine, mismatch, run

STAGES = ("tests", "kernels")


def check_op(spec: KernelSpec, device: str) -> dict[str, Any]:
    """Each case and dtype -> None if the kernel agrees with the reference, else what is wrong."""
    found: dict[str, Any] = {}
    for dtype in (*HALF, torch.float32):
        form = next(form for form in spec.implementations if form.name == "triton")
        if dtype not in form.dtypes:
            continue
        for case in (*spec.test_cases, spec.bench_cases[0]):
            inputs = spec.make_inputs(case, dtype, device, 0)
            expected = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
            spec.reference(**expected)
            found[f"{case.name}, {str(dtype)[6:]}"] = mismatch(spec, form.load(), inputs, expected, dtype)
    return found


def stage_tests(op: str, device: str) -> dict[str, Any]:
    results = check_op(SPECS[op], device)
    return {"wrong": {name: said for name, said in results.items() if said}, "checked": len(results)}


def stage_kernels(op: str, device: str) -> dict[str, Any]:
    return run(Wanted(ops=(op,), device=device), print)


def main(
    stage: Annotated[str, typer.Option(help="tests or kernels.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Run one stage on a GPU; ops whose results are there are left out."""
    if stage not in STAGES:
        raise UsageError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        raise InferixError("there is no GPU here; these stages need one")
    import_module("triton")  # says itself what is missing
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{stage}.json"
    held: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {"machine": machine(device)}
    for op in SPECS:
        if op not in held:
            print(f"{stage}: {op}", flush=True)
            held[op] = stage_tests(op, device) if stage == "tests" else stage_kernels(op, device)
            file.write_text(json.dumps(held, indent=1) + "\n", "utf-8")
            print(json.dumps(held[op])[:2000], flush=True)


if __name__ == "__main__":
    typer.run(main)
