"""`rope_append`: rotate queries and keys, write keys and values into their pages.

Models are traced with it, and the graph compiler puts `qk_norm_rope_append` in its place where a norm over the full
width comes before it and pairs lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

QUERIES, KEYS = "rows frames*height*width heads dim", "rows frames*height*width kv_heads dim"
SPEC = KernelSpec(
    name="rope_append",
    reference=reference.rope_append,
    outputs=("out", "kv", "q_sink"),
    like="q",
    args={
        "q": Arg(QUERIES),
        "k": Arg(KEYS),
        "v": Arg(KEYS),
        "rope_time": Arg("rows frames time_pairs 2"),
        "rope_rows": Arg("height row_pairs 2"),
        "rope_columns": Arg("width column_pairs 2"),
        "out": Arg(QUERIES),
        "kv": Arg("2 pages height*width kv_heads dim", listed_by="pages"),
        "pages": Arg("rows frames"),
        "rope_sink": Arg("rows frames time_pairs 2"),
        "q_sink": Arg(QUERIES),
        "kv_scale": Arg("2 pages kv_heads", listed_by="pages"),
    },
    rules=("time_pairs + row_pairs + column_pairs <= dim // 2",),
    needs=(("rope_sink", "q_sink"), ("q_sink", "rope_sink")),
    dense=False,
    family="pages",
    label="rope, append",
    flops="8 * rows * frames * height * width * (heads + kv_heads) * dim",
    implementations=(
        Implementation(
            "triton", ".rope_append.gpu:rope_append", ARCHITECTURES, FLOATS, last_dims=(16, 32, 64, 128, 256)
        ),
        Implementation("cpu", ".qk_norm_rope_append.cpu:rope_append", cpu=True),
    ),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
    reads_host=("cpu",),
)
OP = Op(SPEC)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    kv: Tensor,
    pages: Tensor,
    *,
    rope_sink: Tensor | None = None,
    q_sink: Tensor | None = None,
    kv_scale: Tensor | None = None,
    half_split: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q and k by the angles of their tokens and write k and v into their pages; returns the rotated queries.

    q, q_sink, out: [R, T, heads, D], T = F*H*W; k, v: [R, T, Hkv, D], normalised already. rope_time [R, F, a, 2],
    rope_rows [H, b, 2], rope_columns [W, c, 2], a + b + c at most D/2, float32 or float64. kv: [2, pages, H*W, Hkv, D],
    in k's dtype, or FP8 with kv_scale float32 [2, pages, Hkv]. pages: int32 [R, F]. rope_sink with q_sink, or
    neither: q rotated to the positions from which it sees the sink. The first 2 * (a + b + c) channels are rotated, in
    pairs (2j, 2j + 1), or with `half_split` (j, j + a + b + c).

    Raises UsageError naming the argument that does not fit. Pages are read on the device and not checked.
    Source: Wan 2.1 (arXiv 2503.20314); RoFormer (arXiv 2104.09864).
    """
    out = torch.empty_like(q) if out is None else out
    OP(q, k, v, rope_time, rope_rows, rope_columns, out, kv, pages, rope_sink, q_sink, kv_scale, half_split)
    return out


__all__ = ["SPEC", "rope_append"]
