"""`kv_pages`: copy, gather, quantise and restore listed pages of a KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, LIMITS, Arg, Implementation, KernelSpec, expect_pages
from . import reference


def check_values(given: Mapping[str, Any]) -> None:
    """UsageError for a page that a store does not have, or that is written twice."""
    expect_pages(SPEC.name, "source_pages", given["source_pages"], given["source"].shape[1])
    expect_pages(SPEC.name, "target_pages", given["target_pages"], given["target"].shape[1], once=True)


STORED = (*ANY_FLOAT, *LIMITS)
SCALES = (torch.float32, torch.float64)
SPEC = KernelSpec(
    name="kv_pages",
    reference=reference.kv_pages,
    outputs=("target", "target_scale"),
    like="source",
    args={
        "source": Arg("2 source_count page_tokens heads dim", STORED, listed_by="source_pages"),
        "source_pages": Arg("pages", (torch.int32,)),
        "target": Arg("2 target_count page_tokens heads dim", STORED, listed_by="target_pages"),
        "target_pages": Arg("pages", (torch.int32,)),
        "source_scale": Arg("2 source_count heads", SCALES, listed_by="source_pages"),
        "target_scale": Arg("2 target_count heads", SCALES, listed_by="target_pages"),
    },
    scaled={"source": "source_scale", "target": "target_scale"},
    family="pages",
    label="copy pages",
    check_values=check_values,
    flops="4 * pages * page_tokens * heads * dim",
    implementations=(Implementation("triton", ".kv_pages.gpu:kv_pages", ARCHITECTURES, (*FLOATS, *LIMITS)),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


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

    Raises UsageError naming the argument that does not fit. Pages are read on the device and not checked;
    INFERIX_DEBUG=1 checks them at the price of a wait.
    """
    if source.dtype in LIMITS and target.dtype in LIMITS and source.dtype != target.dtype:
        raise UsageError(f"{SPEC.name}: dtype of target is {target.dtype}; expected {source.dtype}, or a float")
    OP(source, source_pages, target, target_pages, source_scale, target_scale)


__all__ = ["LIMITS", "SPEC", "kv_pages"]
