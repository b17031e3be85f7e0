"""Real tensors for every value that a block graph reads: random weights, and tables as a session would fill them."""

from __future__ import annotations

import torch
from torch import Tensor

from inferix.graphs.types import BlockGraph, Role, Value
from inferix.kernels.qk_norm_rope_append import rope_cos_sin
from inferix.kernels.rope import axis_angles


def random_values(block: BlockGraph, weights: dict[str, Tensor], grid: tuple[int, int], dim: int) -> dict[str, Tensor]:
    """Every weight, input and state by name; each row of a table lists pages of its own, the written ones last."""
    generator = torch.Generator().manual_seed(7)
    actual = dict(weights)
    inputs = [name for name in block.values(Role.INPUT) if name.endswith("page_table")]
    for graph in block.graphs:
        for value in graph.inputs.values():
            if value.name not in actual and value.data is None and value.role in (Role.INPUT, Role.STATE):
                actual[value.name] = fill(value, block, grid, dim, generator)
    for name in inputs:
        pages, table = actual[name.replace("page_table", "pages")], actual[name]
        count = actual[name.replace("page_table", "page_count")]
        for row, own in enumerate(pages.tolist()):
            rest = [page for page in torch.randperm(block.shape.pages, generator=generator).tolist() if page not in own]
            seen = (rest[: max(0, block.shape.max_pages - len(own) - row)] + own)[-block.shape.max_pages :]
            table[row, : len(seen)] = torch.tensor(seen, dtype=torch.int32)
            count[row] = len(seen)
    return actual


def fill(value: Value, block: BlockGraph, grid: tuple[int, int], dim: int, generator: torch.Generator) -> Tensor:
    what = value.name.rpartition(".")[2]
    if what in ("rope_time", "rope_sink"):
        positions = torch.randint(0, 9, value.shape[:2], generator=generator)
        rows = [axis_angles(row, *grid, dim)[0] for row in positions.tolist()]
        return rope_cos_sin(torch.stack(rows), value.dtype)
    if what in ("rope_rows", "rope_columns"):
        return rope_cos_sin(axis_angles([0], *grid, dim)[1 if what == "rope_rows" else 2], value.dtype)
    if what == "pages":
        order = torch.randperm(block.shape.pages, generator=generator)[: value.numel]
        return order.to(value.dtype).reshape(value.shape)
    if what == "sink_count":
        return torch.ones(value.shape, dtype=value.dtype)
    if what == "frames":
        return torch.arange(value.numel, dtype=value.dtype).reshape(value.shape) + 5
    if what == "noise_key":
        return torch.arange(value.numel, dtype=value.dtype) + 11
    if not value.dtype.is_floating_point:
        return torch.zeros(value.shape, dtype=value.dtype)
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
