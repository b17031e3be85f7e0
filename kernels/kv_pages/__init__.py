"""`kv_pages`: copy, gather, quantise and restore listed pages of a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import (
    ARCHITECTURES,
    FLOATS,
    Implementation,
    KernelSpec,
    debugging,
    expect,
    expect_dense,
    expect_one_of,
    expect_pages,
    expect_together,
)
from . import reference
from .reference import LIMITS

SPEC = KernelSpec(
    name="kv_pages",
    reference=reference.kv_pages,
    outputs=("target", "target_scale"),
    like="source",
    implementations=(
        Implementation("triton", ".kv_pages.gpu:kv_pages", ARCHITECTURES, (*FLOATS, torch.float8_e4m3fn, torch.int8)),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    nbytes=reference.nbytes,
    flops=reference.flops,
)


def kv_pages(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    *,
    source_scale: Tensor | None = None,
    target_scale: Tensor | None = None,
) -> None:
    """Write pages `source_pages` of one store as pages `target_pages` of another, in the target's precision.

    source, target: [2, pages, page_tokens, Hkv, D], which may be one store as long as no page is both read and
    written. source_pages, target_pages: int32 [N], the latter each once. Stores in FP8 (e4m3) or INT8 have a
    scale, float32 [2, pages, Hkv]; a scale written here puts the largest entry of a page's head at 448 or 127.
    Between two stores of one dtype, entries and scales are copied as they are. A gather is a copy to pages 0, 1, ...

    Raises ValueError naming the dimension that does not fit. Pages are read on the device and not checked;
    INFERIX_DEBUG=1 checks them at the price of a wait.
    """
    check(source, source_pages, target, target_pages, source_scale, target_scale)
    torch.ops.inferix.kv_pages(source, source_pages, target, target_pages, source_scale, target_scale)


@torch.library.custom_op("inferix::kv_pages", mutates_args=("target", "target_scale"))
def _op(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    source_scale: Tensor | None,
    target_scale: Tensor | None,
) -> None:
    SPEC.choose(source)(source, source_pages, target, target_pages, source_scale, target_scale)


@_op.register_fake
def _(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    source_scale: Tensor | None,
    target_scale: Tensor | None,
) -> None:
    return None


def check(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    source_scale: Tensor | None,
    target_scale: Tensor | None,
) -> None:
    """ValueError unless the tensors fit each other."""
    op = SPEC.name
    for name, store, scale in (("source", source, source_scale), ("target", target, target_scale)):
        expect(op, f"dims of {name}", store.ndim, 5)
        expect(op, f"first dim of {name}", store.shape[0], 2)
        expect_one_of(op, f"dtype of {name}", store.dtype, (*SPEC.tolerance, *LIMITS))
        expect(op, f"{name}_scale is given", scale is not None, store.dtype in LIMITS)
        if scale is not None:
            expect(op, f"shape of {name}_scale", tuple(scale.shape), (2, store.shape[1], store.shape[3]))
            expect_one_of(op, f"dtype of {name}_scale", scale.dtype, (torch.float32, torch.float64))
    if source.dtype in LIMITS and target.dtype in LIMITS:
        expect(op, "dtype of target", target.dtype, source.dtype)
    expect(op, "page of target (tokens, heads, dim)", tuple(target.shape[2:]), tuple(source.shape[2:]))
    if source.numel() == 0 or source_pages.numel() == 0:
        raise ValueError(f"{op}: source is {list(source.shape)}, {len(source_pages)} pages; expected 1 or more of each")
    for name, pages in (("source_pages", source_pages), ("target_pages", target_pages)):
        expect(op, f"shape of {name}", tuple(pages.shape), (len(source_pages),))
        expect(op, f"dtype of {name}", pages.dtype, torch.int32)
    everything = {"source_pages": source_pages, "target": target, "target_pages": target_pages}
    scales = {"source_scale": source_scale, "target_scale": target_scale}
    expect_together(op, source.device, **everything, **scales)
    expect_dense(op, source=source, **everything, **scales)
    if debugging():
        expect_pages(op, "source_pages", source_pages, source.shape[1])
        expect_pages(op, "target_pages", target_pages, target.shape[1], once=True)


__all__ = ["LIMITS", "SPEC", "kv_pages"]
