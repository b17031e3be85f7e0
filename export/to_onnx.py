"""Programs as ONNX files (opset 23) that share one file of weights.

Weights lie in `weights.bin` as external data, each once however many programs read it, so that a runtime can map them
into memory. Opset 23 is the first with attention and RMS norm as operators.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from .kv_precision import LIMIT, SMALLEST
from .programs import Program
from .trace import quiet, trace

OPSET = 23
WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # of each tensor in the file of weights: a page of memory
LEAST_EXTERNAL = 1024  # bytes; smaller tensors stay in the program
WEIGHTED = ("MatMul", "Gemm", "Conv")  # operators whose weights may be stored in float16


class WeightFile:
    """A file of tensors in which equal ones share a place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[bytes, tuple[int, int]] = {}  # (offset, bytes) by hash
        self.file: BinaryIO = path.open("wb")

    def place(self, tensor: NDArray[Any]) -> tuple[int, int]:
        """Offset and bytes of a contiguous tensor in the file; it is appended if it is new."""
        data = tensor.reshape(-1).view(np.uint8).data
        key = hashlib.sha256(data).digest()
        if key not in self.places:
            self.file.write(bytes(-self.file.tell() % ALIGNMENT))
            self.places[key] = self.file.tell(), data.nbytes
            self.file.write(data)
        return self.places[key]


class OnnxWriter:
    """Writes programs as ONNX; see `Writer`."""

    options: ClassVar[dict[str, Any]] = {"opset": OPSET}

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder, self.dtype, self.weights = folder, dtype, WeightFile(folder / WEIGHTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.file.close()

    def write(self, program: Program) -> None:
        with quiet(), torch.no_grad():
            result = torch.onnx.export(
                trace(program), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(program.names), output_names=list(program.results),
                custom_translation_table=translations(),
            )  # fmt: skip
        assert result is not None
        self.save(result.model, program.name)

    def save(self, model: Any, name: str) -> None:
        """Save the `onnx_ir` model of a program, its large tensors in the file of weights."""
        import onnx_ir

        if self.dtype == "float16":
            store_in_half(model)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= LEAST_EXTERNAL:
                content = np.ascontiguousarray(tensor.numpy())
                offset, length = self.weights.place(content)
                shape = onnx_ir.Shape(content.shape)
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype, shape=shape, name=value.name or "", base_dir=self.folder
                )
        onnx_ir.save(model, self.folder / f"{name}.onnx")


def translations() -> dict[Any, Any]:
    """Functions of onnxscript that make the operators of ONNX for our ops."""
    from onnxscript import FLOAT, INT8, UINT8, opset23

    def quantise(x: Any, scale: Any) -> Any:
        return opset23.QuantizeLinear(x, scale, axis=0, output_dtype=INT8.dtype)

    def dequantise(x: Any, scale: Any) -> Any:
        return opset23.DequantizeLinear(x, scale, axis=0)

    ops: Any = opset23  # its types do not know that a Cast has one

    def linear(x: Any, weight: Any, scale: Any) -> Any:
        most = ops.ReduceMax(ops.Abs(x), ops.Constant(value_ints=[-1]), keepdims=1)
        by = ops.Div(ops.Max(most, ops.Constant(value_float=SMALLEST)), ops.Constant(value_float=LIMIT))
        rows = ops.Add(ops.Round(ops.Div(x, by)), ops.Constant(value_float=128.0))
        middle = ops.Cast(ops.Constant(value_float=128.0), to=UINT8.dtype)
        product = ops.MatMulInteger(ops.Cast(rows, to=UINT8.dtype), weight, middle)
        # Not times `by * scale`: ONNX Runtime would fuse that into an operator that takes `by` for one number.
        return ops.Mul(ops.Mul(ops.Cast(product, to=FLOAT.dtype), by), scale)

    return {torch.ops.inferix_export.quantise_rows.default: quantise,
            torch.ops.inferix_export.dequantise_rows.default: dequantise,
            torch.ops.inferix_export.linear_int8.default: linear}  # fmt: skip


def store_in_half(model: Any) -> None:
    """Store the weights of matrices and convolutions in float16, with a Cast to float32 behind each.

    What is computed stays float32. A weight beyond the range of float16 is stored as it is.
    """
    import onnx_ir

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        used = {use.node.op_type for use in value.uses()}
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or not used or not used <= set(WEIGHTED):
            continue
        content = tensor.numpy()
        if content.nbytes < LEAST_EXTERNAL or np.abs(content).max() > np.finfo(np.float16).max:
            continue
        half = onnx_ir.tensor(content.astype(np.float16), name=f"{name}.float16")
        kind, shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16), onnx_ir.Shape(content.shape)
        stored = onnx_ir.Value(name=half.name, shape=shape, type=kind, const_value=half)
        cast = onnx_ir.node("Cast", [stored], attributes={"to": int(onnx_ir.DataType.FLOAT)}, name=f"{name}.cast")
        (single,) = cast.outputs
        single.name, single.shape, single.type = f"{name}.float32", value.shape, value.type
        value.replace_all_uses_with(single)
        del graph.initializers[name]
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


class ConvertingWriter:
    """Writes programs as ONNX into a folder that is removed at the end, for a target that converts them."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder, self.dtype = folder, dtype

    def __enter__(self) -> Self:
        self.place = TemporaryDirectory(dir=self.folder.parent)
        self.onnx = OnnxWriter(Path(self.place.name), self.dtype)
        return self

    def __exit__(self, *_: object) -> None:
        self.onnx.weights.file.close()
        self.place.cleanup()

    def write_onnx(self, program: Program) -> Path:
        """Write a program with all of its weights; its path."""
        self.onnx.write(program)
        self.onnx.weights.file.flush()
        return self.onnx.folder / f"{program.name}.onnx"
