"""Triton kernels that Inductor takes along: `inferix_triton::<op>` for each op that has a Triton form.

`inferix::<op>` is opaque to Inductor: a package that it compiles calls the op by name. The op here has the same schema
and is declared with `torch.library.triton_op`, so that Inductor sees the launch in it, compiles the kernel for the GPU
and puts its code into the package.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor  # noqa: F401  # named in the annotations from which torch reads the schema
from torch.export import ExportedProgram

from .catalog import SPECS
from .launch import TRACED
from .spec import Implementation, KernelSpec

NAMESPACE = "inferix_triton"
FORM = "triton"


def triton_form(spec: KernelSpec) -> Implementation | None:
    """The Triton form of an op; None if it has none."""
    return next((form for form in spec.implementations if form.name == FORM), None)


@cache
def triton_op(spec: KernelSpec) -> torch._ops.OpOverload:
    """The op `inferix_triton::<op>`, which is registered when it is first asked for."""
    form = triton_form(spec)
    assert form is not None, f"{spec.name} has no Triton form"
    run = form.load()

    @wraps(spec.reference)
    def launch(*args: Any) -> None:
        token = TRACED.set(True)
        try:
            run(*args)
        finally:
            TRACED.reset(token)

    torch.library.triton_op(f"{NAMESPACE}::{spec.name}", launch, mutates_args=spec.outputs)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), spec.name).default
    return overload


def take_kernels_along(program: ExportedProgram) -> int:
    """Replace the ops of an exported program that have a Triton form by those that Inductor compiles; their number."""
    count = 0
    for node in program.graph.nodes:
        name = getattr(node.target, "_name", "").partition("::")
        spec = SPECS.get(name[2].partition(".")[0]) if name[0] == "inferix" else None
        if spec is not None and triton_form(spec) is not None:
            node.target = triton_op(spec)
            count += 1
    return count
