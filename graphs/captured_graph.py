"""Captured CUDA graphs as data, and their comparison with the program that they were captured from.

`CudaDriver` reads a graph through `cuda.bindings`, which torch's builds for CUDA 13 bring along. The comparison is of
plain values: each call of a program must have left the kernels that it launched, in order, on its own memory, and no
copy but its own.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib import import_module
from itertools import count, pairwise
from math import prod
from typing import Any, Protocol

from torch import Tag

from ..errors import InferixError
from .cost import family
from .program import Call, Form, Program

KERNEL, COPY, MEMSET, EMPTY = "kernel", "memcpy", "memset", "empty"
KIND = "CU_GRAPH_NODE_TYPE_"  # before the driver's name of a kind of node
MEMORY = "CU_MEMORYTYPE_"
WORD = 8  # bytes of an address
Range = tuple[int, int]  # addresses [begin, end)


@dataclass(frozen=True)
class Node:
    """A node of a CUDA graph.

    kind: the driver's name of it, such as `kernel`, `memcpy`, `memset`, `host` or `mem_alloc`. name: of a kernel's
    function. shape: grid and block of a kernel. nbytes: of a copy or a memset. places: kinds of memory that a copy
    reads and writes. words: a kernel's parameters of 64 bits, or addresses of a copy or a memset.
    """

    kind: str
    name: str = ""
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    places: tuple[str, ...] = ()
    words: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == KERNEL:
            return f"kernel {self.name}"
        return f"{self.kind} of {self.nbytes} bytes" if self.nbytes else self.kind


@dataclass(frozen=True)
class CapturedGraph:
    """Nodes in the order in which they were added, and edges (from, to) between their indices."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]

    def chain(self) -> list[int] | None:
        """Indices of the nodes in the one order in which they can run; None if some may run at the same time."""
        sorter = TopologicalSorter({index: [] for index in range(len(self.nodes))})
        for one, other in self.edges:
            sorter.add(other, one)
        sorter.prepare()
        order: list[int] = []
        while ready := sorter.get_ready():
            if len(ready) > 1:
                return None
            order += ready
            sorter.done(*ready)
        return order


class GraphDriver(Protocol):
    """Access to CUDA graphs. Handles of streams, graphs and nodes are integers."""

    def capturing(self, stream: int) -> int | None:
        """The graph that a stream is captured into; None if it is not captured."""

    def count(self, graph: int) -> int:
        """Number of nodes of a graph, also while it is captured."""

    def nodes(self, graph: int) -> list[int]: ...

    def edges(self, graph: int) -> list[tuple[int, int]]:
        """Pairs of nodes: the second runs after the first."""

    def describe(self, node: int) -> Node: ...


class CudaDriver:
    """The CUDA driver through `cuda.bindings`. InferixError where that is not installed, and for a call that fails."""

    def __init__(self) -> None:
        try:
            self.api = import_module("cuda.bindings.driver")
        except ImportError as error:
            raise InferixError(
                "cuda-bindings is not installed, so no CUDA graph can be read; pip install 'inferix-runtime[gpu]'"
            ) from error

    def call(self, name: str, *args: Any) -> tuple[Any, ...]:
        """Results of a call of the driver, without its status."""
        status, *results = getattr(self.api, name)(*args)
        if status != self.api.CUresult.CUDA_SUCCESS:
            raise InferixError(f"{name} failed: {status.name}")
        return tuple(results)

    def capturing(self, stream: int) -> int | None:
        status, _, graph, *_ = self.call("cuStreamGetCaptureInfo", self.api.CUstream(stream))
        return int(graph) if status == self.api.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE else None

    def count(self, graph: int) -> int:
        return int(self.call("cuGraphGetNodes", self.api.CUgraph(graph), 0)[-1])

    def nodes(self, graph: int) -> list[int]:
        handles, _ = self.call("cuGraphGetNodes", self.api.CUgraph(graph), self.count(graph))
        return [int(handle) for handle in handles]

    def edges(self, graph: int) -> list[tuple[int, int]]:
        number = int(self.call("cuGraphGetEdges", self.api.CUgraph(graph), 0)[-1])
        if not number:
            return []
        first, second, *_ = self.call("cuGraphGetEdges", self.api.CUgraph(graph), number)
        return [(int(one), int(other)) for one, other in zip(first, second, strict=True)]

    def describe(self, node: int) -> Node:
        handle = self.api.CUgraphNode(node)
        kind = self.call("cuGraphNodeGetType", handle)[0].name.removeprefix(KIND).lower()
        if kind == KERNEL:
            return self.kernel(self.call("cuGraphKernelNodeGetParams", handle)[0])
        if kind == COPY:
            return self.copy(self.call("cuGraphMemcpyNodeGetParams", handle)[0])
        if kind == MEMSET:
            params = self.call("cuGraphMemsetNodeGetParams", handle)[0]
            nbytes = params.elementSize * params.width * max(params.height, 1)
            return Node(MEMSET, nbytes=nbytes, words=(int(params.dst),))
        return Node(kind)

    def kernel(self, params: Any) -> Node:
        # Code that is loaded without a context has a kernel in place of a function.
        function, prefix = (params.func, "cuFunc") if int(params.func) else (params.kern, "cuKernel")
        name = self.call(f"{prefix}GetName", function)[0].decode()
        grid = (params.gridDimX, params.gridDimY, params.gridDimZ)
        block = (params.blockDimX, params.blockDimY, params.blockDimZ)
        return Node(KERNEL, name, (*grid, *block), words=tuple(self.words(function, prefix, params.kernelParams)))

    def words(self, function: Any, prefix: str, params: int) -> Iterator[int]:
        """A kernel's parameters of 64 bits; none of one whose parameters are in a single buffer.

        Structures are left out, since the padding in them is whatever the host's memory held. params: address of an
        array with the address of each parameter. A status other than success ends the list.
        """
        for index in count() if params else ():
            status, _, size = getattr(self.api, f"{prefix}GetParamInfo")(function, index)
            if status != self.api.CUresult.CUDA_SUCCESS:
                return
            if size == WORD:
                yield ctypes.c_uint64.from_address(ctypes.c_uint64.from_address(params + WORD * index).value).value

    def copy(self, params: Any) -> Node:
        nbytes = params.WidthInBytes * max(params.Height, 1) * max(params.Depth, 1)
        places = [params.srcMemoryType.name, params.dstMemoryType.name]
        hosts, devices = (params.srcHost, params.dstHost), (params.srcDevice, params.dstDevice)
        kinds = tuple(place.removeprefix(MEMORY).lower() for place in places)
        words = [
            int(host if kind == "host" else device)
            for kind, host, device in zip(kinds, hosts, devices, strict=True)
        ]
        return Node(COPY, nbytes=nbytes, places=kinds, words=tuple(words))


def read_graph(driver: GraphDriver, graph: int) -> CapturedGraph:
    """Read all nodes and edges of a graph."""
    handles = driver.nodes(graph)
    index = {handle: number for number, handle in enumerate(handles)}
    edges = tuple((index[one], index[other]) for one, other in driver.edges(graph))
    return CapturedGraph(tuple(map(driver.describe, handles)), edges)


@dataclass(frozen=True)
class Expected:
    """Facts of a program's calls while they were captured.

    before: nodes in the graph before each call, and after the last. launched: names of the Triton kernels that each
    call launched. touched: addresses that each call may read or write. owned: addresses of all buffers.
    """

    program: Program
    before: Sequence[int]
    launched: Sequence[Sequence[str]]
    touched: Sequence[Sequence[Range]]
    owned: Sequence[Range]


def compare(graph: CapturedGraph, expected: Expected) -> list[str]:
    """Compare a captured graph with its program: a line for each fault, none if they agree."""
    order = graph.chain()
    faults = [] if order is not None else ["nodes of the graph may run at the same time or in several orders"]
    nodes = [graph.nodes[index] for index in (order if order is not None else range(len(graph.nodes)))]
    outside = [*nodes[: expected.before[0]], *nodes[expected.before[-1] :]]
    faults += [f"{node} belongs to no call" for node in outside if node.kind != EMPTY]
    for index, (call, (first, stop)) in enumerate(zip(expected.program.calls, pairwise(expected.before), strict=True)):
        own = [node for node in nodes[first:stop] if node.kind != EMPTY]
        wrong = [*wrong_nodes(call, own, expected.launched[index]), *wrong_memory(own, expected, index)]
        faults += [f"{call.op.name()} ({call.node}): {fault}" for fault in wrong]
    return faults


def wrong_nodes(call: Call, nodes: Sequence[Node], launched: Sequence[str]) -> Iterator[str]:
    """Faults of a call's nodes: kernels other than those launched, copies of no use, kinds that no call makes."""
    kernels = [node.name for node in nodes if node.kind == KERNEL]
    copies = [node for node in nodes if node.kind == COPY]
    if launched:
        if kernels != list(launched):
            yield f"has the kernels {', '.join(kernels) or 'none'}; it launched {', '.join(launched)}"
        yield from (f"has a {node}, which it did not launch" for node in nodes if node.kind in (COPY, MEMSET))
    else:
        if not nodes and any(prod(ref.size) for ref in call.writes):
            yield "has no node"
        for node in copies[copies_of(call) :]:
            yield f"has an extra {node}"
    for node in copies:
        if "host" in node.places:
            yield f"has a {node} between host and card"
    for node in nodes:
        if node.kind not in (KERNEL, COPY, MEMSET):
            yield f"has a node of kind {node.kind}"


def copies_of(call: Call) -> int:
    """Most copies that a call may make: one for each tensor that it copies, and for each result that it copies out."""
    results = len(call.outs) if call.form is Form.COPIED or Tag.generated in call.op.tags else 0
    return results + (max(1, len(call.reads)) if family(call) == "copy" else 0)


def wrong_memory(nodes: Sequence[Node], expected: Expected, index: int) -> Iterator[str]:
    """Faults of a call's nodes that refer to a buffer of the program which the call does not touch."""
    for node in nodes:
        for word in node.words:
            if within(word, expected.owned) and not within(word, expected.touched[index]):
                yield f"{node} refers to memory at {word:#x}, which the call does not touch"


def within(word: int, ranges: Sequence[Range]) -> bool:
    return any(begin <= word < end for begin, end in ranges)


def summary(graph: CapturedGraph) -> dict[str, Any]:
    """Numbers of nodes by kind, bytes of copies, and numbers of launches by kernel, the most first."""
    kinds = Counter(node.kind for node in graph.nodes)
    kernels = Counter(node.name for node in graph.nodes if node.kind == KERNEL)
    copied = sum(node.nbytes for node in graph.nodes if node.kind == COPY)
    return {
        "nodes": len(graph.nodes), "edges": len(graph.edges), "kinds": dict(kinds.most_common()),
        "copied": copied, "kernels": dict(kernels.most_common()),
    }  # fmt: skip
