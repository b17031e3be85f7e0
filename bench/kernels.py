"""The kernel microbenchmark: every op and case against its reference, then against the clock and the card's ceilings.

A form that does not match its reference is refused, not timed. On a GPU, times come from CUDA events around
single calls on inputs that rotate through more memory than the cache holds; on a CPU the references are timed.
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

from ..errors import InferixError, UsageError, nearest
from ..kernels.catalog import SPECS
from ..kernels.spec import Case, KernelSpec, architecture, has_triton
from ..runtime.files import write_atomically
from ..runtime.streams import make_current
from .machine import environment, measure_ceilings, stopwatch
from .result import Result, Series
from .rivals import Prepare, attention_baselines, bound

Tell = Callable[[str], None]
REPEATS = {"cpu": 7, "cuda": 30}
ROTATED = 256 << 20  # bytes of inputs to rotate through, more than any cache
COPIES = 256  # of inputs at most
FP8 = torch.float8_e4m3fn
FP8_SUMS = 1.5e-4  # of the largest entry: tensor cores of sm_90 keep sums of FP8 products to 14 bits
CPU_FLOPS, CPU_BYTES = 5e9, 5e7  # larger cases are left out on a CPU unless they are asked for
CLOCK = (
    "single calls of an op, after three that are not counted: on a GPU between CUDA events, behind other work so that "
    "the host's launching is not timed, on inputs that rotate through more memory than the cache holds; on a CPU the "
    "host's wall clock."
)


@dataclass(frozen=True)
class Wanted:
    """What to run: ops and cases by name (empty: all), a shape of one's own, dtype and device."""

    ops: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    shape: str | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def repeats(self) -> int:
        return REPEATS[torch.device(self.device).type]


def parse_shape(spec: KernelSpec, text: str) -> Case:
    """A case like the op's first one with other sizes: "q=4680,kv=32760,heads=12,dim=128" or its own dims."""
    like = spec.bench_cases[0]
    dims = dict(like.dims)
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--shape {text!r}: {part!r} is no size; expected name=number, such as dim=128")
        if name in spec.shape_names:
            size, *unit = spec.shape_names[name]
            each = dims[unit[0]] if unit else 1
            if int(value) % each:
                raise UsageError(f"--shape: {name}={value} is no multiple of {unit[0]}={each}; set {unit[0]} first")
            dims[size] = int(value) // each
        elif name in dims:
            dims[name] = int(value)
            if name == "heads" and "kv_heads" in dims:
                dims["kv_heads"] = int(value)
        else:
            has = ", ".join(dims)
            raise UsageError(f"--shape: {spec.name} has no size {name!r}{nearest(name, dims)}; it has {has}")
    return Case(text, dims, like.options)


def select(wanted: Wanted) -> list[KernelSpec]:
    """The ops that are wanted; UsageError for a name that is not there."""
    for op in wanted.ops:
        if op not in SPECS:
            raise UsageError(f"no op {op!r}{nearest(op, SPECS)}; there are {', '.join(SPECS)}")
    return [SPECS[op] for op in wanted.ops or SPECS]


def run(wanted: Wanted, tell: Tell) -> Result:
    """All rows, with the machine and its ceilings; UsageError for names that are not there."""
    specs = select(wanted)
    make_current(torch.device(wanted.device))
    if wanted.shape and len(specs) != 1:
        raise UsageError("--shape belongs to one op; name it with --op")
    known = [case.name for spec in specs for case in spec.bench_cases]
    for name in wanted.cases:
        if name not in known:
            raise UsageError(f"no case {name!r}{nearest(name, known)}; there are: {'; '.join(dict.fromkeys(known))}")
    tell("measuring what the machine can do")
    begun, measured = environment(wanted.device), measure_ceilings(wanted.device, wanted.dtype)
    ceilings = {name: series.best for name, series in measured.items()}
    rows, left_out = [], list[str]()
    for spec in specs:
        cases = [parse_shape(spec, wanted.shape)] if wanted.shape else spec.bench_cases
        for case in cases:
            if wanted.cases and case.name not in wanted.cases:
                continue
            asked = bool(wanted.cases or wanted.shape)
            if wanted.device == "cpu" and not asked and too_large(spec, case, wanted.dtype):
                left_out.append(case.name)
                continue
            rows.append(run_case(spec, case, wanted, ceilings))
            tell(summary(rows[-1]))
    if left_out:
        tell(f"left out, too large for a CPU: {len(left_out)} cases, such as {left_out[0]!r}; --case NAME runs one")
    return Result(
        kind="kernels", clock=CLOCK, environment=begun, subject={"model": None},
        settings={"dtype": str(wanted.dtype)[6:], "ops": wanted.ops, "cases": wanted.cases, "shape": wanted.shape},
        ceilings=measured,
        series={
            f"{row['op']}, {row['case']}/{name}": Series("s", tuple(form.pop("samples")))
            for row in rows for name, form in row["forms"].items() if "samples" in form
        },
        facts={"rows": rows},
    )  # fmt: skip


def too_large(spec: KernelSpec, case: Case, dtype: torch.dtype) -> bool:
    """Return True for a case that takes a CPU long; from shapes alone, with nothing allocated."""
    with FakeTensorMode():
        cost = spec.cost(spec.make_inputs(case, dtype, "cpu", 0))
    return cost.flops > CPU_FLOPS or cost.nbytes > CPU_BYTES


def run_case(spec: KernelSpec, case: Case, wanted: Wanted, ceilings: dict[str, float]) -> dict[str, Any]:
    """One op at one size: our forms and the baselines, each checked first."""
    inputs = spec.make_inputs(case, wanted.dtype, wanted.device, 0)
    expected = copied(inputs)
    spec.reference(**expected)
    cost = spec.cost(inputs, int(inputs[spec.counted_by].sum()) if spec.counted_by else None)
    flops, moved = cost.flops, cost.nbytes
    row: dict[str, Any] = {
        "op": spec.name, "case": case.name, "dims": dict(case.dims), "options": dict(case.options),
        "dtype": str(wanted.dtype)[6:], "flops": flops, "bytes": moved, "forms": {},
    }  # fmt: skip
    for name, prepare in forms(spec, inputs, wanted).items():
        if wrong := mismatch(spec, prepare, inputs, expected, wanted.dtype):
            row["forms"][name] = {"refused": wrong}
            continue
        samples = timed(prepare, inputs, wanted)
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


def forms(spec: KernelSpec, inputs: dict[str, Any], wanted: Wanted) -> dict[str, Prepare]:
    """What to time: on a CPU the reference, on a GPU our kernels first and then all they can be held against."""
    if wanted.device == "cpu":
        return {"reference": bound(spec.reference)}
    like = inputs[spec.like]
    capability = architecture(like.device)
    serving = [form for form in spec.implementations if form.serves(capability, like.dtype, like.shape[-1])]
    found: dict[str, Prepare] = {form.name: bound(form.load()) for form in serving}
    if spec.name == "block_attention":
        return found | attention_baselines(inputs, found)
    torch.compiler.reset()  # or what was compiled for other cases counts, and this one may silently run as it is
    compiled = torch.compile(spec.reference, dynamic=False)
    return found | {"torch": bound(spec.reference), "torch.compile": bound(compiled)}


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """A case's inputs with tensors of their own."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def mismatch(
    spec: KernelSpec, prepare: Prepare, inputs: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype
) -> str | None:
    """Why a form may not be timed: how far it is off, or that it cannot run."""
    fresh = copied(inputs)
    try:
        prepare(fresh)()
    except cannot_run() as error:
        return f"cannot run: {(str(error) or type(error).__name__).splitlines()[0]}"
    for name in spec.outputs:
        if fresh[name] is not None:
            got, want = fresh[name].float(), expected[name].float()
            off = float((got - want).abs().max() / want.abs().max().clamp(min=1e-3))
            limit = {FP8: 0.08, torch.int8: 0.01}.get(fresh[name].dtype, 2 * spec.tolerance[dtype])
            if inputs[spec.like].dtype == FP8 and fresh[name].is_cuda:
                limit = max(limit, FP8_SUMS)
            if not off <= limit:
                return f"{name} is off by {off:.2e}, allowed {limit:.2e}"
    return None


def cannot_run() -> tuple[type[Exception], ...]:
    """What a form raises that does not know a case, a size or this machine."""
    said = (RuntimeError, ValueError, AssertionError, ImportError, InferixError)
    return (*said, import_module("triton.errors").TritonError) if has_triton() else said


def timed(prepare: Prepare, inputs: dict[str, Any], wanted: Wanted) -> list[float]:
    """Seconds of single calls."""
    size = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    copies = 1 if wanted.device == "cpu" else max(1, min(COPIES, ROTATED // max(size, 1) + 1))
    calls = [prepare(copied(inputs)) for _ in range(copies)]
    for index in range(3):
        calls[index % copies]()
    samples = []
    for index in range(wanted.repeats):
        with stopwatch(wanted.device) as elapsed:
            calls[index % copies]()
        samples.append(elapsed())
    return samples


def shown(seconds: float) -> str:
    """A time in the unit that suits it."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def summary(row: dict[str, Any]) -> str:
    """A row in words."""
    parts = []
    for name, form in row["forms"].items():
        if "refused" in form:
            parts.append(f"{name}: refused, {form['refused']}")
        else:
            parts.append(f"{name} {shown(form['seconds'])} ({form['of_copy']:.0%} of copy, "
                         f"{form['of_matmul']:.0%} of matmul, {form['of_first']:.2f} of the first's time)")  # fmt: skip
    return f"{row['op']}, {row['case']}: " + "; ".join(parts)


def draw(result: Result, path: Path) -> Path | None:
    """Bars of seconds per form, a panel per case, as a PNG; None where matplotlib is not installed."""
    if not find_spec("matplotlib"):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result.facts["rows"] if any("seconds" in form for form in row["forms"].values())]
    figure, axes = pyplot.subplots(max(1, len(rows)), figsize=(9, 1 + 1.1 * max(1, len(rows))), squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=False):
        held = {name: form["seconds"] * 1e6 for name, form in row["forms"].items() if "seconds" in form}
        axis.barh(list(held), list(held.values()))
        axis.set_title(f"{row['op']}, {row['case']}, {row['dtype']}: microseconds", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{result.device_name}, {result.environment['date'][:10]}", fontsize=9)
    figure.tight_layout()
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    pyplot.close(figure)
    return path
