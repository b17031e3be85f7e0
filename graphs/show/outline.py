"""A pass as its launches by the model's layers; equal neighbouring layers are listed once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from ...kernels.spec import Cost
from ..cost import PassCost, family, name_of, spec_of
from ..edit import fake, shape
from ..effects import written
from ..passes import NULL
from ..program import Call
from ..types import PassGraph

LABELS = {"scaled_dot_product_attention": "sdpa", "_to_copy": "cast"}  # of torch's ops


@dataclass(frozen=True)
class Launch:
    """One call: op, short label, place in the model and variant, result shape, family, cost, and its rewrite."""

    op: str
    label: str
    what: str
    shape: tuple[int, ...]
    family: str
    cost: Cost
    rewrite: str


@dataclass(frozen=True)
class Section:
    """A layer, or neighbouring layers with equal launches."""

    layers: tuple[str, ...]
    launches: tuple[Launch, ...]

    @property
    def name(self) -> str:
        """`blocks.0`, or `blocks.1 to blocks.29, 29 times`."""
        first, last = self.layers[0], self.layers[-1]
        return first if first == last else f"{first} to {last}, {len(self.layers)} times"

    @property
    def cost(self) -> Cost:
        """Of all its layers together."""
        once = sum((launch.cost for launch in self.launches), Cost())
        count = len(self.layers)
        return Cost(once.flops * count, once.nbytes * count, once.launches * count)


def outline(costs: PassCost) -> list[Section]:
    """The launches of a pass in order, by layer."""
    calls_of = Counter(costs.nodes)
    sections: list[Section] = []
    calls = zip(costs.calls, costs.nodes, costs.costs, strict=True)
    for layer, part in groupby(calls, key=lambda one: layer_of(one[1])):
        launches = tuple(launch(call, node, cost, layer, calls_of[node] == 1) for call, node, cost in part)
        if sections and sections[-1].launches == launches:
            sections[-1] = Section((*sections[-1].layers, layer), launches)
        else:
            sections.append(Section((layer,), launches))
    return sections


def layer_of(node: fx.Node) -> str:
    """The module of a node up to its first number, else its first name."""
    module = str(node.meta.get("module", ""))
    numbered = re.match(r"(.*?\.\d+)(?:\.|$)", module)
    return numbered[1] if numbered else module.partition(".")[0] or "pass"


def launch(call: Call, node: fx.Node, cost: Cost, layer: str, alone: bool) -> Launch:
    """A launch as the graph calls it where its node became this call `alone`, else as torch launches it."""
    module = str(node.meta.get("module", "")).removeprefix(layer).strip(".")
    spec = spec_of(call.op)
    if alone and node.op == "call_function":
        made = [part for part in (written(node) or (node,)) if hasattr(fake(part), "shape")]
        op, size = name_of(node.target), shape(made[0])  # type: ignore[arg-type]
    else:
        op, size = name_of(call.op), call.writes[0].size
    details = str(node.kwargs["dtype"]).removeprefix("torch.") if op == "_to_copy" else ""
    if spec is not None and spec.detail is not None:
        details = spec.detail(frozenset(name for name, value in call.named.items() if value is not None))
    label = LABELS.get(op, op.replace("_", " ")) if spec is None else spec.label
    what = " ".join(filter(None, (module, details)))
    return Launch(op, label, what, size, family(call), cost, node.meta.get("rewrite", ""))


def in_units(number: float, unit: str) -> str:
    """`40.4 TFLOP`: three digits and a prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def attends(graph: PassGraph) -> Iterator[str]:
    """One line for each group of a pass: its frames, timestep and how many frames it attends to."""
    for group in graph.groups:
        branch = "" if group.branch is None else f" of branch {group.branch}"
        text = ", under the null caption" if group.text == NULL else ""
        end = "" if group.write else ", leaving no keys"
        yield f"{len(group.frames)} frames{branch} at t={group.timestep:g} see {len(group.context)}{text}{end}"
