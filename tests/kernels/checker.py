"""The one check of an op: outputs against float64, everything written, nothing beside it touched."""

from __future__ import annotations

from collections.abc import Callable

import torch

from inferix.kernels.spec import Case, KernelSpec
from inferix.kernels.verify import fault


def check(
    spec: KernelSpec, run: Callable[..., None], case: Case, dtype: torch.dtype, seed: int = 0, thorough: bool = False
) -> None:
    """AssertionError unless `run` computes a case as the reference does, within the spec's tolerance."""
    reason = fault(spec, run, case, dtype, seed=seed, thorough=thorough)
    assert reason is None, f"{case.name}, {dtype}: {reason}"
