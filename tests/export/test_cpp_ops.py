"""Ops in C++ (`export/cpp/ops.cpp`) against their references, each in a process of its own. Run by ctest.

The library defines the ops, as the package does, so the two are not loaded together.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpp_build import Built

from inferix.bench.kernels import clone_inputs
from inferix.kernels.catalog import PLAIN, SPECS
from inferix.kernels.linear_gelu import linear_gelu
from inferix.kernels.spec import FP8, KernelSpec
from inferix.kernels.verify import wrong_values

CHILD = """
import sys
import torch
library, calls, results = sys.argv[1:]
torch.ops.load_library(library)
made = torch.load(calls, weights_only=True)
for name, inputs in made["calls"]:
    getattr(torch.ops.inferix, name)(**inputs)
schemas = {name: str(getattr(torch.ops.inferix, name).default._schema) for name in made["names"]}
torch.save({"calls": [inputs for _, inputs in made["calls"]], "schemas": schemas}, results)
"""


def in_cpp(built: Built, calls: list[tuple[str, dict[str, Any]]], place: Path) -> dict[str, Any]:
    """Run calls of ops in a process that has the library alone; their arguments afterwards, and all schemas."""
    torch.save({"calls": calls, "names": [*SPECS, *PLAIN]}, place / "calls.pt")
    command = [sys.executable, "-c", CHILD, str(built.ops), str(place / "calls.pt"), str(place / "results.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = torch.load(place / "results.pt", weights_only=True)
    return results


def limit(spec: KernelSpec, dtype: torch.dtype) -> Callable[[torch.Tensor], float]:
    """Largest error of an output, as the checks of kernels allow it."""
    return lambda out: {FP8: 0.08, torch.int8: 0.01}.get(out.dtype, 2 * spec.tolerance[dtype])


def test_ops_in_cpp_equal_their_references(built: Built, tmp_path: Path) -> None:
    """Every op on every test case, in float32 and bfloat16, and the schemas."""
    cases = [
        (spec, dtype, f"{spec.name}, {case.name}, {dtype}", spec.make_inputs(case, dtype, "cpu", 0))
        for spec in SPECS.values() for case in spec.test_cases for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip
    x, weight, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)
    plain = {"x": x, "weight": weight, "bias": bias, "out": torch.zeros(5, 6)}
    results = in_cpp(built, [*((spec.name, inputs) for spec, _, _, inputs in cases), ("linear_gelu", plain)], tmp_path)
    wrong = {}
    for (spec, dtype, name, inputs), made in zip(cases, results["calls"], strict=False):
        expected = clone_inputs(inputs)
        spec.reference(**expected)
        if fault := wrong_values(spec, made, expected, limit(spec, dtype)):
            wrong[name] = fault
    assert wrong == {}
    torch.testing.assert_close(results["calls"][-1]["out"], linear_gelu(x, weight, bias), rtol=1e-5, atol=1e-5)
    ours = {name: str(getattr(torch.ops.inferix, name).default._schema) for name in [*SPECS, *PLAIN]}
    assert results["schemas"] == ours


def test_a_collective_has_no_form(built: Built, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"inferix::all_gather"):
        in_cpp(built, [("all_gather", {"x": torch.ones(2), "out": torch.ones(4), "group": 0})], tmp_path)


class Keeps(torch.nn.Module):
    """Two ops of ours between torch's own."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed, out = torch.empty_like(x), torch.empty_like(x)
        torch.ops.inferix.rms_norm(x * 2, weight, normed, 1e-6)
        torch.ops.inferix.rms_silu(normed, weight, None, None, None, out, None)
        return out + x


@pytest.mark.slow  # the compiler takes a minute
def test_a_package_that_keeps_ops_runs_in_cpp(built: Built, tmp_path: Path) -> None:
    """An AOTInductor package whose graph calls our ops, in a process without Python, against Python."""
    from torch._inductor import aoti_compile_and_package

    program = built.make("run_package")
    inputs = torch.randn(4, 8), torch.randn(8)
    package = tmp_path / "keeps.pt2"
    aoti_compile_and_package(torch.export.export(Keeps(), inputs), package_path=str(package))
    arguments = []
    for number, tensor in enumerate(inputs):
        path = tmp_path / f"{number}.f32"
        tensor.numpy().tofile(path)
        arguments.append(f"{path}:{'x'.join(map(str, tensor.shape))}")
    out = tmp_path / "out.f32"
    done = subprocess.run([program, package, out, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = np.fromfile(out, np.float32).reshape(inputs[0].shape)
    np.testing.assert_allclose(made, Keeps()(*inputs).numpy(), rtol=1e-5, atol=1e-6)
