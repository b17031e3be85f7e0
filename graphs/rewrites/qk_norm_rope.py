"""qk-norm-rope: norm and rotation of queries and keys and the write into pages, in one kernel over one projection.

Precondition: an RMS norm of queries and of keys over their full width, with one eps, feeds `rope_append`, and queries,
keys and values are the three parts of one projection in this order (merge-qkv); pages are in the model's dtype. Pairs
are interleaved over the whole width of a head; other rotations stay `rope_append`.
Claim: equal to rounding; the kernel does not round between norm and rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, fx

from ...kernels.rope_append import rope_append
from ..edit import Editor, aten, fake, shape
from ..match import Match, Pattern, peeled
from ..types import PassGraph
from .base import ops
from .rms_norm import NORMS

ROWS, FRAMES, HEIGHT, WIDTH, PAGES, HEADS, KV_HEADS, PAIRS = 3, 5, 7, 11, 13, 17, 31, (19, 23, 29)
TOKENS, DIM = FRAMES * HEIGHT * WIDTH, 2 * sum(PAIRS)


def append_of(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., None]:
    """Norm, rotation and append, with the norm written in one of the ways."""

    def append(
        q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, time: Tensor, row: Tensor,
        column: Tensor, kv: Tensor, pages: Tensor, eps: float, rope_sink: Tensor | None = None,
    ) -> None:  # fmt: skip
        q, k = norm(q, q_weight, eps), norm(k, k_weight, eps)
        q, k, v = (part.unflatten(-1, (-1, DIM)) for part in (q, k, v))
        q_sink = None if rope_sink is None else torch.empty_like(q)
        rope_append(q, k, v, time, row, column, kv, pages, rope_sink=rope_sink, q_sink=q_sink)

    return append


@cache
def patterns(dtype: torch.dtype, turns: torch.dtype) -> tuple[Pattern, ...]:
    """Each way of writing the norm, without and with a sink seen at another place."""
    full, narrow, turns_shape = HEADS * DIM, KV_HEADS * DIM, (ROWS, FRAMES, PAIRS[0], 2)
    tensors: dict[str, tuple[int, ...]] = {"q": (ROWS, TOKENS, full), "q_weight": (full,), "k_weight": (narrow,)}
    tensors |= {"k": (ROWS, TOKENS, narrow), "v": (ROWS, TOKENS, narrow), "time": turns_shape}
    tensors |= {"row": (HEIGHT, PAIRS[1], 2), "column": (WIDTH, PAIRS[2], 2)}
    tensors |= {"kv": (2, PAGES, HEIGHT * WIDTH, KV_HEADS, DIM), "pages": (ROWS, FRAMES)}
    dtypes = dict.fromkeys(("time", "row", "column", "rope_sink"), turns) | {"pages": torch.int32}
    return tuple(
        Pattern.of(append_of(norm), tensors | more, dtype, dtypes, states=("kv",), scalars=("eps",))
        for norm in NORMS
        for more in ({}, {"rope_sink": turns_shape})
    )


def qk_norm_rope(graph: PassGraph) -> int:
    """Put `inferix::qk_norm_rope_append` in the place of norms and append."""
    edit, places = Editor(graph.graph), 0
    for append in graph.graph.find_nodes(op="call_function", target=ops.rope_append.default):
        time = append.args[3]
        if not kernel_rotates(append):
            continue
        for pattern in patterns(fake(append.args[0]).dtype, fake(time).dtype):
            match = pattern.at(append)
            qkv = None if match is None else whole(match)
            if match is not None and qkv is not None:
                fuse(edit, match, qkv)
                places += 1
                break
    return places


def kernel_rotates(append: fx.Node) -> bool:
    """Return True if the kernel has the form of rotation: interleaved pairs over the whole width of a head."""
    q, half_split = append.args[0], append.args[12]
    pairs: int = sum(shape(axis)[-2] for axis in append.args[3:6])  # type: ignore[arg-type, misc]
    return not half_split and 2 * pairs == shape(q)[-1]  # type: ignore[arg-type]


def whole(match: Match) -> fx.Node | None:
    """The projection whose three parts are queries, keys and values; None if there is none."""
    start, sources = 0, set[fx.Node]()
    for name in ("q", "k", "v"):
        part = match.given[name]
        if part.target is not aten.slice.Tensor or part.args[2] != start:
            return None
        start = part.args[3]  # type: ignore[assignment]
        sources.add(peeled(part.args[0]))  # type: ignore[arg-type]
    qkv = sources.pop()
    return qkv if not sources and shape(qkv)[-1] == start else None


def fuse(edit: Editor, match: Match, qkv: fx.Node) -> None:
    append = match.anchor
    _, _, _, time, row, column, out, kv, pages, rope_sink, q_sink, scale = (*append.args, *(None,) * 3)[:12]
    rows, tokens = shape(append.args[0])[:2]  # type: ignore[arg-type]
    with edit.before(append):
        edit.call(
            ops.qk_norm_rope_append.default, edit.view(qkv, (rows, tokens, shape(qkv)[-1])),
            edit.dense(match.given["q_weight"]), edit.dense(match.given["k_weight"]), time, row, column, out, kv, pages,
            rope_sink, q_sink, scale, match.scalar("eps"),
        )  # fmt: skip
    edit.graph.erase_node(append)
    del match.nodes[match.pattern.anchor]
    match.erase()
