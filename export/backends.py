"""Backends: runtimes that run the programs of an exported engine, one for each target.

A runtime's package is imported when its backend is made, so that a reader needs numpy and that package only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

import numpy as np

from ..errors import CheckpointError, InferixError, quoted
from .numerics import Array
from .plan import Plan
from .targets import TARGETS

Values = dict[str, Array]


class Program(Protocol):
    """A program of an engine: tensors by name to tensors by name."""

    def __call__(self, values: Mapping[str, Array]) -> Values: ...


LoadProgram = Callable[[Path], Program]


class Backend(Protocol):
    """Loads programs of one target."""

    def load(self, path: Path, inputs: list[str], outputs: list[str]) -> Program:
        """Load a program; inputs and outputs: names of its tensors, in order."""
        ...


class OnnxRuntime:
    """Programs by ONNX Runtime on the CPU. threads: of each program, 0 for one per core."""

    def __init__(self, plan: Plan, threads: int = 0) -> None:
        import onnxruntime

        self.runtime, self.options = onnxruntime, onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        # Each program has threads of its own, which take the cores of others while they wait by spinning.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without instructions for sums of 8-bit products, signed weights overflow in 16 bits; unsigned ones do not.
        self.options.add_session_config_entry("session.x64quantprecision", "1")
        self.options.log_severity_level = 3

    def load(self, path: Path, inputs: list[str], outputs: list[str]) -> Program:
        session = self.runtime.InferenceSession(str(path), self.options, providers=["CPUExecutionProvider"])

        def program(values: Mapping[str, Array]) -> Values:
            results = session.run(outputs, {name: values[name] for name in inputs})
            return dict(zip(outputs, results, strict=True))

        return program


class OpenVino:
    """Programs by OpenVINO on the CPU. threads: of each program, 0 for one per core."""

    def __init__(self, plan: Plan, threads: int = 0) -> None:
        import openvino

        self.core = openvino.Core()
        self.config = {  # by default it computes in bfloat16 on CPUs that have it
            "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip

    def load(self, path: Path, inputs: list[str], outputs: list[str]) -> Program:
        request = self.core.compile_model(self.core.read_model(path), "CPU", self.config).create_infer_request()

        def program(values: Mapping[str, Array]) -> Values:
            request.infer({name: values[name] for name in inputs}, share_inputs=True)
            return {name: request.get_tensor(name).data.copy() for name in outputs}  # the next run overwrites them

        return program


class AotInductor:
    """Programs compiled by AOTInductor, run by torch on the CPU. threads: of torch, 0 for its own number.

    Raises CheckpointError for an engine that another version of torch, or a CPU of another kind, has compiled.
    """

    def __init__(self, plan: Plan, threads: int = 0) -> None:
        import torch

        here = {"torch": release(torch.__version__), "CPU": torch.backends.cpu.get_cpu_capability()}
        built = {"torch": release(plan["built"]["packages"]["torch"]), "CPU": plan["built"]["options"]["cpu"]}
        for what, value in built.items():
            if here[what] != value:
                raise CheckpointError(f"engine {quoted(plan.folder)} was compiled for {what} {quoted(value)}, but "
                                      f"this is {here[what]}; export it again here")  # fmt: skip
        if threads:
            torch.set_num_threads(threads)

    def load(self, path: Path, inputs: list[str], outputs: list[str]) -> Program:
        import torch
        from torch._inductor import aoti_load_package

        run = aoti_load_package(str(path)).loader.run

        def program(values: Mapping[str, Array]) -> Values:
            # it reads memory as if there were no strides
            results = run([torch.from_numpy(np.ascontiguousarray(values[name])) for name in inputs])
            return {name: result.numpy() for name, result in zip(outputs, results, strict=True)}

        return program


class TensorRt:
    """Programs by TensorRT on the GPU. Never run: no GPU was available to this version.

    Raises CheckpointError for an engine that TensorRT refuses, such as one built for another GPU or version.
    """

    device = "cuda"

    def __init__(self, plan: Plan, threads: int = 0) -> None:
        import tensorrt

        self.runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self.version = tensorrt.__version__

    def load(self, path: Path, inputs: list[str], outputs: list[str]) -> Program:
        import torch

        engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise CheckpointError(f"TensorRT {self.version} refuses {quoted(path)}; export it again on this GPU "
                                  "and with this version")  # fmt: skip
        context = engine.create_execution_context()
        spare = torch.zeros(1, device=self.device)  # an address for tensors without elements, which have none

        def program(values: Mapping[str, Array]) -> Values:
            given = {name: torch.from_numpy(values[name]).to(self.device) for name in inputs}
            for name, tensor in given.items():
                context.set_input_shape(name, tuple(tensor.shape))
            made = {name: torch.empty(tuple(context.get_tensor_shape(name)), device=self.device) for name in outputs}
            for name, tensor in (given | made).items():
                context.set_tensor_address(name, tensor.data_ptr() or spare.data_ptr())
            if not context.execute_async_v3(0):  # torch's default stream, in which its copies are ordered too
                raise InferixError(f"TensorRT {self.version} failed to run {quoted(path)}; its log has the reason")
            return {name: tensor.cpu().numpy() for name, tensor in made.items()}

        return program


def release(version: str) -> str:
    """Major and minor number of a version: `2.13` of `2.13.0+cpu`."""
    return ".".join(version.split(".")[:2])


def program_loader(plan: Plan, threads: int = 0) -> LoadProgram:
    """A function that loads a program of an engine from its path, by the backend for the plan's target.

    threads: of each program, 0 for one per core. Raises InferixError if the runtime is not installed, CheckpointError
    for a target that this version does not know.
    """
    if plan["target"] not in TARGETS:
        raise CheckpointError(
            f"engine {quoted(plan.folder)} has target {quoted(plan['target'])}; expected one of "
            f"{', '.join(TARGETS)}: export it again with this version of inferix"
        )
    target = TARGETS[plan["target"]]
    if find_spec(target.runtime) is None:
        raise InferixError(f"{target.runtime} is not installed, and target {target.name} needs it to run; "
                           f"pip install {target.runtime}")  # fmt: skip
    backend: Backend = resolve_name(target.backend)(plan, threads)
    entries = {entry["file"]: entry for entry in plan["programs"].values()}

    def load(path: Path) -> Program:
        entry = entries[path.name]
        return backend.load(path, [value["name"] for value in entry["inputs"]], entry["outputs"])

    return load
