"""Block attention through the flash-attn package, where a row's pages are one run in ascending order.

The package is looked for when the form is first used. Like `sdpa` it reads the page lists on the host, so it is for
comparison and for passes that are not captured.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

from ...errors import InferixError
from .sdpa import runs_of


def block_attention(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
    scale: float,
) -> None:
    """Slices of the pages as keys and values; ValueError for what the package cannot do, InferixError without it."""
    runs = runs_of("flash_attn", kv, page_table, page_count, q_sink, kv_scale, lse)
    attend = getattr(import_module("flash_attn"), "flash_attn_func", None) if find_spec("flash_attn") else None
    if attend is None:  # flash-attn 4 installs a module of this name without the function
        raise InferixError(
            "block_attention: flash-attn 2 is not installed; pip install 'flash-attn<3', or take another form"
        )
    for row, (k, v) in enumerate(runs):
        out[row] = attend(q[row : row + 1], k[None], v[None], softmax_scale=scale, causal=False)[0]
