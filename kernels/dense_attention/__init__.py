"""`dense_attention`: attention over one run of pages through a library's kernel, which knows no pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UsageError
from ..block_attention import HEAD_DIMS
from ..op import Op
from ..spec import ANY_FLOAT, Arg, Implementation, KernelSpec
from . import reference
from .run import run_of

QUERIES = "rows tokens heads dim"
AMPERE = (80, 89, 90, 100, 120)

SPEC = KernelSpec(
    name="dense_attention",
    reference=reference.dense_attention,
    outputs=("out",),
    like="q",
    args={
        "q": Arg(QUERIES, ANY_FLOAT),
        "kv": Arg("2 pages page_tokens kv_heads dim", ("q",), listed_by="count"),
        "out": Arg(QUERIES, ("q",)),
    },
    rules=("heads % kv_heads == 0", "count > 0", "first >= 0", "first + count <= pages"),
    family="attention",
    label="attention, one run",
    flops="4 * rows * tokens * heads * dim * count * page_tokens",
    implementations=(
        Implementation(
            "cudnn", ".dense_attention.cudnn:dense_attention", AMPERE, last_dims=HEAD_DIMS,
            rules=("heads == kv_heads",), otherwise="sdpa",
        ),
        Implementation("flash_attn", ".dense_attention.flash:dense_attention"),
        Implementation("sdpa", ".dense_attention.sdpa:dense_attention", cpu=True),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    tensor_cores=True,
    shape_names={"q": ("tokens",), "kv": ("pages", "page_tokens")},
)  # fmt: skip
OP = Op(SPEC)


def dense_attention(
    q: Tensor, kv: Tensor, pages: Sequence[int], *, scale: float | None = None, out: Tensor | None = None
) -> Tensor:
    """Softmax attention of each row's queries over all tokens of `pages`, which follow each other in the store.

    Keys and values are read where they lie, and no table is read: the pages are numbers of the host, so that a captured
    graph holds their addresses. Where pages change from call to call, or have holes, take `block_attention`.

    q: [R, T, H, D]. kv: [2, pages, page_tokens, Hkv, D], keys then values, in q's dtype; Hkv divides H. pages: of all
    rows, in any order that makes one run. scale: by default 1/sqrt(D), above 0. out: [R, T, H, D], where to write.

    Raises UsageError naming the argument, for pages with a hole among others.
    """
    run = run_of(pages)
    if run is None:
        raise UsageError(f"{SPEC.name}: pages are {list(pages)}; expected one run, each once; use block_attention")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not scale > 0:
        raise UsageError(f"{SPEC.name}: scale is {scale}; expected a number above 0")
    out = torch.empty_like(q) if out is None else out
    OP(q, kv, *run, out, scale)
    return out


__all__ = ["SPEC", "dense_attention"]
