"""An engine whose programs are a few arithmetic nodes in place of the model: written in milliseconds, for runners.

Every result depends on every input, and keys and pictures on each frame's latents, so a runner that mixes up frames,
slots, positions, prompts, timesteps or states makes other latents. The plan is that of a small model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from oracles import SIZE
from small_engine import PROMPTS, ROWS, small_engine

from inferix.export.engine_folder import write_engine
from inferix.export.programs import Program
from inferix.export.targets import TARGETS
from inferix.export.to_openvino import convert
from inferix.runtime.engine import Engine

OPSET = 18
KINDS = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}


def toy_model(program: Program) -> onnx.ModelProto:
    """A model with a program's inputs, results and shapes."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), f"constant_{len(constants)}"))
        return constants[-1].name

    def node(kind: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [result or f"value_{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def pattern(shape: Iterable[int], number: int) -> str:
        """A constant that differs from element to element."""
        sizes = tuple(shape)
        values = np.sin(np.arange(int(np.prod(sizes)), dtype=np.float32) * 0.7 + number).reshape(sizes)
        return constant(values.astype(np.float32))

    tensors: list[tuple[str, torch.Tensor, dict[int, str]]] = []
    names = iter(program.names)
    for key, value in program.inputs.items():
        tensors += [(next(names), one, program.dynamic[key]) for one in (value if isinstance(value, list) else [value])]
    total = constant(np.float32(0))
    for number, (name, tensor, _) in enumerate(tensors, 1):  # a sum is 0 for a past without frames, a mean is none
        real = name
        if tensor.dtype != torch.float32:  # masks and numbers, whose order counts
            real = node("CumSum", node("Cast", name, to=TensorProto.FLOAT), constant(np.array(0)))
        bent = node("Sin", node("Mul", real, constant(np.float32(0.37))))
        share = constant(np.float32(number / (10 * max(tensor.numel(), 1))))
        total = node("Add", total, node("Mul", node("ReduceSum", bent, keepdims=0), share))
    with torch.no_grad():
        made = program.module(**program.inputs)
    shapes = [result.shape for result in (made if isinstance(made, tuple) else (made,))]
    results = []
    for number, (name, shape) in enumerate(zip(program.results, shapes, strict=True)):
        axes: dict[int, str] = {}
        if name == "velocity":
            axes = program.dynamic["latents"]
            node("Add", node("Mul", "latents", constant(np.float32(0.4))), total, result=name)
        elif name == "clean":
            axes = program.dynamic["noise"]
            mean = node("ReduceMean", "noise", constant(np.array([0])), keepdims=1)
            node("Add", node("Mul", mean, constant(np.float32(0.8))), total, result=name)
        elif name.startswith("new_"):  # [frames, tokens, heads, channels]
            axes = {0: program.dynamic["latents"].get(1, shape[0])}
            frames = node("ReduceMean", "latents", constant(np.array([0, 2, 3, 4])), keepdims=0)
            column = node("Reshape", frames, constant(np.array([-1, 1, 1, 1])))
            node("Add", node("Mul", column, pattern((1, *shape[1:]), number)), total, result=name)
        elif name == "text_mask":
            node("Greater", pattern(shape, number), constant(np.float32(-0.5)), result=name)
        else:
            level = node("Add", total, node("ReduceMean", program.names[0], keepdims=0))
            node("Sin", node("Add", pattern(shape, number), level), result=name)
        sizes = [axes.get(axis, size) for axis, size in enumerate(shape)]
        kind = TensorProto.BOOL if name == "text_mask" else TensorProto.FLOAT
        results.append(helper.make_tensor_value_info(name, kind, sizes))
    inputs = []
    for name, tensor, named in tensors:
        sizes = [named.get(axis, size) for axis, size in enumerate(tensor.shape)]
        inputs.append(helper.make_tensor_value_info(name, KINDS[tensor.dtype], sizes))
    graph = helper.make_graph(nodes, program.name, inputs, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


class ToyWriter:
    """Writes toy programs as ONNX."""

    options: ClassVar[dict[str, Any]] = {"opset": OPSET}

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder = folder

    def __enter__(self) -> ToyWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, program: Program) -> None:
        onnx.save(toy_model(program), str(self.folder / f"{program.name}.onnx"))


class ToyOpenVinoWriter(ToyWriter):
    """Writes toy programs as OpenVINO IR."""

    def write(self, program: Program) -> None:
        super().write(program)
        path = self.folder / f"{program.name}.onnx"
        convert(path, path.with_suffix(".xml"))
        path.unlink()


WRITERS = {"onnx": "ToyWriter", "openvino": "ToyOpenVinoWriter"}


def export_toy(
    target: str, out: Path, size: tuple[int, int] = SIZE, engine: Engine | None = None,
    rows: Mapping[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write the toy engine for target onnx or openvino. engine: another one than the small one, and its prompts."""
    toy = dataclasses.replace(TARGETS[target], writer=f"{__name__}:{WRITERS[target]}")
    return write_engine(engine or small_engine(), out, size, toy, rows or dict(zip(PROMPTS, ROWS, strict=True)))
