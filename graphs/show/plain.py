"""A block graph as plain values, with costs: for `inferix graph --json`, and to compare two graphs exactly.

It is not read back: graphs are stored lowered, by `codec`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from ..cost import PassCost
from ..edit import DESCRIPTION, fake, shape
from ..types import BlockGraph, PassGraph, Value

FORM = 3  # of what is written


def to_dict(block: BlockGraph) -> dict[str, Any]:
    """Plain values: dicts, lists, strings and numbers."""
    return {
        "form": FORM,
        "model": block.model,
        "preset": block.preset,
        "dtype": name(block.dtype),
        "device": block.device,
        "shape": asdict(block.shape),
        "timesteps": list(block.timesteps),
        "sigmas": list(block.sigmas),
        "results": list(block.results),
        "changes": [asdict(change) for change in block.changes],
        "fold": None if block.fold is None else pass_to_dict(block.fold),
        "prompt": None if block.prompt is None else pass_to_dict(block.prompt),
        "frames": None if block.frames is None else pass_to_dict(block.frames),
        "passes": [pass_to_dict(graph) for graph in block.passes],
    }


def pass_to_dict(graph: PassGraph) -> dict[str, Any]:
    costs = PassCost(graph)
    return {
        "name": graph.name,
        "runs": str(graph.runs),
        "groups": [asdict(group) for group in graph.groups],
        "writes": list(graph.writes),
        "inputs": {key: value_to_dict(value) for key, value in graph.inputs.items()},
        "outputs": [value_to_dict(value) for value in graph.outputs],
        "results": [result.name for result in graph.graph.output_node().args[0]],  # type: ignore[union-attr]
        "flops": costs.total.flops,
        "bytes": costs.total.nbytes,
        "launches": costs.total.launches,
        "nodes": [node_to_dict(node, costs) for node in graph],
    }


def value_to_dict(value: Value) -> dict[str, Any]:
    return {
        "name": value.name, "role": str(value.role), "shape": list(value.shape), "dtype": name(value.dtype),
        "when": str(value.when), "data": None if value.data is None else list(value.data), "owned": value.owned,
    }  # fmt: skip


def node_to_dict(node: fx.Node, costs: PassCost) -> dict[str, Any]:
    made = fake(node)
    fields: dict[str, Any] = {
        "name": node.name,
        "op": str(node.target),
        "args": [plain(arg) for arg in node.args],
        "kwargs": {key: plain(value) for key, value in node.kwargs.items()},
        "shape": list(shape(node)) if isinstance(made, torch.Tensor) else None,
        "dtype": name(made.dtype) if isinstance(made, torch.Tensor) else None,
        **{key: node.meta[key] for key in DESCRIPTION if key in node.meta},
    }
    cost = costs[node]
    return fields | ({"flops": cost.flops, "bytes": cost.nbytes} if cost.launches else {})


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(value: Any) -> Any:
    """An argument as plain values; nodes, dtypes, devices and formats are tagged."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    for kind, key in ((torch.dtype, "dtype"), (torch.device, "device"), (torch.memory_format, "format")):
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    assert value is None or isinstance(value, bool | int | float | str), value
    return value
