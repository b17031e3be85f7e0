"""Fingerprint of weights: a hash of some values of each, so that other weights are recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn

SAMPLED = 64  # values of each weight that go into a fingerprint


def sampled(weight: Tensor) -> Tensor:
    """Some values of a weight at equal distances."""
    return weight.flatten()[:: max(1, weight.numel() // SAMPLED)]


def fingerprint(module: nn.Module) -> str:
    """Fingerprint of a module's weights."""
    return fingerprint_of((name, sampled(weight)) for name, weight in module.state_dict().items())


def fingerprint_of(samples: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of weights whose names and sampled values these are, in the order of a module's state."""
    digest = hashlib.sha256()
    for name, values in samples:
        digest.update(name.encode() + values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
