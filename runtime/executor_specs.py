"""Executors by name: the capabilities of each that `load(executor=...)` can name, and how it is made.

Settings, planner, benchmarks and commands read names and capabilities here, and none of them has a branch on a name.
An entry added to `EXECUTORS` is an executor like all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from ..errors import UsageError, nearest, quoted

LOWP = ("fp8", "int8")


@dataclass(frozen=True, kw_only=True)
class ExecutorSpec:
    """Capabilities of an executor, and how it is made.

    about: its way of running a pass, one line. make: a function (config, preset, parts) that returns an `Executor`, or
    its place as "package.module:function", imported when the executor is first made. graphs: it runs lowered programs;
    they take memory of their own and can be stored (`graphs=`). batches: one pass can serve several
    sessions; batch_sizes: as many as one of these numbers, ascending from 1, or any number where it is empty. devices:
    device types that it runs on; default_on: those for which it is the default. kv_dtypes: dtypes of pages that it
    reads, None for all. lowp: kinds of low-precision linear layers that it runs; fast_lowp: faster than full precision,
    and not only as a reference.
    """

    about: str
    make: Callable[..., Any] | str
    graphs: bool = False
    batches: bool = False
    batch_sizes: tuple[int, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    default_on: tuple[str, ...] = ()
    kv_dtypes: tuple[str, ...] | None = None
    lowp: tuple[str, ...] = ()
    fast_lowp: bool = False

    @property
    def maker(self) -> Callable[..., Any]:
        """The function that makes the executor; UsageError if it cannot be imported, or is none."""
        try:
            make = resolve_name(self.make) if isinstance(self.make, str) else self.make
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(f"make is {quoted(self.make)}, which cannot be imported: {error}") from error
        if not callable(make):
            raise UsageError(f"make is {quoted(make)}; expected a function, or its place as 'package.module:function'")
        result: Callable[..., Any] = make
        return result


HERE = f"{__package__}.execution.executors"
EXECUTORS = {  # from the plain reference to the fastest
    "eager": ExecutorSpec(
        about="calls the model pass by pass, all in the model's dtype: the reference of all others",
        make=f"{HERE}:make_eager", batches=True, default_on=("cpu",), lowp=LOWP,
    ),
    "fused": ExecutorSpec(
        about="the rewritten graph, its calls launched one by one",
        make=f"{HERE}:make_fused", graphs=True, batches=True, lowp=LOWP, fast_lowp=True,
    ),
    "captured": ExecutorSpec(
        about="the rewritten graph, a whole block replayed as one CUDA graph where the preset allows it",
        make=f"{HERE}:make_captured", graphs=True, batches=True, batch_sizes=(1, 2, 4, 8), devices=("cuda",),
        default_on=("cuda",), lowp=LOWP, fast_lowp=True,
    ),
}  # fmt: skip
MODEL_EXECUTORS: dict[str, ExecutorSpec] = {}  # come with a model's files (exported engines); for no other model
REFERENCE = "eager"  # whose output all others must have
AUTO = "auto"  # of `load`: a cached engine that was exported of the model, or the default executor


def executor_spec(name: str, argument: str = "executor") -> ExecutorSpec:
    """The entry of a name in `EXECUTORS` or `MODEL_EXECUTORS`; UsageError, with the names of the first, for others."""
    if name in MODEL_EXECUTORS:
        return MODEL_EXECUTORS[name]
    if name not in EXECUTORS:
        raise UsageError(f"{argument} is {quoted(name)}{nearest(name, EXECUTORS)}; expected {', '.join(EXECUTORS)}")
    return EXECUTORS[name]


def names_with(capable: Callable[[ExecutorSpec], bool]) -> str:
    """Names of the executors with a capability, for a message."""
    return " or ".join(name for name, spec in EXECUTORS.items() if capable(spec)) or "none"


def default_executor(device: str, capable: Callable[[ExecutorSpec], bool] = lambda spec: True) -> str:
    """The default of a device such as `cuda:1`; if that lacks a capability, the first executor there that has it."""
    kind = device.partition(":")[0]
    there = {name: spec for name, spec in EXECUTORS.items() if kind in spec.devices and capable(spec)}
    return next((name for name, spec in there.items() if kind in spec.default_on), next(iter(there), REFERENCE))
