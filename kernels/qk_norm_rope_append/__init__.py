"""`qk_norm_rope_append`: from the fused projection to rotated queries and to keys and values in their pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, FP8, Arg, Implementation, KernelSpec, expect_pages, expect_scales
from . import reference
from .reference import rope_cos_sin


def check_values(given: Mapping[str, Any]) -> None:
    """UsageError for a page that the store does not have or that is written twice, or a scale that is not above 0."""
    expect_pages(SPEC.name, "pages", given["pages"], given["kv"].shape[1], once=True)
    expect_scales(SPEC.name, given["kv_scale"])


QUERIES, ROPE_TIME = "rows frames*height*width heads dim", "rows frames time_pairs 2"
SPEC = KernelSpec(
    name="qk_norm_rope_append",
    reference=reference.qk_norm_rope_append,
    outputs=("q", "q_sink", "kv"),
    like="qkv",
    args={
        "qkv": Arg("rows frames*height*width (heads+2*kv_heads)*dim", ANY_FLOAT),
        "q_weight": Arg("heads*dim", ("qkv",)),
        "k_weight": Arg("kv_heads*dim", ("qkv",)),
        "rope_time": Arg(ROPE_TIME, (torch.float32,)),
        "rope_rows": Arg("height row_pairs 2", (torch.float32,)),
        "rope_columns": Arg("width column_pairs 2", (torch.float32,)),
        "q": Arg(QUERIES, ("qkv",)),
        "kv": Arg("2 pages height*width kv_heads dim", ("qkv", FP8), listed_by="pages"),
        "pages": Arg("rows frames", (torch.int32,)),
        "rope_sink": Arg(ROPE_TIME, (torch.float32,)),
        "q_sink": Arg(QUERIES, ("qkv",)),
        "kv_scale": Arg("2 pages kv_heads", (torch.float32,), listed_by="pages"),
    },
    rules=("time_pairs + row_pairs + column_pairs == dim // 2",),
    needs=(("rope_sink", "q_sink"), ("q_sink", "rope_sink")),
    scaled={"kv": "kv_scale"},
    check_values=check_values,
    family="norm and gate",
    label="qk norm, rope",
    flops="8 * rows * frames * height * width * (heads + kv_heads) * dim",
    implementations=(
        Implementation("triton", ".qk_norm_rope_append.gpu:qk_norm_rope_append", ARCHITECTURES, FLOATS),
        Implementation("cpu", ".qk_norm_rope_append.cpu:qk_norm_rope_append", cpu=True),
    ),
    reads_host=("cpu",),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    kv: Tensor,
    pages: Tensor,
    *,
    heads: int,
    rope_sink: Tensor | None = None,
    q_sink: Tensor | None = None,
    kv_scale: Tensor | None = None,
    eps: float = 1e-6,
    q: Tensor | None = None,
) -> Tensor:
    """Normalise queries and keys over their full width, rotate them in three axes, write keys and values.

    qkv: [R, F*H*W, (heads + 2*Hkv) * D], a fused projection; q_weight [heads*D], k_weight [Hkv*D] of the RMS norm.
    rope_time: float32 [R, F, a, 2], rope_rows: [H, b, 2], rope_columns: [W, c, 2], cosines and sines of the
    angles of each pair (2j, 2j + 1), a + b + c = D/2, from `rope_cos_sin`. kv: [2, pages, H*W, Hkv, D], in qkv's
    dtype or FP8 with kv_scale float32 [2, pages, Hkv] (entries beyond 448 are clipped). pages: int32 [R, F],
    the page of each frame, each once. rope_sink with q_sink, or neither: the same queries rotated to the positions from
    which they see the sink, for `block_attention`. q: [R, F*H*W, heads, D]. Returns q.

    Raises UsageError naming the argument that does not fit. Pages and scales are read on the device and not checked;
    INFERIX_DEBUG=1 checks them at the price of a wait.
    Source: Wan 2.1 (arXiv 2503.20314); RoFormer (arXiv 2104.09864).
    """
    if q is None:
        if kv.ndim != 5:
            raise UsageError(f"{SPEC.name}: shape of kv is {tuple(kv.shape)}; expected 5 dims")
        q = qkv.new_empty(*qkv.shape[:2], heads, kv.shape[4])
    OP(
        qkv, q_weight, k_weight, rope_time, rope_rows, rope_columns, q, kv, pages, rope_sink, q_sink, kv_scale, eps
    )  # fmt: skip
    return q


__all__ = ["SPEC", "qk_norm_rope_append", "rope_cos_sin"]
