"""Kernel microbenchmark: checks every form of an op on every case against its reference, then times them in turns.

A form that does not match the reference is refused and not timed; a user's form is first verified on all test cases
of the op. Each form is timed with a cold cache, through which other memory went before the call, and with a warm one,
right after that call. Forms take turns, so that a verdict on two of them rests on pairs of neighbouring samples.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..errors import InferixError, UsageError, nearest, quoted
from ..kernels.catalog import SPECS, kernel_spec
from ..kernels.own_forms import OwnForm
from ..kernels.spec import Case, Cost, KernelSpec, architecture, has_triton
from ..kernels.verify import Verification, guarded_run, verify, wrong_values
from ..runtime.files import write_atomically
from ..runtime.streams import make_current
from .compare import paired_change
from .kernel_cases import parse_shape, read_cases
from .machine import cache_bytes, environment, measure_ceilings, stopwatch
from .result import Result, Series
from .rivals import Prepare, attention_baselines, bound

Log = Callable[[str], None]
REPEATS = {"cpu": 11, "cuda": 30}
FLUSHED = 2, 256 << 20  # caches that a flush writes through, and the most bytes of it
FLEX = "flex"  # FlexAttention, whose compilation for a CPU takes half a minute: only on request there
FP8 = torch.float8_e4m3fn
FP8_SUMS = 1.5e-4  # of the largest entry: tensor cores of sm_90 keep sums of FP8 products to 14 bits
CPU_FLOPS, CPU_BYTES = 5e9, 5e7  # larger cases are left out on a CPU unless selected
CLOCK = (
    "single calls of an op, the forms in turns, after three of each that are not counted: on a GPU between CUDA "
    "events, behind other work so that the host's launching is not timed; on a CPU the host's wall clock. Before each "
    "call other memory is written through the cache; `warm` is the same call once more, right after it."
)
NO_DRIVER = "active driver"  # of Triton's error where there is no GPU


@dataclass(frozen=True)
class Options:
    """Options of a run: ops and cases by name (empty for all), dtype and device.

    shape, case_file: cases of the user's, for one op. forms: of one op, timed beside the others: `FILE.py:FUNCTION`, a
    name that was registered, or one of the op's that is not timed otherwise.
    """

    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    shape: str | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    forms: tuple[str, ...] = ()
    case_file: Path | None = None

    @property
    def repeats(self) -> int:
        return REPEATS[torch.device(self.device).type]


def select(options: Options) -> list[KernelSpec]:
    """Specs of the selected ops; UsageError for an unknown name."""
    return [kernel_spec(op) for op in options.ops or SPECS]


def check_options(specs: list[KernelSpec], options: Options) -> None:
    """UsageError for options that are for one op where several are selected, and for two sources of cases."""
    for name, value in (("shape", options.shape), ("form", options.forms), ("case_file", options.case_file)):
        if value and len(specs) != 1:
            raise UsageError(f"{name} {quoted(value)} is for one op, but {len(specs)} are selected; give one in ops")
    if options.shape and options.case_file:
        raise UsageError(f"shape {quoted(options.shape)} and case_file both give cases; give one of them")


def cases_of(spec: KernelSpec, options: Options) -> tuple[Case, ...]:
    """Cases of an op to time, those of the user's in place of the op's own."""
    if options.shape:
        return (parse_shape(spec, options.shape),)
    return tuple(read_cases(spec, options.case_file)) if options.case_file else spec.bench_cases


def run(options: Options, log: Log) -> Result:
    """Check and time the selected cases. Raises UsageError for unknown names and for options of one op with several."""
    specs = select(options)
    make_current(torch.device(options.device))
    check_options(specs, options)
    cases = {spec.name: cases_of(spec, options) for spec in specs}
    known = [case.name for each in cases.values() for case in each]
    for name in options.cases:
        if name not in known:
            there = "; ".join(dict.fromkeys(known))
            raise UsageError(f"no case {quoted(name)}{nearest(name, known)}; expected: {there}")
    own = {name: verified(specs[0], name, options, log) for name in asked_forms(specs[0], options)}
    log("measuring the machine's ceilings")
    begun, measured = environment(options.device), measure_ceilings(options.device, options.dtype)
    ceilings = {name: series.best for name, series in measured.items()}
    rows, left_out = [], list[str]()
    for spec in specs:
        chosen = chosen_cases(spec, cases[spec.name], options)
        for case in chosen:
            rows.append(run_case(spec, case, options, ceilings, own))
            log(summary(rows[-1]))
        if not options.cases:
            left_out += [case.name for case in cases[spec.name] if case not in chosen]
    if left_out:
        log(f"left out, too large for a CPU: {len(left_out)} cases, such as {left_out[0]!r}; name a case to run it")
    return Result(
        kind="kernels", clock=CLOCK, environment=begun, subject={"model": None},
        settings={
            "dtype": str(options.dtype)[6:], "ops": options.ops, "cases": options.cases, "shape": options.shape,
            "case_file": None if options.case_file is None else str(options.case_file), "forms": options.forms,
        },
        ceilings=measured,
        series={
            f"{row['op']}, {row['case']}/{name}{which}": Series("s", tuple(form.pop(samples)))
            for row in rows for name, form in row["forms"].items() if "seconds" in form
            for which, samples in (("", "samples"), (", warm", "warm_samples"))
        },
        facts={"rows": rows, "forms": {name: describe_form(specs[0], name, one) for name, one in own.items()}},
    )  # fmt: skip


def asked_forms(spec: KernelSpec, options: Options) -> list[str]:
    """Forms of an op that are asked for, without the baseline FLEX of attention."""
    return [name for name in options.forms if name != FLEX or spec.name != "block_attention"]


def verified(spec: KernelSpec, name: str, options: Options, log: Log) -> Verification:
    """Check a form on the op's test cases, and log the result. UsageError for a form that does not exist."""
    verification = verify(spec, name, options.dtype, options.device)
    if verification.refused:
        log(f"{spec.name}, {name}: refused, {advised(verification.refused)}")
    else:
        declined = "".join(f"; declines {case!r}: {reason}" for case, reason in verification.declined.items())
        log(f"{spec.name}, {name}: equals the reference on {len(verification.checked)} cases{declined}")
    return verification


def advised(reason: str) -> str:
    """A reason to refuse a form, with advice where Triton lacks a GPU."""
    return f"{reason}; without a GPU, set TRITON_INTERPRET=1" if NO_DRIVER in reason else reason


def describe_form(spec: KernelSpec, name: str, verification: Verification) -> dict[str, Any]:
    """Facts of a form: its verification, and of a user's the file and its digest."""
    form = spec.named(name)
    file = Path(form.source_file) if isinstance(form, OwnForm) and form.source_file else None
    readable = file is not None and file.is_file()
    return asdict(verification) | {
        "file": file.name if file is not None and readable else None,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and readable else None,
    }


def chosen_cases(spec: KernelSpec, cases: Sequence[Case], options: Options) -> list[Case]:
    """Cases to time: those that were selected, on a CPU else those that it is not too slow for.

    An op that was asked for has its smallest case in any event.
    """
    if options.cases:
        return [case for case in cases if case.name in options.cases]
    if options.device != "cpu" or options.shape or options.case_file:
        return list(cases)
    fitting = [case for case in cases if not too_large(spec, case, options.dtype)]
    if fitting or not options.ops or not cases:
        return fitting
    return [min(cases, key=lambda case: cost_of(spec, case, options.dtype).nbytes)]


def too_large(spec: KernelSpec, case: Case, dtype: torch.dtype) -> bool:
    """Return True for a case that takes a CPU long; from shapes only, without allocation."""
    cost = cost_of(spec, case, dtype)
    return cost.flops > CPU_FLOPS or cost.nbytes > CPU_BYTES


def cost_of(spec: KernelSpec, case: Case, dtype: torch.dtype) -> Cost:
    with FakeTensorMode():
        return spec.cost(spec.make_inputs(case, dtype, "cpu", 0))


def run_case(
    spec: KernelSpec,
    case: Case,
    options: Options,
    ceilings: Mapping[str, float],
    own: Mapping[str, Verification] = {},
) -> dict[str, Any]:
    """Check, then time in turns, our forms, the user's and the baselines for one case."""
    inputs = spec.make_inputs(case, options.dtype, options.device, 0)
    expected = clone_inputs(inputs)
    spec.reference(**expected)
    cost = spec.cost(inputs, int(inputs[spec.counted_by].sum()) if spec.counted_by else None)
    roof = {"matmul": cost.flops / ceilings["matmul_flops"], "copy": cost.nbytes / ceilings["copy_bytes"]}
    bound_by = max(roof, key=roof.__getitem__)
    refused = {name: one.refused for name, one in own.items() if one.refused}
    results: dict[str, dict[str, Any]] = {}
    right: dict[str, Prepare] = {}
    for name, prepare in forms(spec, inputs, options).items():
        if wrong := refused.get(name) or mismatch(spec, prepare, inputs, expected, options.dtype):
            results[name] = {"refused": advised(wrong)}
        else:
            right[name], results[name] = prepare, {}
    timed = timed_in_turns(right, inputs, options)
    first = next(iter(timed), "")
    for name, samples in timed.items():
        seconds = statistics.median(samples.cold)
        quarters = statistics.quantiles(samples.cold, n=4)
        change = paired_change(name, Series("s", tuple(timed[first].cold)), Series("s", tuple(samples.cold)))
        results[name] = {
            "seconds": seconds,
            "warm_seconds": statistics.median(samples.warm),
            "spread": (quarters[2] - quarters[0]) / seconds,
            "tflops": cost.flops / seconds / 1e12,
            "gbytes": cost.nbytes / seconds / 1e9,
            "of_matmul": roof["matmul"] / seconds,
            "of_copy": roof["copy"] / seconds,
            "of_roof": roof[bound_by] / seconds,
            "of_first": change.ratio,
            "interval": [change.low, change.high],
            "verdict": None if name == first else change.verdict,
            "samples": samples.cold,
            "warm_samples": samples.warm,
        }
    return {
        "op": spec.name, "case": case.name, "dims": dict(case.dims), "options": dict(case.options),
        "dtype": str(options.dtype)[6:], "flops": cost.flops, "bytes": cost.nbytes, "bound_by": bound_by,
        "first": first or None, "forms": results,
    }  # fmt: skip


def forms(spec: KernelSpec, inputs: dict[str, Any], options: Options) -> dict[str, Prepare]:
    """Forms to time: ours, those that are asked for, then the baselines."""
    like = inputs[spec.like]
    if options.device == "cpu":
        ours = {form.name: bound(form.load()) for form in spec.implementations if form.cpu}
        ours["reference"] = bound(spec.reference)
    else:
        ours = {form.name: bound(form.load()) for form in spec.serving(architecture(like.device), inputs)}
    asked = {name: bound(spec.named(name, like.device)) for name in asked_forms(spec, options)}
    if spec.name == "block_attention":
        if options.device == "cpu":
            rivals = attention_baselines(inputs, {}, ("FLASH_ATTENTION",), FLEX in options.forms)
        else:
            rivals = attention_baselines(inputs, ours)
        return ours | asked | rivals
    if options.device == "cpu":
        return ours | asked
    torch.compiler.reset()  # other cases count towards the recompile limit, beyond which this one would run eagerly
    compiled = torch.compile(spec.reference, dynamic=False)
    return ours | asked | {"torch": bound(spec.reference), "torch.compile": bound(compiled)}


def clone_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copy a case's inputs with all tensors."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def mismatch(
    spec: KernelSpec, prepare: Prepare, inputs: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype
) -> str | None:
    """The reason to refuse a form on a case: its fault, or its error; None if it matches the reference."""

    def limit(out: Tensor) -> float:
        most = {FP8: 0.08, torch.int8: 0.01}.get(out.dtype, 2 * spec.tolerance[dtype])
        return max(most, FP8_SUMS) if inputs[spec.like].dtype == FP8 and out.is_cuda else most

    try:
        result = guarded_run(spec, lambda placed: prepare(placed)(), inputs)
    except launch_errors() as error:
        return f"cannot run: {(str(error) or type(error).__name__).splitlines()[0]}"
    return result.fault or wrong_values(spec, result.inputs, expected, limit)


def launch_errors() -> tuple[type[Exception], ...]:
    """Error types of an implementation that does not support a case or this machine."""
    errors = (RuntimeError, ValueError, AssertionError, ImportError, InferixError)
    return (*errors, import_module("triton.errors").TritonError) if has_triton() else errors


class Samples(NamedTuple):
    """Seconds of single calls, in order: with a cold cache, and right after each with a warm one."""

    cold: list[float]
    warm: list[float]


def timed_in_turns(prepared: Mapping[str, Prepare], inputs: dict[str, Any], options: Options) -> dict[str, Samples]:
    """Time single calls of forms, a call of each in every round, another one first each time."""
    calls = {name: prepare(clone_inputs(inputs)) for name, prepare in prepared.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    times, most = FLUSHED
    flush = torch.zeros(min(times * cache_bytes(options.device), most), dtype=torch.uint8, device=options.device)
    samples = {name: Samples([], []) for name in calls}
    names = list(calls)
    for turn in range(options.repeats if calls else 0):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            flush.add_(1)  # reads and writes: what the cache held is gone
            for one in samples[name]:
                with stopwatch(options.device) as elapsed:
                    calls[name]()
                one.append(elapsed())
    return samples


def timed(prepare: Prepare, inputs: dict[str, Any], options: Options) -> list[float]:
    """Time single calls of one form with a cold cache, s."""
    return timed_in_turns({"": prepare}, inputs, options)[""].cold


def shown(seconds: float) -> str:
    """Format seconds with the unit that suits them."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def summary(row: dict[str, Any]) -> str:
    """Format a row as one line."""
    parts = []
    for name, form in row["forms"].items():
        if "refused" in form:
            parts.append(f"{name}: refused, {form['refused']}")
        else:
            verdict = f", {form['verdict']}, {form['of_first']:.2f} of {row['first']}" if form["verdict"] else ""
            times = f"{shown(form['seconds'])} (warm {shown(form['warm_seconds'])}"
            parts.append(f"{name} {times}, {form['of_roof']:.0%} of the roof{verdict})")
    return f"{row['op']}, {row['case']}, bound by {row['bound_by']}: " + "; ".join(parts)


def draw(result: Result, path: Path) -> Path | None:
    """Draw the time of each implementation, a panel per case, as PNG; None if matplotlib is not installed."""
    if not find_spec("matplotlib"):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result.facts["rows"] if any("seconds" in form for form in row["forms"].values())]
    figure, axes = pyplot.subplots(max(1, len(rows)), figsize=(9, 1 + 1.1 * max(1, len(rows))), squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=False):
        times = {name: form["seconds"] * 1e6 for name, form in row["forms"].items() if "seconds" in form}
        axis.barh(list(times), list(times.values()))
        axis.set_title(f"{row['op']}, {row['case']}, {row['dtype']}: microseconds", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{result.device_name}, {result.environment['date'][:10]}", fontsize=9)
    figure.tight_layout()
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    pyplot.close(figure)
    return path
