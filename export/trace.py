"""Tracing of an engine's programs by `torch.export`, for the writers of all targets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch.export import ExportedProgram

from .programs import Program


class Writer(Protocol):
    """Writes the programs of an engine into its folder, in the format of one target; a context manager.

    options: build options, for the plan. dtype: of the stored weights, one that the target has.
    """

    options: ClassVar[dict[str, Any]]

    def __init__(self, folder: Path, dtype: str = "float32") -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def write(self, program: Program) -> None:
        """Write a program to `<name><suffix of the target>`."""
        ...


def trace(program: Program) -> ExportedProgram:
    """Trace a program, with the dimensions that differ from pass to pass as symbols."""
    dims: dict[str, Any] = {}
    shapes = {
        key: like(program.inputs[key], {axis: dims.setdefault(name, torch.export.Dim(name, min=0)) for axis, name in
                                        axes.items()})
        for key, axes in program.dynamic.items()
    }  # fmt: skip
    with quiet(), torch.no_grad():
        return torch.export.export(program.module.eval(), (), program.inputs, dynamic_shapes=shapes, strict=False)


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
