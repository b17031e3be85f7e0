"""Block attention over FP8 pages whose queries are rounded to FP8 too, so that their products with keys are in FP8.

Each query of each head has a scale, its largest entry over the largest FP8 number; keys keep the scales of their pages.
Weights and values are multiplied in float16, as over FP8 pages without it. On sm_90 the tensor cores add FP8 products
with fewer bits than float32 has. It rounds what the op's reference does not, so that it has a reference of its own, and
runs only where it is asked for: `kernels={"block_attention": "fp8_qk"}`.
Source: FP8 formats (arXiv 2209.05433); a scale for each query as in SageAttention (arXiv 2410.02367).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import FP8, FRAME_480P, LIMITS, Case, architecture
from . import reference as exact
from .gpu import ANYWHERE, Config, candidates
from .gpu import block_attention as attend

CONFIGS = {(90, 64): Config(128, 128, 0, 8, 3), (90, 128): Config(128, 128, 0, 8, 2)}


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
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked; UsageError for a call that its rules in the op's spec leave out."""
    from . import SPEC

    args = (q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale)
    SPEC.expect_taken("fp8_qk", dict(zip(SPEC.names, args, strict=True)))
    config = config or (CONFIGS[architecture(q.device), q.shape[3]] if q.device.type == "cuda" else ANYWHERE)
    attend(*args, config=config, low=int(LIMITS[FP8]))


def reference(
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
    """The op's reference on rounded queries, over FP8 pages; over others on queries as they are."""
    if kv_scale is not None:
        q, q_sink = rounded(q), None if q_sink is None else rounded(q_sink)
    exact.block_attention(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale)


def rounded(q: Tensor) -> Tensor:
    """Queries [.., D] rounded to FP8 with a scale each, in float32 or better."""
    wide = q.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LIMITS[FP8]
    kind = torch.promote_types(q.dtype, torch.float32)
    return (wide / scale).to(FP8).to(kind) * scale.to(kind)


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    calls: dict[str, dict[str, object]] = {}
    for dim in (64, 128):
        for variant, options in {"plain": {}, "sink": {"sinks": 1, "lse": True}}.items():
            case = Case(variant, exact.sizes(1, 128, 4, FRAME_480P, 2, 2, dim), {"fp8": True, **options})
            inputs = exact.make_inputs(case, torch.bfloat16, "cpu", 0)
            calls[f"{variant} bf16 d{dim}"] = inputs | {"config": CONFIGS[capability, dim]}
    return calls


__all__ = ["CONFIGS", "Config", "block_attention", "candidates", "compile_cases", "reference"]
