"""Kernels that Inductor takes along: what a tracer sees in an op, and the check of packages, without a GPU.

No package is compiled here: a program runs as the op's own form in its place.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from inferix.bench.kernels import clone_inputs
from inferix.bench.package_check import DTYPE, Call, check_package
from inferix.errors import InferixError
from inferix.kernels.catalog import SPECS
from inferix.kernels.triton_ops import NAMESPACE, take_kernels_along, triton_form, triton_op

pytest.importorskip("triton")
OPS = [name for name, spec in SPECS.items() if triton_form(spec) is not None]


def test_every_op_with_a_kernel_of_ours_takes_it_along() -> None:
    assert set(SPECS) - set(OPS) == {"dense_attention"}  # which libraries compute


@pytest.mark.parametrize("name", OPS)
def test_a_tracer_sees_one_launch(name: str) -> None:
    """Of the kernel, from which all outputs of the op come; the tracer is the one before Inductor."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
    from torch._subclasses.functional_tensor import dispatch_functionalize

    spec = SPECS[name]
    inputs = spec.make_inputs(spec.test_cases[0], DTYPE, "cpu", 0)
    module = Call(spec, inputs)
    module.op = triton_op(spec)
    tensors = [inputs[key] for key in module.names]
    graph = make_fx(dispatch_functionalize(module), tracing_mode="fake")(*tensors).graph
    (launch,) = (node for node in graph.nodes if node.target is triton_kernel_wrapper_functional)
    kernel = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])
    assert kernel.fn.__module__.endswith(".gpu")
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    assert {result.args[0] for result in results} == {launch}


def test_an_exported_program_takes_its_kernels_along() -> None:
    """Its ops are replaced, and a program without ops of ours stays as it is."""
    spec = SPECS["rms_norm"]
    inputs = spec.make_inputs(spec.test_cases[0], DTYPE, "cpu", 0)
    module = Call(spec, inputs)
    program = torch.export.export(module, tuple(inputs[name] for name in module.names), strict=False)
    assert take_kernels_along(program) == 1
    assert [node.target for node in program.graph.nodes if NAMESPACE in str(node.target)] == [triton_op(spec)]
    assert take_kernels_along(program) == 0


@pytest.mark.parametrize("name", ["rms_silu", "rope_append"])
def test_a_package_is_compared_with_the_reference(name: str) -> None:
    spec = SPECS[name]

    def build(program: ExportedProgram, path: Path, harm: float = 0.0) -> Any:
        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            inputs = clone_inputs(dict(zip(module.names, tensors, strict=True)))
            results = module(*inputs.values())
            return tuple(result + harm for result in results)

        return run

    module = Call(spec, spec.make_inputs(spec.test_cases[0], DTYPE, "cpu", 0))
    assert check_package(spec, spec.test_cases[0], "cpu", build) is None
    wrong = check_package(spec, spec.test_cases[0], "cpu", lambda program, path: build(program, path, 0.5))
    assert wrong is not None and "off by" in wrong


def test_a_program_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["rms_norm"]
    monkeypatch.setattr("inferix.bench.package_check.take_kernels_along", lambda program: 0)
    with pytest.raises(InferixError, match="rms_norm"):
        check_package(spec, spec.test_cases[0], "cpu", lambda program, path: pytest.fail("built"))
