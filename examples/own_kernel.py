"""Define an op: its plain reference, its spec, and a check of a faster form against the reference.

    python examples/own_kernel.py

A faster form of an op that Inferix has is a function alone: see docs/kernels.md. With an entry point `inferix.ops` in a
package, the same spec is benched, costed and drawn like the ops of Inferix.
"""

import torch
from torch import Tensor

from inferix.kernels import using
from inferix.kernels.op import Op
from inferix.kernels.spec import Arg, Case, KernelSpec
from inferix.kernels.verify import verify


def gated_add(x: Tensor, gate: Tensor, residual: Tensor, out: Tensor) -> None:
    """The definition, in float32 or better: out = residual + gate * x. x, residual, out: [rows, dim]; gate: [dim]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out.copy_(residual.to(wide) + gate.to(wide) * x.to(wide))


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(case["rows"], case["dim"], generator=generator).to(device, dtype) for _ in range(2))
    return {"x": x, "gate": x[0].clone(), "residual": residual, "out": torch.full_like(x, float("nan"))}


FLOATS = (torch.float32, torch.float64, torch.bfloat16)
SPEC = KernelSpec(
    name="example_gated_add",
    reference=gated_add,
    outputs=("out",),
    like="x",
    args={
        "x": Arg("rows dim", FLOATS),
        "gate": Arg("dim", ("x",)),
        "residual": Arg("rows dim", ("x",)),
        "out": Arg("rows dim", ("x",)),
    },
    family="norm and gate",
    label="gated add",
    flops="2 * rows * dim",
    implementations=(),  # Implementation("triton", "my_package.gpu:gated_add", (90,)) where there is a Triton kernel
    make_inputs=make_inputs,
    test_cases=(Case("odd sizes", {"rows": 7, "dim": 24}), Case("one row", {"rows": 1, "dim": 16})),
    bench_cases=(),
    tolerance={torch.float32: 1e-6},
)
OP = Op(SPEC)  # torch.ops.inferix.example_gated_add: opaque to torch.export, checked at each call



def fast(x: Tensor, gate: Tensor, residual: Tensor, out: Tensor) -> None:
    """The candidate for a faster form."""
    torch.addcmul(residual, gate, x, out=out)


SPEC.register("addcmul", fast)
print(verify(SPEC, "addcmul", torch.float32))
inputs = make_inputs(SPEC.test_cases[0], torch.float32, "cpu", seed=0)
with using(example_gated_add="addcmul"):
    OP(*inputs.values())
try:
    OP(inputs["x"], inputs["gate"][:3], inputs["residual"], inputs["out"])
except ValueError as error:
    print(f"refused: {error}")
