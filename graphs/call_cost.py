"""What a call must move and compute, from its references alone: bytes of all it touches, and operations of matmuls.

How many pages attention reads only the tables know; the caller tells.
"""

from __future__ import annotations

import math
from typing import Any

from .program import Call, Ref

PACKED = "packed matmul"  # of FP8 or INT8 numbers
FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (  # the first that has a part of the op's name
    ("attention", ("attention",)),
    (PACKED, ("lowp",)),
    ("matmul", ("mm", "linear", "convolution")),
    ("pages", ("append", "kv_pages")),
    ("norm and gate", ("norm", "adaln", "rms")),
    ("solver", ("denoise", "noise")),
    ("copy", ("copy_", "cat", "stack")),
)


def family(call: Call) -> str:
    """The kind of work: attention, packed matmul, matmul, pages, norm and gate, solver, copy, or elementwise."""
    name = call.op._schema.name.partition("::")[2]
    return next((kind for kind, parts in FAMILIES if any(part in name for part in parts)), "elementwise")


def listed_in(call: Call) -> Ref | None:
    """The counts of pages that a call reads, int32 [rows]; None for calls that read none."""
    found = named(call).get("page_count")
    return found if isinstance(found, Ref) else None


def nbytes(call: Call, listed: int = 0) -> int:
    """Bytes that the call reads and writes, each buffer once; `listed` pages of a store that it reads by table."""
    given, found = named(call), dict[str, int]()
    for ref in (*call.reads, *call.writes):
        found[ref.buffer] = max(found.get(ref.buffer, 0), math.prod(ref.size) * ref.dtype.itemsize)
    if isinstance(kv := given.get("kv"), Ref):
        pages = listed if listed_in(call) is not None else math.prod(given["pages"].size)
        found[kv.buffer] = found[kv.buffer] // kv.size[1] * pages
    for store, listing in (("source", "source_pages"), ("target", "target_pages")):
        if listing in given:
            pages = given[store]
            found[pages.buffer] = found[pages.buffer] // pages.size[1] * math.prod(given[listing].size)
    return sum(found.values())


def flops(call: Call, listed: int = 0) -> int:
    """Multiplications and additions of matmuls, convolutions and attention; 0 for all else."""
    given, name = named(call), call.op._schema.name.partition("::")[2]
    if name == "block_attention":
        q, kv = given["q"], given["kv"]
        return 4 * math.prod(q.size[1:]) * listed * kv.size[2]
    if name == "scaled_dot_product_attention":
        return 4 * math.prod(given["query"].size) * given["key"].size[-2]
    if family(call) not in ("matmul", PACKED):
        return 0
    (out, *_) = call.writes
    if name == "convolution":
        return 2 * math.prod(out.size) * math.prod(given["weight"].size[1:])
    right = given.get("mat2", given.get("batch2"))  # [..., K, N]; weights are [N, K]
    return 2 * math.prod(out.size) * (given["weight"].size[-1] if right is None else right.size[-2])


def named(call: Call) -> dict[str, Any]:
    """Arguments by the names of the op's schema."""
    names = (argument.name for argument in call.op._schema.arguments)
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
