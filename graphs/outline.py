"""A graph as a reader wants it: its launches by the model's layers, equal neighbouring layers told once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from .cost import Cost, Costs, family, name_of
from .edit import fake, shape
from .effects import written
from .types import PassGraph


@dataclass(frozen=True)
class Launch:
    """One call: its op, what it is in the model, the shape it makes, its family, cost, and the rewrite that made it."""

    op: str
    what: str
    shape: tuple[int, ...]
    family: str
    cost: Cost
    rewrite: str


@dataclass(frozen=True)
class Section:
    """A layer, or neighbouring layers that launch the same."""

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


def outline(graph: PassGraph) -> list[Section]:
    """The launches of a graph in order, by layer."""
    costs = Costs(graph)
    nodes = [node for node in graph if costs[node].launches]
    sections: list[Section] = []
    for layer, part in groupby(nodes, key=layer_of):
        launches = tuple(launch(node, layer, costs[node]) for node in part)
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


def launch(node: fx.Node, layer: str, cost: Cost) -> Launch:
    module = str(node.meta.get("module", "")).removeprefix(layer).strip(".")
    made = [part for part in (written(node) or (node,)) if hasattr(fake(part), "shape")]
    what = " ".join(filter(None, (module, details(node))))
    return Launch(name_of(node), what, shape(made[0]), family(node), cost, node.meta.get("rewrite", ""))


def details(node: fx.Node) -> str:
    """What an op that can do several things does here."""
    if name_of(node) == "adaln":
        _, update, gate, shift = node.args[:4]
        residual = "" if update is None else "gated residual, " if gate is not None else "residual, "
        return residual + ("norm" if shift is None else "modulated norm")
    if name_of(node) == "_to_copy":
        return str(node.kwargs["dtype"]).removeprefix("torch.")
    return ""


def in_units(number: float, unit: str) -> str:
    """`40.4 TFLOP`: three digits and a prefix."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def sees(graph: PassGraph) -> Iterator[str]:
    """What each group of a pass is told and sees, in words."""
    for group in graph.groups:
        end = "" if group.write else ", leaving no keys"
        yield f"{len(group.frames)} frames at t={group.timestep:g} see {len(group.context)}{end}"
