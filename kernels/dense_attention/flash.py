"""Attention over one run of pages through the flash-attn packages, looked for when the form is first used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ...errors import InferixError
from .run import keys_and_values

PACKAGES = ("flash_attn_interface", "flash_attn")  # FlashAttention-3; FlashAttention-2, of which others are a namespace


def library() -> Callable[..., Any] | None:
    """The function `flash_attn_func` of the newest package that has it; None without one."""
    for name in PACKAGES:
        if find_spec(name) is not None and (attend := getattr(import_module(name), "flash_attn_func", None)):
            function: Callable[..., Any] = attend
            return function
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention [B, T, H, D] without a mask; InferixError without a package."""
    function = library()
    if function is None:
        raise InferixError("attention: flash-attn is not installed; pip install flash-attn, or take another form")
    result = function(q, k, v, softmax_scale=scale, causal=False)
    attended: Tensor = result[0] if isinstance(result, tuple) else result  # some versions give the sums beside it
    return attended


def dense_attention(q: Tensor, kv: Tensor, first: int, count: int, out: Tensor, scale: float) -> None:
    """One call for all rows, whose result is copied into its place."""
    out.copy_(attend(q, *keys_and_values(kv, first, count, len(q)), scale))
