"""Verification of a form: on every case it must compute what the reference does, and touch nothing else.

Each tensor of a call lies between guard zones, NaN around inputs and a sentinel around outputs, and outputs begin as
NaN, so that a form that reads or writes beside its tensors, or leaves a place unwritten, shows. Inputs must stay as
they are, bit for bit, and a second run must give the same bits. The result must depend neither on the strides of dims
of size 1, which a contiguous tensor may have at will, nor on what memory holds that the form allocates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from ..errors import InferixError, UsageError, no_memory, one_line
from .own_forms import OwnForm
from .spec import FP8, Case, KernelSpec

GUARD = 256  # elements before and after each tensor: every allocation's alignment is kept
SENTINEL = 77.0
LIMITS = {FP8: 0.08, torch.int8: 0.008}  # of the largest entry: a step of FP8, a step of INT8
INT8_TIES = 0.01  # share of INT8 values that may round the other way

Call = Callable[[dict[str, Any]], object]  # runs a form on the arguments of a call


@dataclass(frozen=True)
class Verification:
    """Result of the cases of an op for one form.

    checked: names of the cases on which it is right. declined: reasons by case that it does not take. refused: its
    fault, with the case; None for a form that may be used.
    """

    checked: tuple[str, ...]
    declined: Mapping[str, str]
    refused: str | None


def verify(
    spec: KernelSpec, name: str, dtype: torch.dtype, device: str = "cpu", cases: Iterable[Case] | None = None
) -> Verification:
    """Check a form on the op's test cases, or on others, up to its first fault.

    name: of a form of the op or of a user's, or FILE.py:FUNCTION. Raises UsageError for a name that is none.
    """
    run = spec.named(name, torch.device(device))
    form = run if isinstance(run, OwnForm) else OwnForm(spec.name, name, run)
    checked, declined = list[str](), dict[str, str]()
    for case in spec.test_cases if cases is None else cases:
        try:
            reason = fault(spec, form, case, dtype, device)
        except UsageError as error:
            declined[case.name] = one_line(error).removeprefix("error: ")
            continue
        except InferixError as error:
            return Verification(tuple(checked), declined, f"{case.name}: {one_line(error).removeprefix('error: ')}")
        except RuntimeError as error:
            if not no_memory(error):
                raise
            return Verification(tuple(checked), declined, f"{case.name}: no memory for it")
        if reason is not None:
            return Verification(tuple(checked), declined, f"{case.name}: {reason}")
        checked.append(case.name)
    none = None if checked else f"it takes none of the cases: {next(iter(declined.values()), 'there are none')}"
    return Verification(tuple(checked), declined, none)


def fault(
    spec: KernelSpec,
    run: Callable[..., None],
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    thorough: bool = True,
) -> str | None:
    """The first fault of a form on one case against the reference in float64; None for none. Its errors pass.

    thorough: more than one run, for the same bits, other strides, and memory that it allocates.
    """
    inputs = spec.make_inputs(case, dtype, device, seed)
    expected = exact(spec, inputs)

    def call(arguments: dict[str, Any]) -> None:
        run(**arguments)

    def limit(out: Tensor) -> float:
        return LIMITS.get(out.dtype, spec.tolerance[dtype])

    def judged(result: Result) -> str | None:
        values = result.inputs
        return result.fault or wrong_values(spec, values, expected, limit) or other_integers(spec, values, expected)

    first = guarded_run(spec, call, inputs)
    if (reason := judged(first)) or not thorough:
        return reason
    second = guarded_run(spec, call, inputs)
    for name in outputs_of(spec, inputs):
        if not same_bits(first.inputs[name], second.inputs[name]):
            return f"{name} differs between two runs on the same inputs"
    if any(1 in value.shape for value in inputs.values() if isinstance(value, Tensor)):
        try:
            reason = judged(guarded_run(spec, call, inputs, odd_strides=True))
        except InferixError as error:  # it took the call with other strides
            reason = one_line(error)
        if reason:
            return f"depends on the strides of dims of size 1, which a contiguous tensor may have at will: {reason}"
    if reason := judged(guarded_run(spec, call, inputs, poisoned_allocations())):
        return f"reads memory that it allocates before it is written: {reason}"
    return None


def exact(spec: KernelSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of the reference for the same values in float64; FP8 pages keep their dtype."""
    wide = {}
    for name, value in inputs.items():
        widens = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != FP8
        wide[name] = value.double() if widens else value.clone() if isinstance(value, Tensor) else value
    spec.reference(**wide)
    return wide


@dataclass(frozen=True)
class Result:
    """Arguments of a call after it, outputs among them, and what it did to memory that is not its own to write."""

    inputs: dict[str, Any]
    fault: str | None


def guarded_run(
    spec: KernelSpec,
    call: Call,
    inputs: Mapping[str, Any],
    around: AbstractContextManager[None] | None = None,
    odd_strides: bool = False,
) -> Result:
    """Run a form on copies of the inputs between guard zones."""
    outputs, placed, wholes = outputs_of(spec, inputs), dict(inputs), dict[str, Tensor]()
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            blank = SENTINEL if name in outputs else float("nan") if value.is_floating_point() else 0
            placed[name], wholes[name] = guarded(value, blank)
            if odd_strides:
                placed[name] = with_odd_strides(placed[name])
    before = {name: whole.clone() for name, whole in wholes.items()}
    own = {name: placed[name] for name in wholes}
    with around or nullcontext():
        call(placed)
    for name, whole in wholes.items():
        if name in outputs:
            edges = (torch.cat((each[:GUARD], each[-GUARD:])) for each in (as_bytes(whole), as_bytes(before[name])))
            if not torch.equal(*edges):
                return Result(placed, f"something was written beside {name}")
        elif not same_bits(whole, before[name]):
            beside = same_bits(own[name], before[name][GUARD:-GUARD].view(own[name].shape))
            return Result(placed, f"something was written beside {name}" if beside else f"its input {name} was changed")
    return Result(placed, None)


def outputs_of(spec: KernelSpec, inputs: Mapping[str, Any]) -> list[str]:
    """Names of the outputs that a call is given."""
    return [name for name in spec.outputs if inputs[name] is not None]


def guarded(tensor: Tensor, blank: float) -> tuple[Tensor, Tensor]:
    """A copy of a tensor between two guard zones that are filled with `blank`, and the whole with the zones."""
    whole = torch.empty(tensor.numel() + 2 * GUARD, dtype=tensor.dtype, device=tensor.device)
    zone = torch.full((GUARD,), blank, dtype=torch.float32, device=tensor.device).to(tensor.dtype)
    whole[:GUARD].copy_(zone)
    whole[-GUARD:].copy_(zone)
    inner = whole[GUARD:-GUARD].view(tensor.shape)
    inner.copy_(tensor)
    return inner, whole


def with_odd_strides(tensor: Tensor) -> Tensor:
    """The same contiguous tensor, whose dims of size 1 have strides that fit nothing."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.as_strided(tensor.shape, [3 * tensor.numel() + 1 if size == 1 else stride for size, stride in sizes])


def as_bytes(tensor: Tensor) -> Tensor:
    """Bytes of a tensor in one dimension, an entry's in one row."""
    return tensor.flatten().view(torch.uint8).view(tensor.numel(), -1)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(as_bytes(one), as_bytes(other))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Memory that torch allocates without a value holds NaN, or the largest integer."""
    settings: Any = torch.utils.deterministic  # a module of a class with this property
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ops without a deterministic form, which are allowed here
            torch.use_deterministic_algorithms(True, warn_only=True)
            settings.fill_uninitialized_memory = True
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        settings.fill_uninitialized_memory = fills


def wrong_values(
    spec: KernelSpec, inputs: Mapping[str, Any], expected: Mapping[str, Any], limit: Callable[[Tensor], float]
) -> str | None:
    """The first output that is not as expected within a limit, and by how much; None if all are."""
    for name in outputs_of(spec, inputs):
        got, want = inputs[name].double(), expected[name].double()
        if not got.isfinite().all():
            return f"{name} has places that are not finite or were not written"
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-3))
        if not error <= limit(inputs[name]):
            return f"{name} is off by {error:.2e}, allowed {limit(inputs[name]):.2e}"
    return None


def other_integers(spec: KernelSpec, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first INT8 output of which too many entries are another integer; None if none is."""
    for name in outputs_of(spec, inputs):  # a neighbouring integer is right where the value lies half way
        share = float((inputs[name].double() != expected[name].double()).double().mean())
        if inputs[name].dtype == torch.int8 and share > INT8_TIES:
            return f"{share:.1%} of {name} are another integer"
    return None
