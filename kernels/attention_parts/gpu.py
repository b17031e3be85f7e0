"""Attention over parts of the keys in Triton: the kernel of `block_attention`, a program more for each part.

Programs that run together share a head and a part, and with them what they read of the pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_attention import gpu as whole
from ..block_attention.gpu import Config, candidates
from ..spec import FRAME_480P, Case, architecture

CONFIGS = whole.CONFIGS | {(120, 128): Config(128, 64, 16, 8, 2)}  # a tail of 32 spills


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
    """Launch for tensors that were checked."""
    if config is None and q.device.type == "cuda":
        config = CONFIGS[architecture(q.device), q.shape[3]]
    whole.block_attention(
        q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale, config, parts=len(out)
    )  # fmt: skip


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    return variants(capability, CONFIGS)


def variants(capability: int, configs: dict[tuple[int, int], Config]) -> dict[str, dict[str, object]]:
    """One call per variant and head dim, in two parts, each with its config."""
    from .reference import make_inputs, parted, sizes

    options: dict[str, dict[str, Any]] = {"plain": {}, "sink": {"sinks": 1}}
    if capability >= 89:
        options["fp8"] = {"fp8": True, "sinks": 1}
    calls: dict[str, dict[str, object]] = {}
    for dim in (64, 128):
        for variant, option in options.items():
            case = Case(variant, parted(2, **sizes(1, 128, 4, FRAME_480P, 2, 2, dim)), option)
            inputs = make_inputs(case, torch.bfloat16, "cpu", 0)
            calls[f"{variant} bf16 d{dim}"] = inputs | {"config": configs[capability, dim]}
    return calls


__all__ = ["CONFIGS", "Config", "attention_parts", "candidates", "compile_cases"]
