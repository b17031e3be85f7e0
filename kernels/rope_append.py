"""`rope_append`: rotate queries and keys, write keys and values into their pages; plain torch on every device.

Models are traced with it, and the graph compiler puts `qk_norm_rope_append` in its place, so it has no kernel of
its own. It never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .qk_norm_rope_append.reference import token_turns, turned, write_pages
from .spec import expect

NAME = "rope_append"


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    kv: Tensor,
    pages: Tensor,
    *,
    sink_turns: Tensor | None = None,
    q_sink: Tensor | None = None,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q turned by its tokens' angles; k, turned alike, and v go to their pages.

    q, q_sink, out: [R, T, heads, D], T = F*H*W; k, v: [R, T, Hkv, D], normalised already. time_turns [R, F, a, 2],
    row_turns [H, b, 2], column_turns [W, c, 2], a + b + c = D/2, float32 or float64. kv: [2, pages, H*W, Hkv, D],
    in k's dtype, or FP8 with kv_scale float32 [2, pages, Hkv]. pages: int32 [R, F]. sink_turns with q_sink, or
    neither: q turned otherwise. Returns the turned queries.

    Raises ValueError naming the dimension that does not fit. Pages are read on the device and not checked.
    Source: Wan 2.1 (arXiv 2503.20314); RoFormer (arXiv 2104.09864).
    """
    out = torch.empty_like(q) if out is None else out
    check(q, k, v, time_turns, row_turns, column_turns, kv, pages, sink_turns, q_sink, out)
    torch.ops.inferix.rope_append(
        q, k, v, time_turns, row_turns, column_turns, out, kv, pages, sink_turns, q_sink, kv_scale
    )
    return out


@torch.library.custom_op("inferix::rope_append", mutates_args=("out", "kv", "q_sink"))
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    out: Tensor,
    kv: Tensor,
    pages: Tensor,
    sink_turns: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
) -> None:
    wide = torch.promote_types(torch.promote_types(q.dtype, torch.float32), time_turns.dtype)
    turns = token_turns(time_turns, row_turns, column_turns).to(wide)
    out.copy_(turned(q.to(wide), turns))
    if sink_turns is not None and q_sink is not None:
        q_sink.copy_(turned(q.to(wide), token_turns(sink_turns, row_turns, column_turns).to(wide)))
    write_pages(turned(k.to(wide), turns), v.to(wide), kv, pages, kv_scale)


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    out: Tensor,
    kv: Tensor,
    pages: Tensor,
    sink_turns: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
) -> None:
    return None


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time_turns: Tensor,
    row_turns: Tensor,
    column_turns: Tensor,
    kv: Tensor,
    pages: Tensor,
    sink_turns: Tensor | None,
    q_sink: Tensor | None,
    out: Tensor,
) -> None:
    """ValueError unless the tensors fit each other."""
    dims = {"q": (q, 4), "k": (k, 4), "kv": (kv, 5), "pages": (pages, 2), "time_turns": (time_turns, 4)}
    for name, (tensor, count) in dims.items():
        expect(NAME, f"dims of {name}", tensor.ndim, count)
    rows, frames = pages.shape
    height, width, (heads, dim) = len(row_turns), len(column_turns), q.shape[2:]
    tokens, kv_heads = frames * height * width, kv.shape[3]
    shapes = {
        "q": (q, (rows, tokens, heads, dim)),
        "k": (k, (rows, tokens, kv_heads, dim)),
        "v": (v, (rows, tokens, kv_heads, dim)),
        "out": (out, (rows, tokens, heads, dim)),
        "q_sink": (q_sink, (rows, tokens, heads, dim)),
        "time_turns": (time_turns, (rows, frames, time_turns.shape[2], 2)),
        "sink_turns": (sink_turns, (rows, frames, time_turns.shape[2], 2)),
        "kv": (kv, (2, kv.shape[1], height * width, kv_heads, dim)),
    }
    for name, (given, shape) in shapes.items():
        if given is not None:
            expect(NAME, f"shape of {name}", tuple(given.shape), shape)
    pairs = time_turns.shape[2] + row_turns.shape[1] + column_turns.shape[1]
    expect(NAME, "pairs of the three tables together", pairs, dim // 2)
    expect(NAME, "sink_turns and q_sink are both given", sink_turns is None, q_sink is None)
