"""Captured graphs are compared with their programs: a fake driver records what a capture would hold, and faults show.

The fake is no driver: it writes down a node for each launch of a program on fake CUDA tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from inferix.bench.captured_check import LaunchWatch, captured, check_executor, faults_of, report
from inferix.bench.compile_gate import intercepted
from inferix.bench.dry_run import DryRun, FakeCard, Recorder, WithoutDriver, card
from inferix.cli.main import app
from inferix.errors import InferixError
from inferix.graphs.captured_graph import CudaDriver, Expected, Node, compare, read_graph, summary
from inferix.graphs.launch import LaunchPlan
from inferix.graphs.lowered import Planned, lower_block
from inferix.graphs.lowering import storage
from inferix.graphs.rewrites import chosen, rewritten
from inferix.graphs.types import Role
from inferix.models.registry import MODELS, make_preset
from inferix.runtime.programs.block_graph import BlockGraphBuilder

GRAPH, FIRST = 7, 1000  # handles of the fake: of its graph, and of the first node
Change = Callable[[list[Node], list[tuple[int, int]]], None]


class RecordingDriver:
    """A fake of the CUDA driver: nodes in the order of launches, each after the one before."""

    def __init__(self) -> None:
        self.recorded, self.pairs = list[Node](), list[tuple[int, int]]()
        self.is_capturing = False

    def add(self, node: Node) -> None:
        if self.is_capturing:
            self.recorded.append(node)

    def end(self) -> None:
        self.is_capturing = False
        relink(self.recorded, self.pairs)

    def capturing(self, stream: int) -> int | None:
        return GRAPH if self.is_capturing else None

    def count(self, graph: int) -> int:
        return len(self.recorded)

    def nodes(self, graph: int) -> list[int]:
        return [FIRST + index for index in range(len(self.recorded))]

    def edges(self, graph: int) -> list[tuple[int, int]]:
        return [(FIRST + one, FIRST + other) for one, other in self.pairs]

    def describe(self, node: int) -> Node:
        return self.recorded[node - FIRST]


class RecordingGraphs:
    """A fake of `CudaGraphs`: runs the launches once to warm up and once to record."""

    def __init__(self, driver: RecordingDriver) -> None:
        self.driver = driver

    def event(self) -> Any:
        raise AssertionError("nothing is profiled")

    def capture(self, launch: Callable[[], None]) -> Callable[[], object]:
        launch()
        self.driver.is_capturing = True
        launch()
        self.driver.end()
        return launch


class Addresses:
    """An address for each fake tensor: 2^36 bytes for each storage."""

    def __init__(self) -> None:
        self.bases: dict[Any, int] = {}

    def __call__(self, tensor: Tensor) -> int:
        base = self.bases.setdefault(storage(tensor), (1 + len(self.bases)) << 36)
        return base + int(tensor.storage_offset()) * tensor.itemsize


class NodeRecorder(Recorder):
    """Records a node for each launch."""

    def __init__(self, driver: RecordingDriver) -> None:
        super().__init__(DryRun(90), "block")
        self.driver = driver

    def note_kernel(self, name: str, grid: Any, packs_queries: bool) -> None:
        """Leave kernels to `recording`, which sees their arguments."""

    def note(self, op: str, kind: str, *args: Any, launched: bool = True) -> None:
        if launched:
            self.driver.add(Node("memcpy", nbytes=64, places=("device", "device")) if op == "aten::copy_"
                            else Node("kernel", f"library kernel of {op}"))  # fmt: skip


@contextmanager
def recording(driver: RecordingDriver, address: Addresses) -> Iterator[NodeRecorder]:
    """Within the block, launches on fake CUDA tensors are nodes of the fake."""
    recorder = NodeRecorder(driver)

    def add(run: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        run(kernel, *args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        driver.add(Node("kernel", kernel.__name__, words=tuple(map(address, given))))
        return kernel

    with card(recorder.run, lambda: recorder, compiled=False), intercepted(add):
        yield recorder


@cache
def program() -> Planned:
    builder = BlockGraphBuilder(
        replace(MODELS["wan-tiny"], num_layers=1), make_preset("self-forcing"), (64, 64), torch.bfloat16
    )
    return lower_block(rewritten(builder.build(), chosen())).body


@cache
def recorded() -> tuple[RecordingDriver, Expected]:
    """What the fake recorded of a block's program, and what the program must have left."""
    driver, address, planned = RecordingDriver(), Addresses(), program()
    with recording(driver, address) as recorder, torch.no_grad(), WithoutDriver(), FakeCard():
        given = {
            buffer.name: torch.empty_strided(buffer.size, buffer.stride, dtype=buffer.dtype, device="cuda")
            for buffer in planned.program.buffers.values() if buffer.role is not Role.SCRATCH
        }  # fmt: skip
        arena = torch.empty(planned.plan.size, dtype=torch.uint8, device="cuda")
        launches = LaunchPlan(planned.program, planned.plan, arena, given)
        watch = RecordedWatch(driver, lambda: 0)
        watch.recorder = recorder
        return driver, captured(launches, RecordingGraphs(driver), watch, address)


class RecordedWatch(LaunchWatch):
    """A watch whose calls launch into a recorder."""

    recorder: NodeRecorder

    def run(self, launches: LaunchPlan) -> None:
        with self.recorder:
            super().run(launches)


def faults(change: Change) -> list[str]:
    """Faults of the recorded graph with a difference planted."""
    driver, expected = recorded()
    changed = RecordingDriver()
    changed.recorded, changed.pairs = list(driver.recorded), list(driver.pairs)
    change(changed.recorded, changed.pairs)
    return compare(read_graph(changed, GRAPH), expected)


def kernel_named(nodes: list[Node], part: str, number: int = 0) -> int:
    """Index of a kernel by a part of its name."""
    return [index for index, node in enumerate(nodes) if part in node.name][number]


def relink(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
    edges[:] = [(index, index + 1) for index in range(len(nodes) - 1)]


def test_a_graph_of_all_launches_agrees_with_its_program() -> None:
    driver, expected = recorded()
    graph, calls = read_graph(driver, GRAPH), expected.program.calls
    assert compare(graph, expected) == []
    facts = summary(graph)
    assert facts["nodes"] == len(calls) and facts["edges"] == len(calls) - 1
    assert sum(facts["kinds"].values()) == facts["nodes"]
    own = [call for call in calls if call.op.namespace == "inferix" and "linear_gelu" not in call.op.name()]
    triton = {name: count for name, count in facts["kernels"].items() if not name.startswith("library")}
    assert sum(triton.values()) == sum(map(len, expected.launched)) == len(own) > 20


def test_a_missing_kernel_is_reported() -> None:
    def drop(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        del nodes[kernel_named(nodes, "adaln")]
        relink(nodes, edges)

    assert any("adaln" in fault and "has the kernels" in fault for fault in faults(drop))


def test_an_extra_copy_is_reported() -> None:
    place = []

    def copy(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        place.append(kernel_named(nodes, "adaln"))
        nodes[place[0]] = Node("memcpy", nbytes=4096, places=("device", "device"))

    assert any("memcpy of 4096 bytes" in fault for fault in faults(copy))

    def instead(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        nodes[kernel_named(nodes, "addmm")] = Node("memcpy", nbytes=4096, places=("device", "device"))

    (fault,) = faults(instead)
    assert "addmm" in fault and "extra memcpy of 4096 bytes" in fault


def test_kernels_in_another_order_are_reported() -> None:
    def swap(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        one, other = kernel_named(nodes, "adaln"), kernel_named(nodes, "_append")
        nodes[one], nodes[other] = nodes[other], nodes[one]

    assert any("it launched" in fault and "adaln" in fault for fault in faults(swap))

    def alike(nodes: list[Node], edges: list[tuple[int, int]]) -> None:  # the same kernel of another call
        one, other = kernel_named(nodes, "adaln", 0), kernel_named(nodes, "adaln", -1)
        nodes[one], nodes[other] = nodes[other], nodes[one]

    reported = faults(alike)
    assert reported and all("which the call does not touch" in fault for fault in reported)


def test_nodes_that_may_run_at_the_same_time_are_reported() -> None:
    def cut(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        del edges[len(edges) // 2]

    (fault,) = faults(cut)
    assert "at the same time" in fault


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (Node("host"), "kind host"), (Node("mem_alloc"), "kind mem_alloc"),
        (Node("memcpy", nbytes=8, places=("host", "device")), "between host and card"),
    ],
)  # fmt: skip
def test_nodes_that_no_call_may_have_are_reported(node: Node, words: str) -> None:
    def put(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        nodes[kernel_named(nodes, "addmm")] = node

    assert any(words in fault for fault in faults(put))


def test_what_was_captured_after_the_last_call_is_reported() -> None:
    def put(nodes: list[Node], edges: list[tuple[int, int]]) -> None:
        nodes.append(Node("kernel", "stray"))
        relink(nodes, edges)

    (fault,) = faults(put)
    assert "kernel stray belongs to no call" in fault


def test_faults_name_the_program() -> None:
    assert faults_of({"a": {"faults": ["x"]}, "b": {"faults": []}}) == ["a: x"]


def test_the_names_of_the_bindings_are_those_that_are_called() -> None:
    """Without a driver each call fails by its library, not by its name."""
    pytest.importorskip("cuda.bindings.driver")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    driver = CudaDriver()
    for call in (
        lambda: driver.capturing(1), lambda: driver.count(1), lambda: driver.nodes(1), lambda: driver.edges(1),
        lambda: driver.describe(1),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="cuda"):
            call()
    names = ("cuGraphKernelNodeGetParams", "cuGraphMemcpyNodeGetParams", "cuGraphMemsetNodeGetParams", "cuFuncGetName",
             "cuKernelGetName", "cuFuncGetParamInfo", "cuKernelGetParamInfo")  # fmt: skip
    assert [name for name in names if not hasattr(driver.api, name)] == []


def test_an_executor_without_graphs_is_refused() -> None:
    class OnCpu:
        class launcher:
            device = torch.device("cpu")

    with pytest.raises(InferixError, match=r"cpu.*cuda"):
        check_executor(OnCpu())  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu_and_takes_the_options_of_an_engine() -> None:
    run = CliRunner().invoke(app, ["graph", "--model", "wan-tiny", "--captured"])
    assert run.exit_code != 0 and "no GPU" in run.output
    run = CliRunner().invoke(app, ["graph", "--model", "wan-tiny", "--captured", "--dry-run", "cuda:90"])
    assert run.exit_code != 0 and "--dry-run" in run.output


def test_a_report_counts_nodes_and_kernels() -> None:
    driver, expected = recorded()
    facts = {"calls": len(expected.program.calls), **summary(read_graph(driver, GRAPH)), "faults": []}
    text = report({"block": facts})
    assert f"{facts['calls']} calls, {facts['nodes']} nodes" in text
    assert all(f"{count} x {kernel}" in text for kernel, count in facts["kernels"].items())


def test_parameters_of_a_kernel_are_read_from_the_drivers_memory() -> None:
    """A fake of the bindings: two pointers, and between them a structure and a number of 32 bits that are left out."""
    values = [ctypes.c_uint64(7 << 36), (ctypes.c_uint64 * 2)(1, 2), ctypes.c_uint32(5), ctypes.c_uint64(8 << 36)]
    sizes = [ctypes.sizeof(value) for value in values]
    addresses = (ctypes.c_uint64 * 4)(*(ctypes.addressof(value) for value in values))
    wrong = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")
    api = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0), cuFuncGetName=lambda function: (0, b"_adaln"),
        cuFuncGetParamInfo=lambda function, index: (0, 0, sizes[index]) if index < 4 else (wrong, 0, 0),
    )  # fmt: skip
    driver = object.__new__(CudaDriver)
    driver.api = api  # type: ignore[assignment]
    shape = dict(zip((f"{part}Dim{axis}" for part in ("grid", "block") for axis in "XYZ"), range(1, 7), strict=True))
    params = SimpleNamespace(func=3, kern=0, kernelParams=ctypes.addressof(addresses), **shape)
    node = driver.kernel(params)
    assert node == Node("kernel", "_adaln", (1, 2, 3, 4, 5, 6), words=(7 << 36, 8 << 36))
    assert driver.kernel(SimpleNamespace(**vars(params) | {"kernelParams": 0})).words == ()
    host, device = (SimpleNamespace(name=f"CU_MEMORYTYPE_{place}") for place in ("HOST", "DEVICE"))
    copied = SimpleNamespace(
        WidthInBytes=64, Height=2, Depth=0, srcMemoryType=host, dstMemoryType=device, srcHost=11, dstHost=0,
        srcDevice=0, dstDevice=12,
    )  # fmt: skip
    assert driver.copy(copied) == Node("memcpy", nbytes=128, places=("host", "device"), words=(11, 12))
    with pytest.raises(InferixError, match=r"cuGraphGetNodes.*CUDA_ERROR_INVALID_VALUE"):
        api.cuGraphGetNodes = lambda *args: (wrong, [], 0)
        driver.call("cuGraphGetNodes")
