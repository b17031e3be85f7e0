"""Attention over parts of the keys that loads tiles through a tensor descriptor, as `block_attention` does."""

from __future__ import annotations

from torch import Tensor

from ..block_attention.descriptors import CONFIGS, Config, candidates
from ..block_attention.descriptors import block_attention as attend
from .gpu import variants


def attention_parts(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    lse: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    scale: float,
    config: Config | None = None,
) -> None:
    """Launch for tensors that were checked; kv must begin at a multiple of 16 bytes, as every allocation does."""
    attend(
        q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale, config, parts=len(out)
    )  # fmt: skip


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    return variants(capability, CONFIGS)


__all__ = ["CONFIGS", "Config", "attention_parts", "candidates", "compile_cases"]
