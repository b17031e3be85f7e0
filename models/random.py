"""Seeded random weights that keep signals in range, for tests, demos and benchmarks; their pictures are noise.

Tensors are drawn in the order of their names from one CPU generator, so a seed gives the same weights everywhere.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from ..errors import UsageError


def random_state(module: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw a state dict for `module`, which may be on the meta device. Raises UsageError if it exceeds host memory."""
    needed, have = sum(tensor.numel() for tensor in module.state_dict().values()) * dtype.itemsize, host_memory()
    if have is not None and needed > have:
        raise UsageError(
            f"random weights of {needed / 1e9:.3g} GB are more than the {have / 1e9:.3g} GB of memory here; take a "
            "smaller model (wan-tiny) or dtype bfloat16. inferix plan shows what a model needs without loading it"
        )
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, empty in sorted(module.state_dict().items()):
        noise = torch.randn(empty.shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            noise = 1.0 + 0.1 * noise
        elif empty.ndim > 1:
            noise = noise / math.sqrt(empty[0].numel())
        else:
            noise = 0.02 * noise
        state[name] = noise.to(dtype)
    return state


def host_memory() -> int | None:
    """Return the bytes of memory of this machine; None where the system does not report them."""
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
