"""Check of kernels in AOTInductor packages on a card: Inductor compiles them, the package runs, the reference compares.

No card has run it: there was none for this version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..errors import InferixError
from ..kernels.spec import Case, KernelSpec, architecture
from ..kernels.triton_ops import take_kernels_along, triton_form
from ..kernels.verify import outputs_of
from .kernels import clone_inputs, mismatch

DTYPE = torch.bfloat16
Run = Callable[..., tuple[Tensor, ...]]
Build = Callable[[ExportedProgram, Path], Run]  # compiles a program into a file and loads it


class Call(torch.nn.Module):
    """One call of an op as a module over the tensors of its arguments; returns its outputs, and changes no tensor.

    Arguments that are no tensors are constants of the module.
    """

    def __init__(self, spec: KernelSpec, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.op = getattr(torch.ops.inferix, spec.name).default
        self.arguments = spec.names
        self.constants = {name: None if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.outputs = outputs_of(spec, inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        made = {name: given[name].clone() for name in self.outputs}
        values = self.constants | given | made
        self.op(*(values[name] for name in self.arguments))
        return tuple(made.values())


def build_package(program: ExportedProgram, path: Path) -> Run:
    """Compile a program by AOTInductor and load it."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(program, package_path=str(path))
    run: Run = aoti_load_package(str(path))
    return run


def check_package(spec: KernelSpec, case: Case, device: str, build: Build = build_package) -> str | None:
    """Run a call of an op as a package; the reason to refuse it, None if it matches the reference.

    Raises InferixError if the program has no kernel to take along.
    """
    inputs = spec.make_inputs(case, DTYPE, device, 0)
    module = Call(spec, inputs)
    program = torch.export.export(module, tuple(inputs[name] for name in module.names), strict=False)
    if take_kernels_along(program) != 1:
        raise InferixError(f"{spec.name}, {case.name}: the exported program has no kernel")
    expected = clone_inputs(inputs)
    spec.reference(**expected)
    with TemporaryDirectory() as folder:
        run = build(program, Path(folder) / f"{spec.name}.pt2")

        def prepare(placed: dict[str, Any]) -> Callable[[], None]:
            def call() -> None:
                results = run(*(placed[name] for name in module.names))
                for name, result in zip(module.outputs, results, strict=True):
                    placed[name].copy_(result)

            return call

        return mismatch(spec, prepare, inputs, expected, DTYPE)


def check_packages(spec: KernelSpec, device: str) -> dict[str, str | None]:
    """Check an op as a package on its first test case and its first benchmark case that the Triton form takes."""
    form, results = triton_form(spec), {}
    assert form is not None, f"{spec.name} has no Triton form"
    for case in (spec.test_cases[0], spec.bench_cases[0]):
        inputs = spec.make_inputs(case, DTYPE, device, 0)
        if spec.serving(architecture(torch.device(device)), inputs, [form]):
            results[case.name] = check_package(spec, case, device)
    return results
