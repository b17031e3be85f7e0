"""Operations and bytes of each call of a lowered program: a pass is lowered first, then its calls are counted.

A multiply and an add are 2 operations; an elementwise call or a norm of torch counts one for each entry of its largest
tensor, a copy none. Bytes are those of every tensor read and written once, as if nothing stayed in a cache; of a store
of pages only the pages that are read or written. Costs of `inferix::` ops come from their specs. An op that is known
neither there nor here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import fx
from torch._ops import OpOverload

from ..errors import InferixError
from ..kernels.catalog import op_spec
from ..kernels.spec import FAMILIES, Cost, OpSpec
from .lowering import lower
from .passes import Group
from .program import Call, Ref
from .types import LITERAL, PassGraph

PACKED = "packed matmul"  # of FP8 or INT8 numbers
ATEN: dict[str, tuple[str, ...]] = {  # ops of torch by kind of work; pointwise ones are known by their tag
    "matmul": ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "convolution"),
    PACKED: ("_int_mm", "_scaled_mm"),
    "attention": (
        "scaled_dot_product_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_cudnn_attention",
    ),
    "norm and gate": ("native_layer_norm", "native_group_norm", "_fused_rms_norm"),
    "elementwise": (
        "gelu", "rsub", "mean", "sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "var", "var_mean",
        "std", "linalg_vector_norm", "_softmax", "_log_softmax", "softmax", "logsumexp", "cumsum", "any", "all", "sort",
        "topk",
    ),
    "copy": (
        "copy_", "_to_copy", "clone", "cat", "stack", "arange", "zeros", "zeros_like", "ones", "ones_like",
        "full", "full_like", "fill", "fill_", "zero_", "new_zeros", "new_full", "flip", "roll", "repeat", "index",
        "index_select", "index_put", "index_copy", "gather", "scatter", "embedding", "constant_pad_nd", "eye", "tril",
        "triu",
        "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
        "linspace", "scalar_tensor", "pixel_shuffle", "pixel_unshuffle",
    ),
}  # fmt: skip
ATEN_FAMILIES = {name: family for family, names in ATEN.items() for name in names}


def name_of(op: OpOverload) -> str:
    """The op's name without its namespace."""
    return op._schema.name.partition("::")[2]


def spec_of(op: OpOverload) -> OpSpec | None:
    """The spec of an `inferix::` op; None for any other op, or for one outside the catalog."""
    return op_spec(name_of(op)) if op.namespace == "inferix" else None


def known_family(op: OpOverload) -> str | None:
    """The kind of work of an op, one of FAMILIES; None for an op that is not known."""
    if (spec := spec_of(op)) is not None:
        return spec.family
    if op.namespace != "aten":
        return None
    return ATEN_FAMILIES.get(name_of(op)) or ("elementwise" if torch.Tag.pointwise in op.tags else None)


def family(call: Call) -> str:
    """The kind of work of a call; InferixError for an op that is not known."""
    if (known := known_family(call.op)) is not None:
        return known
    raise InferixError(
        f"no cost is known for op {call.op.name()} ({call.node}); add its KernelSpec to kernels/catalog.py, or an op "
        "of torch to graphs/cost.py"
    )


def call_cost(call: Call, listed: int | None = None) -> Cost:
    """Cost of one call. listed: pages that all rows of an attention read together, by default its whole table."""
    kind = family(call)
    if (spec := spec_of(call.op)) is not None:
        return spec.cost(call.named, listed, memory=lambda ref: ref.buffer)  # type: ignore[attr-defined]
    sizes: dict[str, int] = {}
    for ref in (*call.reads, *call.writes):
        sizes[ref.buffer] = max(sizes.get(ref.buffer, 0), math.prod(ref.size) * ref.dtype.itemsize)
    return Cost(_flops(call, kind), sum(sizes.values()), 1)


def counts_of(call: Call) -> Ref | None:
    """The tensor, int32 [rows], that says how many pages each row of a call reads; None for calls that read none."""
    spec = spec_of(call.op)
    counts = call.named.get(spec.counted_by) if spec is not None else None
    return counts if isinstance(counts, Ref) else None


def _flops(call: Call, kind: str) -> int:
    """Operations of an op of torch."""
    given, name = call.named, name_of(call.op)
    if kind == "attention":
        return 4 * math.prod(given["query"].size) * given["key"].size[-2]
    if kind in ("matmul", PACKED):
        (out, *_) = call.writes
        if name == "convolution":
            return 2 * math.prod(out.size) * math.prod(given["weight"].size[1:])
        right = given["mat2"] if "mat2" in given else given["batch2"]  # [..., K, N]
        return 2 * math.prod(out.size) * int(right.size[-2])
    return 0 if kind == "copy" else max(math.prod(ref.size) for ref in (*call.reads, *call.writes))


class PassCost:
    """A pass lowered, with the cost of each call of its program.

    Attention counts the pages that the pass's groups attend to once the window is full; a table alone does not tell.
    """

    def __init__(self, graph: PassGraph) -> None:
        self.graph = graph
        self.program = lower([graph], [value.name for value in graph.outputs])
        self.calls = self.program.calls
        pages = pages_read(self.calls, graph.groups)
        self.costs = tuple(call_cost(call, pages.get(counts_of(call))) for call in self.calls)
        self.total = sum(self.costs, Cost())
        names = {node.name: node for node in graph.graph.nodes}
        self.nodes: tuple[fx.Node, ...] = tuple(names[call.node.rpartition("/")[2]] for call in self.calls)
        self._by_node: dict[fx.Node, Cost] = {}
        for node, cost in zip(self.nodes, self.costs, strict=True):
            self._by_node[node] = self._by_node.get(node, Cost()) + cost

    def __getitem__(self, node: fx.Node) -> Cost:
        """Cost of all calls that a node of the graph became; none for a view."""
        return self._by_node.get(node, Cost())

    def by_family(self) -> dict[str, Cost]:
        """The sum over each kind of work that occurs."""
        sums = dict.fromkeys(FAMILIES, Cost())
        for call, cost in zip(self.calls, self.costs, strict=True):
            sums[family(call)] += cost
        return {kind: cost for kind, cost in sums.items() if cost.launches}


def pages_read(calls: Iterable[Call], groups: Iterable[Group]) -> dict[Ref | None, int]:
    """Pages that all rows of a launch of a pass read together, by the tensor that has their counts.

    Groups with equally many frames are rows of one launch; sessions side by side repeat them. Counts that are literals
    are of prompts, which have a page each.
    """
    found = dict.fromkeys(ref for call in calls if (ref := counts_of(call)) is not None)
    counts = [ref for ref in found if not ref.buffer.startswith(LITERAL)]
    parts = [list(part) for _, part in groupby(groups, lambda group: len(group.frames))]
    return {
        ref: sum(len(group.context) for group in part) * ref.size[0] // len(part)
        for ref, part in zip(counts, parts, strict=False)
    }
