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

from .programs import Program
from .trace import quiet, trace

OPSET = 23
WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # of each tensor in the file of weights: a page of memory
LEAST_EXTERNAL = 1024  # bytes; smaller tensors stay in the program


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

    def __init__(self, folder: Path) -> None:
        self.folder, self.weights = folder, WeightFile(folder / WEIGHTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.file.close()

    def write(self, program: Program) -> None:
        import onnx_ir

        with quiet(), torch.no_grad():
            result = torch.onnx.export(
                trace(program), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(program.names), output_names=list(program.results),
            )  # fmt: skip
        assert result is not None
        model = result.model
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= LEAST_EXTERNAL:
                content = np.ascontiguousarray(tensor.numpy())
                offset, length = self.weights.place(content)
                shape = onnx_ir.Shape(content.shape)
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype, shape=shape, name=value.name or "", base_dir=self.folder
                )
        onnx_ir.save(model, self.folder / f"{program.name}.onnx")


class ConvertingWriter:
    """Writes programs as ONNX into a folder that is removed at the end, for a target that converts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        self.place = TemporaryDirectory(dir=self.folder.parent)
        self.onnx = OnnxWriter(Path(self.place.name))
        return self

    def __exit__(self, *_: object) -> None:
        self.onnx.weights.file.close()
        self.place.cleanup()

    def write_onnx(self, program: Program) -> Path:
        """Write a program with all of its weights; its path."""
        self.onnx.write(program)
        self.onnx.weights.file.flush()
        return self.onnx.folder / f"{program.name}.onnx"
