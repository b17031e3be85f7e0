"""Check of captured CUDA graphs: the driver's graph of a program against the program's calls, read by `cuda.bindings`.

A program is captured once more on its own tensors. Before each call the nodes so far are counted, and the Triton
kernels that the call launches are noted. An extra copy, a kernel that is missing or in another place, a read on the
host, and a kernel on memory that its call does not touch are faults.

Run: inferix graph --captured
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InferixError
from ..graphs.capture import CaptureBackend, CudaGraphs
from ..graphs.captured_graph import (
    CapturedGraph,
    CudaDriver,
    Expected,
    GraphDriver,
    Range,
    compare,
    read_graph,
    summary,
)
from ..graphs.launch import LaunchPlan
from ..runtime.execution.executors import GraphExecutor
from .candidates import EngineStream
from .compile_gate import intercepted
from .subject import Subject, open_engine, random_prompt
from .work import blocks_until_full

Address = Callable[[Tensor], int]


@dataclass
class LaunchWatch:
    """Runs a program's calls and notes what they launch. stream: handle of the stream that is captured.

    before: nodes of the graph before each call, and after the last. launched: names of Triton kernels by call.
    """

    driver: GraphDriver
    stream: Callable[[], int]
    before: list[int] = field(default_factory=list)
    launched: list[list[str]] = field(default_factory=list)

    def run(self, launches: LaunchPlan) -> None:
        """Launch every call; what an earlier run noted is dropped."""
        self.before, self.launched = [], []
        with intercepted(self.note):
            launches.run_with(self.mark)

    def mark(self, index: int) -> None:
        graph = self.driver.capturing(self.stream())
        self.before.append(0 if graph is None else self.driver.count(graph))
        self.launched.append([])

    def note(self, run: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(kernel, *args, **kwargs)
        self.launched[-1].append(getattr(compiled, "name", kernel.__name__))
        return compiled


def check_program(launches: LaunchPlan, device: torch.device) -> dict[str, Any]:
    """Capture a program on a GPU and compare the graph with it; returns its numbers and a list of faults."""
    driver, graphs = CudaDriver(), list[CapturedGraph]()
    backend = CudaGraphs(device, lambda graph: graphs.append(read_graph(driver, graph)))
    watch = LaunchWatch(driver, lambda: int(torch.cuda.current_stream(device).cuda_stream))
    expected = captured(launches, backend, watch)
    return {"calls": len(launches.calls), **summary(graphs[-1]), "faults": compare(graphs[-1], expected)}


def captured(
    launches: LaunchPlan, backend: CaptureBackend, watch: LaunchWatch, address: Address = Tensor.data_ptr
) -> Expected:
    """Capture a program; returns what its graph must hold."""
    backend.capture(lambda: watch.run(launches))
    touched, owned = tuple(touched_memory(launches, address)), owned_memory(launches, address)
    return Expected(launches.program, watch.before, watch.launched[:-1], touched, owned)


def touched_memory(launches: LaunchPlan, address: Address) -> Iterator[list[Range]]:
    """Addresses that each call of a program may read or write."""
    for call in launches.program.calls:
        views = [launches.view(ref) for ref in {*call.reads, *call.writes}]
        yield [(address(view), address(view) + spanned(view)) for view in views]


def owned_memory(launches: LaunchPlan, address: Address) -> list[Range]:
    """Addresses of all buffers of a program."""
    return [(address(tensor), address(tensor) + spanned(tensor)) for tensor in launches.flat.values()]


def spanned(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.itemsize


def check_executor(executor: GraphExecutor) -> dict[str, dict[str, Any]]:
    """Check the programs that an executor has captured, by their shapes.

    InferixError for an executor on another device than a GPU.
    """
    device = executor.launcher.device
    if device.type != "cuda":
        raise InferixError(f"the executor runs on {device}, where no CUDA graph is captured; use one on cuda")
    results = {}
    for key, loaded in executor.loaded.items():
        if loaded.body.replay not in (None, loaded.body.launches.run):
            shape = f"{key.sessions} x {list(key.latent)}, parts {list(key.parts)}, table of {key.width} of {key.pages}"
            name = f"{'block' if key.whole else 'pass'}, latents {shape} pages{', sinks turned' if key.sinks else ''}"
            results[name] = check_program(loaded.body.launches, device)
    return results


def check_graphs(subject: Subject) -> dict[str, dict[str, Any]]:
    """Check the graphs that a stream captures up to a full window; the subject names a GPU."""
    engine = open_engine(subject)
    rows = random_prompt(engine, subject.seed)
    stream = EngineStream(engine, rows, subject.seed, subject.size or engine.default_size)
    for _ in range(blocks_until_full(engine.preset) + 2):
        stream.step(decode=False)
    executor = engine.executor
    assert isinstance(executor, GraphExecutor)
    results = check_executor(executor)
    stream.close()
    return results


def report(results: dict[str, dict[str, Any]]) -> str:
    """Format the checked graphs as text: nodes by kind and by kernel."""
    lines = []
    for name, facts in results.items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in facts["kinds"].items())
        verdict = f"{len(facts['faults'])} faults" if facts["faults"] else "agrees with its program"
        lines.append(f"{name}: {facts['calls']} calls, {facts['nodes']} nodes ({kinds}); {verdict}")
        lines += [f"  {count:>6} x {kernel}" for kernel, count in facts["kernels"].items()]
    return "\n".join(lines)


def faults_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """Faults of all checked programs, with the program's name."""
    return [f"{name}: {fault}" for name, facts in results.items() for fault in facts["faults"]]
