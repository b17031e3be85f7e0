"""kv_pages in Triton: one program per stretch of a page's head, or per whole head where its scale is to be found.

Where it is, the program reads the head twice, the second time mostly from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import LIMITS, Case, expect_fp8


@dataclass(frozen=True)
class Config:
    """Tokens of a page at a time, and warps."""

    tokens: int
    warps: int


CONFIG = Config(64, 4)


@triton.jit
def _move(
    source_ptr, source_pages_ptr, target_ptr, target_pages_ptr, source_scale_ptr, target_scale_ptr,
    source_count, target_count, page_tokens, heads, limit,
    DIM: tl.constexpr, TOKENS: tl.constexpr, SCALED: tl.constexpr, SCALE: tl.constexpr, COPY: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    head, half = tl.program_id(1) % heads, tl.program_id(1) // heads  # half: 0 keys, 1 values
    source_page = (half * source_count + tl.load(source_pages_ptr + tl.program_id(0))).to(tl.int64)
    target_page = (half * target_count + tl.load(target_pages_ptr + tl.program_id(0))).to(tl.int64)
    token, dim = tl.arange(0, TOKENS)[:, None], tl.arange(0, DIM)[None]
    source_ptr += (source_page * page_tokens * heads + head) * DIM  # stores: [2, pages, page_tokens, heads, DIM]
    target_ptr += (target_page * page_tokens * heads + head) * DIM
    factor = 1.0
    if SCALED:
        factor = tl.load(source_scale_ptr + source_page * heads + head)  # scales: [2, pages, heads]
    begin, end = tl.program_id(2) * TOKENS, tl.minimum((tl.program_id(2) + 1) * TOKENS, page_tokens)
    if COPY:
        if SCALED:
            tl.store(target_scale_ptr + target_page * heads + head, factor, mask=begin == 0)
    elif SCALE:
        end = page_tokens
        largest = tl.zeros([TOKENS, DIM], tl.float32)
        for start in range(0, page_tokens, TOKENS):
            inside = start + token < page_tokens
            x = tl.load(source_ptr + (start + token) * heads * DIM + dim, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
        scale = tl.maximum(tl.max(tl.max(largest, 1), 0), 1e-12) / limit
        tl.store(target_scale_ptr + target_page * heads + head, scale)
        factor = 1.0 / scale
    for start in range(begin, end, TOKENS):
        inside = start + token < page_tokens
        offs = (start + token) * heads * DIM + dim  # [TOKENS, DIM]
        x = tl.load(source_ptr + offs, mask=inside, other=0.0)
        if not COPY:
            x = x.to(tl.float32) * factor
            if SCALE:
                x = tl.minimum(tl.maximum(x, -limit), limit)
            if ROUND:
                x = tl.floor(x + 0.5)
        tl.store(target_ptr + offs, x.to(target_ptr.dtype.element_ty), mask=inside)


def kv_pages(
    source: Tensor,
    source_pages: Tensor,
    target: Tensor,
    target_pages: Tensor,
    source_scale: Tensor | None,
    target_scale: Tensor | None,
    config: Config = CONFIG,
) -> None:
    """Launch for tensors that were checked; a page list is passed for a scale that is not given."""
    if torch.float8_e4m3fn in (source.dtype, target.dtype):
        expect_fp8("kv_pages", source.device)
    _, count, tokens, heads, dim = source.shape
    copy = source.dtype == target.dtype
    stretches = 1 if target_scale is not None and not copy else triton.cdiv(tokens, config.tokens)
    launchable(_move)[(len(source_pages), 2 * heads, stretches)](
        source, source_pages, target, target_pages, source_pages if source_scale is None else source_scale,
        source_pages if target_scale is None else target_scale, count, target.shape[1], tokens, heads,
        LIMITS.get(target.dtype, 0.0), DIM=dim, TOKENS=config.tokens, SCALED=source_scale is not None,
        SCALE=target_scale is not None, COPY=copy, ROUND=target.dtype == torch.int8,
        num_warps=config.warps,
    )  # fmt: skip


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture."""
    return [Config(32, 4), Config(64, 4), Config(64, 8), Config(128, 4), Config(128, 8)]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"copy": {}}
    variants |= {"to int8": {"target": "int8"}, "from int8": {"source": "int8"}}
    if capability >= 89:
        variants |= {"to fp8": {"target": "fp8"}, "from fp8": {"source": "fp8"}}
    return {
        f"{name} bf16 d128": make_inputs(Case(name, sizes(1, 64, 2, 128), options), torch.bfloat16, "cpu", 0)
        for name, options in variants.items()
    }
