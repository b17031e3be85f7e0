"""Launches of Triton kernels, directly or through a wrapper that a tracer records; see `triton_ops`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

TRACED: ContextVar[bool] = ContextVar("launches_are_traced", default=False)


def launchable(kernel: Any) -> Any:
    """Return a kernel to launch; while an op of `triton_ops` runs, its wrapper, which tracers record."""
    return torch.library.wrap_triton(kernel) if TRACED.get() else kernel
