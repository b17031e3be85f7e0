"""What each call of a graph must compute and move: matmuls by their shapes, `inferix::` ops by their meaning.

A multiply and an add are 2 operations. Bytes are those of every tensor read and written once, as if nothing stayed in
a cache. Attention counts the pages that the pass's groups see; a table alone does not tell how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import fx

from ..kernels.catalog import SPECS
from ..kernels.spec import Case
from .edit import fake, shape
from .effects import is_scratch, is_view, read, written
from .types import PassGraph

ops = torch.ops.inferix
FAMILIES = ("matmul", "attention", "norm", "solver", "elementwise", "copy")
MATMULS = ("linear", "conv3d", "mm", "addmm", "bmm", "matmul", "linear_gelu", "linear_lowp")
ATTENTION = ("scaled_dot_product_attention", "block_attention")
NORMS = ("adaln", "layer_norm", "rms_norm", "qk_norm_rope_append", "rope_append")
SOLVERS = ("denoise_step", "frame_noise")
COPIES = ("clone", "cat", "stack", "_to_copy")


@dataclass(frozen=True)
class Cost:
    """Operations, bytes, and launches."""

    flops: int = 0
    nbytes: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes, self.launches + other.launches)


def name_of(node: fx.Node) -> str:
    """The op's name without its namespace."""
    return str(node.target._schema.name).split("::")[1]  # type: ignore[union-attr]


def family(node: fx.Node) -> str:
    """What kind of work a call is."""
    name = name_of(node)
    groups = dict(zip(FAMILIES, (MATMULS, ATTENTION, NORMS, SOLVERS, (), COPIES), strict=True))
    return next((kind for kind, names in groups.items() if name in names), "elementwise")


class Costs:
    """Costs of a graph's calls, and their sum."""

    def __init__(self, graph: PassGraph) -> None:
        self.graph = graph
        attention = graph.graph.find_nodes(op="call_function", target=ops.block_attention.default)
        tables = list(dict.fromkeys(node.args[2] for node in attention))
        sizes = [list(part) for _, part in groupby(graph.groups, lambda group: len(group.frames))]
        self.seen = {  # frames that the rows of a table see, together
            table: sum(len(group.context) for group in part) * shape(table)[0] // len(part)
            for table, part in zip(tables, sizes, strict=False)
        }
        self.nodes = {node: self._cost(node) for node in graph}
        self.total = sum(self.nodes.values(), Cost())

    def __getitem__(self, node: fx.Node) -> Cost:
        return self.nodes[node]

    def by_family(self) -> dict[str, Cost]:
        """The sum over each family that there is."""
        found = {kind: Cost() for kind in FAMILIES}
        for node, cost in self.nodes.items():
            if cost.launches:
                found[family(node)] += cost
        return {kind: cost for kind, cost in found.items() if cost.launches}

    def _cost(self, node: fx.Node) -> Cost:
        if is_view(node) or is_scratch(node):
            return Cost()
        count = COUNTED.get(name_of(node))
        return Cost(count(self, node) if count else results(node), self._bytes(node), 1)

    def _bytes(self, node: fx.Node) -> int:
        """Of everything read and written; of pages only those that are seen, or that are the pass's own."""
        total = 0 if written(node) else size_of(node)
        for given in dict.fromkeys((*read(node), *written(node))):
            if given.op == "placeholder" and self.graph.inputs[given.name].role == "state":
                total += self._pages(node, given)
            else:
                total += size_of(given)
        return total

    def _pages(self, node: fx.Node, kv: fx.Node) -> int:
        page, name = size_of(kv) // shape(kv)[1], name_of(node)
        listed = node.args[{"block_attention": 2, "kv_pages": 1}.get(name, 8)]  # as many pages go in as come out
        assert isinstance(listed, fx.Node)
        return page * (self.listed(listed) if name == "block_attention" else prod(shape(listed)))

    def listed(self, table: fx.Node) -> int:
        """Pages that all rows of a table list; as many as it has room for, where the pass has no groups."""
        return self.seen.get(table, prod(shape(table)))


def results(node: fx.Node) -> int:
    """Entries of what a call makes: one operation each."""
    made = written(node) or (node,)
    return sum(prod(shape(part)) for part in made if isinstance(fake(part), torch.Tensor))


def size_of(node: fx.Node) -> int:
    return prod(shape(node)) * fake(node).dtype.itemsize


def linear(costs: Costs, node: fx.Node) -> int:
    x, weight = node.args[:2]
    return 2 * prod(shape(x)) * shape(weight)[0]  # type: ignore[arg-type]


def matmul(costs: Costs, node: fx.Node) -> int:
    inner = shape(node.args[-2 if name_of(node) != "addmm" else 1])[-1]  # type: ignore[arg-type]
    return 2 * inner * prod(shape(node))


def convolution(costs: Costs, node: fx.Node) -> int:
    return 2 * prod(shape(node)) * prod(shape(node.args[1])[1:])  # type: ignore[arg-type]


def dense_attention(costs: Costs, node: fx.Node) -> int:
    q, k = node.args[:2]
    return 4 * prod(shape(q)) * shape(k)[-2]  # type: ignore[arg-type]


def paged_attention(costs: Costs, node: fx.Node) -> int:
    q, kv, table = node.args[:3]
    _, tokens, heads, dim = shape(q)  # type: ignore[arg-type]
    return 4 * tokens * heads * dim * costs.listed(table) * shape(kv)[2]  # type: ignore[arg-type]


def adaln(costs: Costs, node: fx.Node) -> int:
    rows, tokens, dim = shape(node.args[0])  # type: ignore[arg-type]
    return SPECS["adaln"].flops(Case("", {"rows": rows, "frames": 1, "per_frame": tokens, "dim": dim}))


def append(costs: Costs, node: fx.Node) -> int:
    q, kv = node.args[6:8]
    rows, tokens, heads, dim = shape(q)  # type: ignore[arg-type]
    sizes = {"rows": rows, "frames": 1, "height": tokens, "width": 1, "heads": heads, "dim": dim}
    return SPECS["qk_norm_rope_append"].flops(Case("", sizes | {"kv_heads": shape(kv)[3]}))  # type: ignore[arg-type]


def norm(costs: Costs, node: fx.Node) -> int:
    x = shape(node.args[0])  # type: ignore[arg-type]
    return SPECS["rms_norm"].flops(Case("", {"rows": prod(x[:-1]), "dim": x[-1]}))


def solver(costs: Costs, node: fx.Node) -> int:
    sizes = dict(zip(("rows", "frames", "channels", "height", "width"), shape(node.args[1]), strict=True))  # type: ignore[arg-type]
    kept = 0 if node.args[5] is None else shape(node.args[5])[0]  # type: ignore[arg-type]
    return SPECS["denoise_step"].flops(Case("", sizes, {"history": kept}))


COUNTED: dict[str, Callable[[Costs, fx.Node], int]] = {
    "linear": linear, "linear_gelu": linear, "linear_lowp": linear, "conv3d": convolution, "mm": matmul,
    "bmm": matmul, "matmul": matmul, "addmm": matmul, "scaled_dot_product_attention": dense_attention,
    "block_attention": paged_attention, "adaln": adaln, "qk_norm_rope_append": append, "rope_append": append,
    "denoise_step": solver, "rms_norm": norm,
}  # fmt: skip


def block_cost(graphs: Iterable[PassGraph]) -> Cost:
    """The sum over several graphs."""
    return sum((Costs(graph).total for graph in graphs), Cost())
