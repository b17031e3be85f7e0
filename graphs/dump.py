"""A block graph as plain values and back: for `--json`, for files, and to compare two graphs exactly.

What is written is the graph itself; fake results are computed anew when it is read, and costs are only told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from ..errors import UsageError
from .cost import Costs
from .edit import DESCRIPTION, evaluated, fake, fake_mode, shape
from .passes import Group
from .rewrites import base  # noqa: F401  (registers the ops that a file may name)
from .types import BlockGraph, Change, PassGraph, QueryShape, Role, Runs, Value, When

FORM = 1  # of what is written; read back only as the same


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
        "passes": [pass_to_dict(graph) for graph in block.passes],
    }


def pass_to_dict(graph: PassGraph) -> dict[str, Any]:
    costs = Costs(graph)
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


def node_to_dict(node: fx.Node, costs: Costs) -> dict[str, Any]:
    made = fake(node)
    found: dict[str, Any] = {
        "name": node.name,
        "op": str(node.target),
        "args": [plain(arg) for arg in node.args],
        "kwargs": {key: plain(value) for key, value in node.kwargs.items()},
        "shape": list(shape(node)) if isinstance(made, torch.Tensor) else None,
        "dtype": name(made.dtype) if isinstance(made, torch.Tensor) else None,
        **{key: node.meta[key] for key in DESCRIPTION if key in node.meta},
    }
    cost = costs[node]
    return found | ({"flops": cost.flops, "bytes": cost.nbytes} if cost.launches else {})


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(value: Any) -> Any:
    """An argument as plain values; what is no number or word says what it is."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    for kind, key in ((torch.dtype, "dtype"), (torch.device, "device"), (torch.memory_format, "format")):
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    assert value is None or isinstance(value, bool | int | float | str), value
    return value


def from_dict(written: Mapping[str, Any]) -> BlockGraph:
    """The block that `to_dict` wrote; UsageError for another form."""
    if written.get("form") != FORM:
        raise UsageError(f"the graph is in form {written.get('form')!r}; this version reads {FORM}: make it anew")
    device = torch.device(written["device"])
    graphs = {key: None if written[key] is None else pass_from_dict(written[key], device) for key in ("fold", "prompt")}
    return BlockGraph(
        model=written["model"],
        preset=written["preset"],
        dtype=getattr(torch, written["dtype"]),
        device=written["device"],
        shape=QueryShape(**written["shape"] | {"latent": tuple(written["shape"]["latent"])}),
        timesteps=tuple(written["timesteps"]),
        sigmas=tuple(written["sigmas"]),
        passes=tuple(pass_from_dict(graph, device) for graph in written["passes"]),
        fold=graphs["fold"],
        prompt=graphs["prompt"],
        results=tuple(written["results"]),
        changes=tuple(Change(**change) for change in written["changes"]),
    )


def pass_from_dict(written: Mapping[str, Any], device: torch.device) -> PassGraph:
    graph = fx.Graph()
    inputs = {key: value_from_dict(value) for key, value in written["inputs"].items()}
    found: dict[str, fx.Node] = {}
    for key, value in inputs.items():
        found[key] = graph.create_node("placeholder", key, name=key)
        with fake_mode():
            found[key].meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=device)
    for node in written["nodes"]:
        args = [read_back(arg, found) for arg in node["args"]]
        kwargs = {key: read_back(value, found) for key, value in node["kwargs"].items()}
        made = graph.create_node("call_function", op_named(node["op"]), tuple(args), kwargs, name=node["name"])
        made.meta = {key: node[key] for key in DESCRIPTION if key in node} | {"val": evaluated(made)}
        found[node["name"]] = made
    graph.output(tuple(found[result] for result in written["results"]))
    groups: list[dict[str, Any]] = [
        {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()} for group in written["groups"]
    ]
    return PassGraph(
        name=written["name"],
        graph=graph,
        inputs=inputs,
        outputs=tuple(value_from_dict(value) for value in written["outputs"]),
        groups=tuple(Group(**group) for group in groups),
        writes=tuple(written["writes"]),
        runs=Runs(written["runs"]),
    )


def value_from_dict(written: Mapping[str, Any]) -> Value:
    data = written["data"]
    return Value(
        written["name"], Role(written["role"]), tuple(written["shape"]), getattr(torch, written["dtype"]),
        When(written["when"]), None if data is None else tuple(data), written["owned"],
    )  # fmt: skip


def op_named(name: str) -> Any:
    """The op `namespace.name.overload`; UsageError if this version does not have it."""
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if found is None:
        raise UsageError(f"the graph calls {name}, which this version does not have; make it anew")
    return found


def read_back(value: Any, found: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [read_back(part, found) for part in value]
    if isinstance(value, dict):
        ((kind, text),) = value.items()
        return found[text] if kind == "node" else torch.device(text) if kind == "device" else getattr(torch, text)
    return value
