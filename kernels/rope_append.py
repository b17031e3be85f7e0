"""`rope_append`: rotate queries and keys, write keys and values into their pages.

Models are traced with it, and the graph compiler puts `qk_norm_rope_append` in its place, so on a GPU it has no kernel
of its own. There it never waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .op import Op
from .qk_norm_rope_append import reference as with_norm
from .qk_norm_rope_append.reference import rotated, token_cos_sin, write_pages
from .spec import Arg, Case, Implementation, KernelSpec


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    out: Tensor,
    kv: Tensor,
    pages: Tensor,
    rope_sink: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    half_split: bool,
) -> None:
    """In float32 or better; see the public function for shapes."""
    wide = torch.promote_types(torch.promote_types(q.dtype, torch.float32), rope_time.dtype)
    cos_sin = token_cos_sin(rope_time, rope_rows, rope_columns).to(wide)
    out.copy_(rotated(q.to(wide), cos_sin, half_split))
    if rope_sink is not None and q_sink is not None:
        sink_cos_sin = token_cos_sin(rope_sink, rope_rows, rope_columns).to(wide)
        q_sink.copy_(rotated(q.to(wide), sink_cos_sin, half_split))
    write_pages(rotated(k.to(wide), cos_sin, half_split), v.to(wide), kv, pages, kv_scale)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    inputs = with_norm.make_inputs(case, dtype, device, seed)
    heads, kv_heads, dim = case["heads"], case["kv_heads"], case["dim"]
    parts = inputs.pop("qkv").split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in parts)
    out = inputs.pop("q")
    for name in ("q_weight", "k_weight", "eps"):
        del inputs[name]
    return {"q": q, "k": k, "v": v, "out": out, "half_split": bool(case.options.get("half_split")), **inputs}


HALF_SPLIT = Case("pairs that lie apart", with_norm.sizes(1, 2, 2, 3, 2, 1, 64), {"half_split": True})
QUERIES, KEYS = "rows frames*height*width heads dim", "rows frames*height*width kv_heads dim"
SPEC = KernelSpec(
    name="rope_append",
    reference=reference,
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
    implementations=(Implementation("cpu", ".qk_norm_rope_append.cpu:rope_append", cpu=True),),
    make_inputs=make_inputs,
    test_cases=(*with_norm.TEST_CASES, HALF_SPLIT),
    bench_cases=with_norm.BENCH_CASES,
    tolerance=with_norm.TOLERANCE,
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
