"""Programs of an exported engine as torch modules, which takes no export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from oracles import SIZE

from inferix.export.engine_folder import describe_encoder, describe_programs
from inferix.export.programs import Program
from inferix.export.targets import TARGETS
from inferix.runtime.engine import Engine


class ModuleProgram:
    """A program run as its torch module: the plain reference of its exported file."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, values: Any) -> dict[str, Any]:
        names = iter(self.program.names)
        inputs = {
            key: [torch.from_numpy(values[next(names)]) for _ in value] if isinstance(value, list)
            else torch.from_numpy(values[next(names)])
            for key, value in self.program.inputs.items()
        }  # fmt: skip
        with torch.no_grad():
            results = self.program.module(**inputs)
        tensors = results if isinstance(results, tuple) else (results,)
        return {name: tensor.numpy() for name, tensor in zip(self.program.results, tensors, strict=True)}


class NameWriter:
    """Writes a program's name in its place; tests take the module instead."""

    options: ClassVar[dict[str, Any]] = {"opset": 0}

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder = folder

    def __enter__(self) -> NameWriter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, program: Program) -> None:
        (self.folder / f"{program.name}.onnx").write_bytes(program.name.encode())


NAMES = dataclasses.replace(TARGETS["onnx"], writer=f"{__name__}:NameWriter")


def modules_of(
    engine: Engine, unroll: bool = False, size: tuple[int, int] = SIZE, kv_dtype: str = "float32"
) -> dict[str, ModuleProgram]:
    programs, decoder = describe_programs(engine, size, unroll, kv_dtype)
    encoder = describe_encoder(engine, size).programs if engine.parts.vae.spec.tile_frames == 1 else ()
    return {program.name: ModuleProgram(program) for program in [*programs, *decoder.programs, *encoder]}
