"""Where attention over one run of pages takes the place of the paged kernels, and through which library.

A table by card and shape chooses. Where it has no entry, the paged kernels run: no card has run `dense_attention`, what
the time model (`bench/time_model.py`) predicts for it rests on an assumed rate of cuDNN, and a program for each run is
captured for each session.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...errors import UsageError, quoted
from . import flash

PAGED = "paged"


class Shape(NamedTuple):
    """Queries of a row, heads of keys and values, channels of a head, and keys."""

    tokens: int
    heads: int
    dim: int
    keys: int


# By card, as the driver names it, and shape: a form of `dense_attention` or PAGED, as measured on that card.
MEASURED: dict[tuple[str, Shape], str] = {}


def installed(device: torch.device) -> tuple[str, ...]:
    """Forms whose library is there for a device."""
    has_cudnn = device.type == "cuda" and bool(torch.backends.cudnn.is_available())
    has_flash = device.type == "cuda" and flash.library() is not None
    return (*["cudnn"] * has_cudnn, *["flash_attn"] * has_flash, "sdpa")


def expect_installed(form: str, device: torch.device) -> None:
    """UsageError for a form of a library that is not there for a device."""
    there = installed(device)
    if form in ("cudnn", "flash_attn") and form not in there:
        raise UsageError(
            f"dense_attention: form is {quoted(form)}, whose library is not there for {device}; there is "
            f"{', '.join(there)}"
        )


def form_for(device: torch.device, shape: Shape) -> str | None:
    """The form that was fastest on this card for a shape; None where the paged kernels run."""
    if device.type != "cuda" or not MEASURED:
        return None
    form = MEASURED.get((torch.cuda.get_device_name(device), shape), PAGED)
    return form if form in installed(device) else None
