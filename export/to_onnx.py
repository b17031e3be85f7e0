"""Programs as ONNX files (opset 23) that share one file of weights.

Weights lie in `weights.bin` as external data, each once however many programs read it, so that a runtime can map them
into memory. Opset 23 is the first with attention and RMS norm as operators.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from .plan import WEIGHTS
from .programs import Program

OPSET = 23
ALIGNMENT = 4096  # of each tensor in the file of weights: a page of memory
LEAST_EXTERNAL = 1024  # bytes; smaller tensors stay in the program


class WeightFile:
    """A file of tensors in which equal ones share a place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[bytes, tuple[int, int]] = {}  # (offset, bytes) by hash
        self.file: BinaryIO = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def place(self, tensor: NDArray[Any]) -> tuple[int, int]:
        """Offset and bytes of a contiguous tensor in the file; it is appended if it is new."""
        data = tensor.reshape(-1).view(np.uint8).data
        key = hashlib.sha256(data).digest()
        if key not in self.places:
            self.file.write(bytes(-self.file.tell() % ALIGNMENT))
            self.places[key] = self.file.tell(), data.nbytes
            self.file.write(data)
        return self.places[key]


def write_onnx(program: Program, folder: Path, weights: WeightFile) -> Path:
    """Write a program to `<name>.onnx`; returns the path."""
    import onnx_ir

    dims: dict[str, Any] = {}
    shapes = {
        key: like(program.inputs[key], {axis: dims.setdefault(name, torch.export.Dim(name, min=0)) for axis, name in
                                        axes.items()})
        for key, axes in program.dynamic.items()
    }  # fmt: skip
    with quiet(), torch.no_grad():
        exported = torch.export.export(program.module.eval(), (), program.inputs, dynamic_shapes=shapes, strict=False)
        result = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=list(program.names), output_names=list(program.results),
        )  # fmt: skip
    assert result is not None
    model = result.model
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= LEAST_EXTERNAL:
            content = np.ascontiguousarray(tensor.numpy())
            offset, length = weights.place(content)
            shape = onnx_ir.Shape(content.shape)
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, offset, length, tensor.dtype, shape=shape, name=value.name or "", base_dir=folder
            )
    path = folder / f"{program.name}.onnx"
    onnx_ir.save(model, path)
    return path


def like(inputs: Any, axes: dict[int, Any]) -> Any:
    """The same axes for a tensor, or for each of a list."""
    return [axes] * len(inputs) if isinstance(inputs, list) else axes


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages and renamed axes; errors are raised as they are."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
