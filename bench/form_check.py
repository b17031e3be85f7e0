"""Check of forms against the reference on a card; those that no card has run, in a process of their own.

A fault of a kernel ends the use of a card by its process, and a kernel whose warps wait for each other never ends. So
such a form runs apart from all others, within `SECONDS`, until a card has run it: then `unproved` leaves its
declaration.

Run: python -m inferix.bench.form_check block_attention hopper
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer

from ..errors import InferixError, one_line_errors
from ..kernels.catalog import SPECS, kernel_spec
from ..kernels.spec import HALF, Implementation, KernelSpec, architecture
from ..runtime.streams import make_current
from .kernels import clone_inputs, mismatch
from .machine import stopwatch
from .rivals import bound

SECONDS = 120  # for import, compilation, all cases and times; beyond it the kernel is taken to hang
REPEATS = 7


def unproved_forms() -> Iterator[tuple[KernelSpec, Implementation]]:
    return ((spec, form) for spec in SPECS.values() for form in spec.implementations if form.unproved)


def check_apart(op: str, form: str, device: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Check a form in a new process: cases that are wrong with the reason, their number, and milliseconds by case.

    Raises InferixError if the process fails, or does not end in time.
    """
    command = [sys.executable, "-m", "inferix.bench.form_check", op, form, "--device", device]
    try:
        done = subprocess.run(command, timeout=seconds, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise InferixError(f"{op}, {form}: no end within {seconds:.0f} s; its warps may wait for each other") from None
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise InferixError(f"{op}, {form}: {last}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def check_op(spec: KernelSpec, device: str, forms: Sequence[Implementation] | None = None) -> dict[str, Any]:
    """Compare every implementation, case and dtype with the reference: name -> None if it agrees, else the reason.

    forms: those to check; all without it but those that no card has run, which are checked apart.
    """
    reasons: dict[str, Any] = {}
    capability = architecture(torch.device(device))
    for dtype in (*HALF, torch.float32):
        for case in (*spec.test_cases, spec.bench_cases[0]):
            inputs = spec.make_inputs(case, dtype, device, 0)
            serving = spec.serving(capability, inputs, forms)
            if not serving:
                continue
            for form in serving:
                judge, expected = spec.judging(form), clone_inputs(inputs)
                judge.reference(**expected)
                wrong = mismatch(judge, bound(form.load()), inputs, expected, dtype)
                reasons[f"{form.name}, {case.name}, {str(dtype)[6:]}"] = wrong
    return reasons


def check_here(spec: KernelSpec, form: Implementation, device: str) -> dict[str, Any]:
    """Check a form on all cases that it takes, then time it on those of real sizes."""
    reasons = check_op(spec, device, [form])
    wrong = {name: reason for name, reason in reasons.items() if reason}
    times: dict[str, float] = {}
    for case in () if wrong else spec.bench_cases:
        inputs = spec.make_inputs(case, form.dtypes[0], device, 0)
        if not spec.serving(architecture(torch.device(device)), inputs, [form]):
            continue
        call = partial(form.load(), **inputs)
        samples = []
        for _ in range(2 + REPEATS):
            with stopwatch(device) as elapsed:
                call()
            samples.append(elapsed() * 1e3)
        times[case.name] = sorted(samples[2:])[REPEATS // 2]
    return {"checked": len(reasons), "wrong": wrong, "ms": times}


def main(
    op: Annotated[str, typer.Argument(help="Op of the form.")],
    form: Annotated[str, typer.Argument(help="The form.")],
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Check and time a form on a GPU and print the outcome as JSON in one line."""
    spec = kernel_spec(op)
    chosen = spec.form(form)
    if not torch.cuda.is_available():
        raise InferixError("no GPU is available; the form needs one")
    make_current(torch.device(device))
    if architecture(torch.device(device)) not in chosen.architectures:
        known = ", ".join(map(str, chosen.architectures))
        raise InferixError(f"{op}: {form} is for sm_{known}; {device} is another")
    print(json.dumps(check_here(spec, chosen, device)))


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
