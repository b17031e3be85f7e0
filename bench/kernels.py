"""Kernel microbenchmark: checks every op and case against its reference, then times it.

An implementation that does not match the reference is refused and not timed. On a GPU, CUDA events time single calls,
and inputs rotate through more memory than the cache holds. On a CPU the references are timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..errors import InferixError, UsageError, nearest, quoted
from ..kernels.catalog import SPECS
from ..kernels.spec import Case, KernelSpec, architecture, has_triton
from ..runtime.files import write_atomically
from ..runtime.streams import make_current
from .machine import environment, measure_ceilings, stopwatch
from .result import Result, Series
from .rivals import Prepare, attention_baselines, bound

Log = Callable[[str], None]
REPEATS = {"cpu": 7, "cuda": 30}
ROTATED = 256 << 20  # bytes of inputs to rotate through, more than any cache
COPIES = 256  # of inputs at most
FP8 = torch.float8_e4m3fn
FP8_SUMS = 1.5e-4  # of the largest entry: tensor cores of sm_90 keep sums of FP8 products to 14 bits
CPU_FLOPS, CPU_BYTES = 5e9, 5e7  # larger cases are left out on a CPU unless selected
CLOCK = (
    "single calls of an op, after three that are not counted: on a GPU between CUDA events, behind other work so that "
    "the host's launching is not timed, on inputs that rotate through more memory than the cache holds; on a CPU the "
    "host's wall clock."
)


@dataclass(frozen=True)
class Options:
    """Options of a run: ops and cases by name (empty for all), a custom shape, dtype and device."""

    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    shape: str | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def repeats(self) -> int:
        return REPEATS[torch.device(self.device).type]


def parse_shape(spec: KernelSpec, text: str) -> Case:
    """Parse sizes that replace those of the op's first case, such as "q=4680,kv=32760,heads=12,dim=128".

    Raises UsageError for an unknown size, for a number below 1 and for tokens that do not fill pages.
    """
    like = spec.bench_cases[0]
    dims = dict(like.dims)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"shape {quoted(text)}: {quoted(part)} is no size; expected name=number, such as dim=128")
        if name in spec.shape_names:
            size, *unit = spec.shape_names[name]
            each = dims[unit[0]] if unit else 1
            if int(value) % each:
                raise UsageError(f"shape: {name}={value} is no multiple of {unit[0]}={each}; set {unit[0]} first")
            dims[size] = int(value) // each
        elif name in dims:
            dims[name] = int(value)
            if name == "heads" and "kv_heads" in dims:
                dims["kv_heads"] = int(value)
        else:
            has = ", ".join(dims)
            raise UsageError(f"shape: {spec.name} has no size {quoted(name)}{nearest(name, dims)}; it has {has}")
    return Case(text, dims, like.options)


def select(options: Options) -> list[KernelSpec]:
    """Specs of the selected ops; UsageError for an unknown name."""
    for op in options.ops:
        if op not in SPECS:
            raise UsageError(f"no op {quoted(op)}{nearest(op, SPECS)}; expected one of {', '.join(SPECS)}")
    return [SPECS[op] for op in options.ops or SPECS]


def run(options: Options, log: Log) -> Result:
    """Check and time the selected cases. Raises UsageError for unknown names and for a shape of several ops."""
    specs = select(options)
    make_current(torch.device(options.device))
    if options.shape and len(specs) != 1:
        raise UsageError(f"shape {quoted(options.shape)} is for one op, but {len(specs)} are selected; give one in ops")
    known = [case.name for spec in specs for case in spec.bench_cases]
    for name in options.cases:
        if name not in known:
            there = "; ".join(dict.fromkeys(known))
            raise UsageError(f"no case {quoted(name)}{nearest(name, known)}; expected: {there}")
    log("measuring the machine's ceilings")
    begun, measured = environment(options.device), measure_ceilings(options.device, options.dtype)
    ceilings = {name: series.best for name, series in measured.items()}
    rows, left_out = [], list[str]()
    for spec in specs:
        cases = [parse_shape(spec, options.shape)] if options.shape else spec.bench_cases
        for case in cases:
            if options.cases and case.name not in options.cases:
                continue
            selected = bool(options.cases or options.shape)
            if options.device == "cpu" and not selected and too_large(spec, case, options.dtype):
                left_out.append(case.name)
                continue
            rows.append(run_case(spec, case, options, ceilings))
            log(summary(rows[-1]))
    if left_out:
        log(f"left out, too large for a CPU: {len(left_out)} cases, such as {left_out[0]!r}; name a case to run it")
    return Result(
        kind="kernels", clock=CLOCK, environment=begun, subject={"model": None},
        settings={"dtype": str(options.dtype)[6:], "ops": options.ops, "cases": options.cases, "shape": options.shape},
        ceilings=measured,
        series={
            f"{row['op']}, {row['case']}/{name}": Series("s", tuple(form.pop("samples")))
            for row in rows for name, form in row["forms"].items() if "samples" in form
        },
        facts={"rows": rows},
    )  # fmt: skip


def too_large(spec: KernelSpec, case: Case, dtype: torch.dtype) -> bool:
    """Return True for a case that takes a CPU long; from shapes only, without allocation."""
    with FakeTensorMode():
        cost = spec.cost(spec.make_inputs(case, dtype, "cpu", 0))
    return cost.flops > CPU_FLOPS or cost.nbytes > CPU_BYTES


def run_case(spec: KernelSpec, case: Case, options: Options, ceilings: dict[str, float]) -> dict[str, Any]:
    """Check, then time, our implementations and the baselines for one case."""
    inputs = spec.make_inputs(case, options.dtype, options.device, 0)
    expected = clone_inputs(inputs)
    spec.reference(**expected)
    cost = spec.cost(inputs, int(inputs[spec.counted_by].sum()) if spec.counted_by else None)
    flops, moved = cost.flops, cost.nbytes
    row: dict[str, Any] = {
        "op": spec.name, "case": case.name, "dims": dict(case.dims), "options": dict(case.options),
        "dtype": str(options.dtype)[6:], "flops": flops, "bytes": moved, "forms": {},
    }  # fmt: skip
    for name, prepare in forms(spec, inputs, options).items():
        if wrong := mismatch(spec, prepare, inputs, expected, options.dtype):
            row["forms"][name] = {"refused": wrong}
            continue
        samples = timed(prepare, inputs, options)
        seconds = statistics.median(samples)
        quarters = statistics.quantiles(samples, n=4)
        row["forms"][name] = {
            "seconds": seconds,
            "spread": (quarters[2] - quarters[0]) / seconds,
            "tflops": flops / seconds / 1e12,
            "gbytes": moved / seconds / 1e9,
            "of_matmul": flops / seconds / ceilings["matmul_flops"],
            "of_copy": moved / seconds / ceilings["copy_bytes"],
            "samples": samples,
        }
    ran = [form for form in row["forms"].values() if "seconds" in form]
    for form in ran:
        form["of_first"] = form["seconds"] / ran[0]["seconds"]
    return row


def forms(spec: KernelSpec, inputs: dict[str, Any], options: Options) -> dict[str, Prepare]:
    """Implementations to time: on a CPU the reference; on a GPU our kernels first, then the baselines."""
    if options.device == "cpu":
        return {"reference": bound(spec.reference)}
    like = inputs[spec.like]
    capability = architecture(like.device)
    serving = [form for form in spec.implementations if form.serves(capability, like.dtype, like.shape[-1])]
    ours: dict[str, Prepare] = {form.name: bound(form.load()) for form in serving}
    if spec.name == "block_attention":
        return ours | attention_baselines(inputs, ours)
    torch.compiler.reset()  # other cases count towards the recompile limit, beyond which this one would run eagerly
    compiled = torch.compile(spec.reference, dynamic=False)
    return ours | {"torch": bound(spec.reference), "torch.compile": bound(compiled)}


def clone_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copy a case's inputs with all tensors."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def mismatch(
    spec: KernelSpec, prepare: Prepare, inputs: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype
) -> str | None:
    """The reason to refuse an implementation: its difference, or its error; None if it matches."""
    fresh = clone_inputs(inputs)
    try:
        prepare(fresh)()
    except launch_errors() as error:
        return f"cannot run: {(str(error) or type(error).__name__).splitlines()[0]}"
    for name in spec.outputs:
        if fresh[name] is not None:
            got, want = fresh[name].float(), expected[name].float()
            difference = float((got - want).abs().max() / want.abs().max().clamp(min=1e-3))
            limit = {FP8: 0.08, torch.int8: 0.01}.get(fresh[name].dtype, 2 * spec.tolerance[dtype])
            if inputs[spec.like].dtype == FP8 and fresh[name].is_cuda:
                limit = max(limit, FP8_SUMS)
            if not difference <= limit:
                return f"{name} differs by {difference:.2e}, allowed {limit:.2e}"
    return None


def launch_errors() -> tuple[type[Exception], ...]:
    """Error types of an implementation that does not support a case or this machine."""
    errors = (RuntimeError, ValueError, AssertionError, ImportError, InferixError)
    return (*errors, import_module("triton.errors").TritonError) if has_triton() else errors


def timed(prepare: Prepare, inputs: dict[str, Any], options: Options) -> list[float]:
    """Time single calls, s."""
    size = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    copies = 1 if options.device == "cpu" else max(1, min(COPIES, ROTATED // max(size, 1) + 1))
    calls = [prepare(clone_inputs(inputs)) for _ in range(copies)]
    for index in range(3):
        calls[index % copies]()
    samples = []
    for index in range(options.repeats):
        with stopwatch(options.device) as elapsed:
            calls[index % copies]()
        samples.append(elapsed())
    return samples


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
            parts.append(f"{name} {shown(form['seconds'])} ({form['of_copy']:.0%} of copy, "
                         f"{form['of_matmul']:.0%} of matmul, {form['of_first']:.2f} of the first's time)")  # fmt: skip
    return f"{row['op']}, {row['case']}: " + "; ".join(parts)


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
