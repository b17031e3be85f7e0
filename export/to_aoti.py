"""Programs compiled by AOTInductor: `<name>.pt2`, a shared library with its weights for this machine's kind of CPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from ..errors import InferixError
from .programs import Program
from .trace import quiet, trace


class AotiWriter:
    """Writes programs as AOTInductor packages; see `Writer`. InferixError where there is no C++ compiler."""

    options: ClassVar[dict[str, Any]] = {"cpu": torch.backends.cpu.get_cpu_capability()}

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        assert dtype == "float32", "no feature of the target"
        self.folder = folder
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            raise InferixError(f"target aoti needs a C++ compiler, and {' and '.join(compilers)} is not on PATH; "
                               "install g++, or export to onnx")  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, program: Program) -> None:
        from torch._inductor import aoti_compile_and_package

        with quiet():
            aoti_compile_and_package(trace(program), package_path=str(self.folder / f"{program.name}.pt2"))
