"""linear_lowp in Triton: a tile of the result to a program, scales, bias and GELU applied before it is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launchable
from ..spec import Case, architecture, expect_fp8

GROUP = 8  # rows of tiles in one group of programs, which share operands in the cache


@dataclass(frozen=True)
class Config:
    """Rows, columns and inner entries of a tile, warps, and loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# INT8 and FP8 alike, but FP8 on sm_90: its tensor cores keep some 14 bits of a sum, so that every INNER products are
# added up in float32 beside them, which takes registers for two results.
CONFIGS = {
    80: Config(128, 128, 64, 8, 3),
    89: Config(128, 128, 64, 8, 3),
    90: Config(128, 256, 128, 8, 3),
    100: Config(128, 128, 128, 8, 3),
    120: Config(128, 128, 64, 8, 3),
}
PROMOTED = Config(128, 128, 128, 8, 3)
ANYWHERE = Config(16, 32, 32, 4, 1)  # where there is no GPU: the interpreter


@triton.jit
def _linear(
    x_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, rows, columns, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    tile_rows, tile_columns = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * tile_columns)
    group_rows = tl.minimum(tile_rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tile_columns)
    offs_m = (group * GROUP + within % group_rows) * ROWS + tl.arange(0, ROWS)
    offs_n = (within // group_rows) * COLUMNS + tl.arange(0, COLUMNS)
    offs_k = tl.arange(0, INNER)
    x_tile = x_ptr + offs_m.to(tl.int64)[:, None] * inner + offs_k[None]  # [ROWS, INNER]
    weight_tile = weight_ptr + offs_n.to(tl.int64)[None] * inner + offs_k[:, None]  # [INNER, COLUMNS]
    acc = tl.zeros([ROWS, COLUMNS], WHOLE)
    for start in range(0, inner, INNER):
        inside_k = start + offs_k < inner
        x = tl.load(x_tile, mask=(offs_m < rows)[:, None] & inside_k[None], other=0.0)
        weight = tl.load(weight_tile, mask=(offs_n < columns)[None] & inside_k[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, max_num_imprecise_acc=INNER, out_dtype=WHOLE)
        x_tile += INNER
        weight_tile += INNER
    y = acc.to(tl.float32)
    if PER_ROW:
        y *= tl.load(x_scale_ptr + offs_m, mask=offs_m < rows, other=0.0)[:, None]
    else:
        y *= tl.load(x_scale_ptr)
    if PER_COLUMN:
        y *= tl.load(weight_scale_ptr + offs_n, mask=offs_n < columns, other=0.0)[None]
    else:
        y *= tl.load(weight_scale_ptr)
    if BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)[None]
    if GELU:
        y = y - y / (1.0 + tl.exp2(2.302208198 * (y + 0.044715 * y * y * y)))  # tanh in exponentials of base 2
    inside = (offs_m < rows)[:, None] & (offs_n < columns)[None]
    out_tile = out_ptr + offs_m.to(tl.int64)[:, None] * columns + offs_n[None]
    tl.store(out_tile, y.to(out_ptr.dtype.element_ty), mask=inside)


def linear_lowp(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Launch for tensors that were checked; out is passed for a bias that is not given."""
    if x.dtype != torch.int8:
        expect_fp8("linear_lowp", x.device)
    (rows, inner), columns = x.shape, len(weight)
    config = config or (config_for(architecture(x.device), x.dtype) if x.device.type == "cuda" else ANYWHERE)
    launchable(_linear)[(triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns),)](
        x, weight, x_scale, weight_scale, out if bias is None else bias, out, rows, columns, inner,
        ROWS=config.rows, COLUMNS=config.columns, INNER=config.inner, GROUP=GROUP,
        WHOLE=tl.int32 if x.dtype == torch.int8 else tl.float32, PER_ROW=len(x_scale) == rows,
        PER_COLUMN=len(weight_scale) == columns, BIAS=bias is not None, GELU=gelu,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def config_for(capability: int, dtype: torch.dtype) -> Config:
    """The config for operands of a dtype."""
    return PROMOTED if capability == 90 and dtype != torch.int8 else CONFIGS[capability]


def candidates(capability: int) -> list[Config]:
    """Configs worth trying on an architecture; those that do not fit a part fail when they are tried."""
    return [
        Config(rows, columns, inner, warps, stages)
        for rows, columns, warps in ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 4), (64, 256, 8))
        for inner in (64, 128)
        for stages in (2, 3, 4)
    ]


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    from .reference import make_inputs, sizes

    variants: dict[str, dict[str, object]] = {"int8 gelu": {"int8": True, "bias": True, "gelu": True}}
    if capability >= 89:
        variants |= {"fp8": {"bias": True}, "fp8 gelu": {"bias": True, "gelu": True}}
    calls: dict[str, dict[str, object]] = {}
    for name, options in variants.items():
        inputs = make_inputs(Case(name, sizes(128, 512, 256), options), torch.bfloat16, "cpu", 0)
        calls[f"{name} bf16"] = inputs | {"config": config_for(capability, inputs["x"].dtype)}
    return calls
