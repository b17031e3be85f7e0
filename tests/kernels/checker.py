"""The one check of an op: outputs against float64, everything written, nothing beside it touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inferix.kernels.spec import Case, KernelSpec

GUARD = 257  # elements before and after each output
SENTINEL = 77.0
FP8 = torch.float8_e4m3fn
LIMITS = {FP8: 0.08, torch.int8: 0.008}  # of the largest entry: a step of FP8, a step of INT8
INT8_TIES = 0.01  # share of INT8 values that may round the other way


def exact(spec: KernelSpec, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the reference for the same values in float64; FP8 pages keep their dtype."""
    wide = {}
    for name, value in inputs.items():
        widens = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != FP8
        wide[name] = value.double() if widens else value.clone() if isinstance(value, Tensor) else value
    spec.reference(**wide)
    return wide


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a tensor inside a larger one that is filled with sentinels; both."""
    whole = torch.full((tensor.numel() + 2 * GUARD,), SENTINEL, dtype=torch.float32).to(tensor.dtype)
    inner = whole[GUARD:-GUARD].view(tensor.shape)
    inner.copy_(tensor)
    return inner, whole


def check(spec: KernelSpec, run: Callable[..., None], case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    """AssertionError unless `run` computes a case as the reference does, within the spec's tolerance."""
    inputs = spec.make_inputs(case, dtype, "cpu", seed)
    expected = exact(spec, inputs)
    names = [name for name in spec.outputs if inputs[name] is not None]
    wholes = {}
    for name in names:
        inputs[name], wholes[name] = guarded(inputs[name])
    run(**inputs)
    for name in names:
        got, want = inputs[name].double(), expected[name].double()
        assert got.isfinite().all(), f"{case.name}: {name} has places that are not finite or were not written"
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-3))
        limit = LIMITS.get(inputs[name].dtype, spec.tolerance[dtype])
        assert error <= limit, f"{case.name}, {dtype}: {name} is off by {error:.2e}, allowed {limit:.2e}"
        if inputs[name].dtype == torch.int8:  # a neighbouring integer is right where the value lies half way
            share = float((got != want).double().mean())
            assert share <= INT8_TIES, f"{case.name}, {dtype}: {share:.1%} of {name} are another integer"
        edges = torch.cat((wholes[name][:GUARD], wholes[name][-GUARD:])).double()
        assert (edges == SENTINEL if inputs[name].dtype != FP8 else edges == edges[0]).all(), (
            f"{case.name}: something was written beside {name}"
        )
