"""The cost model on lowered calls, and an op that is known only by its spec: cost, colour, label, check and gate."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from programs import traced
from torch import Tensor

from inferix.bench import compile_gate
from inferix.errors import InferixError, UsageError
from inferix.graphs.cost import PassCost, call_cost, family
from inferix.graphs.rewrites import chosen, rewritten
from inferix.graphs.show.outline import outline
from inferix.graphs.show.svg import COLOURS, svg
from inferix.graphs.trace import trace
from inferix.graphs.types import BlockGraph, GraphShape, Role, Value, When
from inferix.kernels import catalog
from inferix.kernels.op import Op
from inferix.kernels.spec import FAMILIES, Arg, Case, Cost, Implementation, KernelSpec


def scale_rows(x: Tensor, factor: Tensor, out: Tensor, power: int) -> None:
    out.copy_(x * factor[:, None] ** power)


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, object]:
    x = torch.ones(case["rows"], case["dim"], dtype=dtype, device=device)
    return {"x": x, "factor": x[:, 0].contiguous(), "out": torch.empty_like(x), "power": 2}


TOY = KernelSpec(
    name="toy_scale_rows",
    reference=scale_rows,
    outputs=("out",),
    like="x",
    args={"x": Arg("rows dim", (torch.float32,)), "factor": Arg("rows", ("x",)), "out": Arg("rows dim", ("x",))},
    rules=("dim % 2 == 0",),
    family="solver",
    label="toy, rows",
    flops="3 * rows * dim * power",
    detail=lambda given: "scaled" if "factor" in given else "",
    implementations=(Implementation("triton", "inferix_toy_gpu:launch", (90,)),),
    make_inputs=make_inputs,
    test_cases=(Case("one", {"rows": 2, "dim": 4}),),
    bench_cases=(),
    tolerance={torch.float32: 0.0},
)
OP = Op(TOY)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> KernelSpec:
    """The toy op with its line in the catalog, and a module in the place of its GPU form."""
    gpu = ModuleType("inferix_toy_gpu")
    gpu.launch = scale_rows
    gpu.compile_cases = lambda capability: {"float32": TOY.make_inputs(TOY.test_cases[0], torch.float32, "cpu", 0)}
    monkeypatch.setitem(sys.modules, "inferix_toy_gpu", gpu)
    monkeypatch.setitem(catalog.SPECS, TOY.name, TOY)
    return TOY


def doubled(x: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(x)
    OP(x, factor, out, 2)
    return out + 1


class Model(torch.nn.Module):
    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": doubled(values["x"], values["factor"])}


def block_of_toy() -> BlockGraph:
    inputs = [
        Value("x", Role.INPUT, (6, 4), torch.float32, When.PASS),
        Value("factor", Role.INPUT, (6,), torch.float32, When.PASS),
    ]
    graph = trace("denoise 0", Model(), inputs)
    shape = GraphShape(1, 1, (1, 2, 3), 6, 0, 0)
    return BlockGraph("toy", "none", torch.float32, "cpu", shape, (), (), (graph,), None, None)


def test_an_op_with_a_spec_has_cost_colour_label_and_gate(toy: KernelSpec) -> None:
    block = rewritten(block_of_toy(), chosen())
    costs = PassCost(block.passes[0])
    assert costs.costs == (Cost(3 * 6 * 4 * 2, 4 * (24 + 6 + 24), 1), Cost(24, 4 * 48, 1))
    assert costs.by_family() == {"solver": costs.costs[0], "elementwise": costs.costs[1]}
    launch = outline(costs)[0].launches[0]
    assert (launch.op, launch.label, launch.what, launch.shape) == (toy.name, "toy, rows", "scaled", (6, 4))
    picture = svg(block)
    assert ">toy, rows</text>" in picture and f'stroke="{COLOURS["solver"]}"' in picture
    rows = [name for name, _, _ in compile_gate.cases_for(90, [toy.name])]
    assert rows == ["toy_scale_rows, float32, sm_90"]
    row = {"architecture": 90, "shared": 0, "stack": 8, "matrix": 0, "tf32": False}
    assert any("stack" in line for line in compile_gate.problems({rows[0]: row}))


def test_the_spec_alone_runs_and_checks_the_op() -> None:
    x, factor = torch.arange(8.0).view(2, 4), torch.tensor([2.0, 3.0])
    assert torch.equal(doubled(x, factor), x * factor[:, None] ** 2 + 1)
    torch.library.opcheck(OP.overload, (x, factor, torch.empty_like(x), 2))
    for args, words in (
        ((x, torch.ones(3), x, 2), ("factor", "(3,)", "(2,)")),
        ((x[:, :3].contiguous(), factor, x, 2), ("dim is 3",)),
        ((x.double(), factor, x, 2), ("dtype of x", "torch.float64")),
        ((x[0], factor, x, 2), ("shape of x", "(4,)")),
        ((torch.empty(0, 4), factor, x, 2), ("[0, 4]",)),
    ):
        with pytest.raises(UsageError, match="toy_scale_rows: ") as caught:
            OP(*args)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_op_without_a_spec_is_refused() -> None:
    """The toy op, without its line in the catalog; and an op of torch that no table has."""
    with pytest.raises(InferixError, match="toy_scale_rows"):
        PassCost(block_of_toy().passes[0])
    program = traced(lambda x: torch.linalg.inv(x), torch.eye(3))
    with pytest.raises(InferixError, match="linalg_inv"):
        [call_cost(call) for call in program.calls]


def test_a_copy_computes_nothing_and_moves_both_sides() -> None:
    program = traced(lambda x: torch.cat((x, x.mT.contiguous())).mean(0), torch.zeros(4, 4))
    costs = {call.op._schema.name: (family(call), call_cost(call)) for call in program.calls}
    assert costs["aten::copy_"] == ("copy", Cost(0, 4 * 32, 1))
    assert costs["aten::cat"] == ("copy", Cost(0, 4 * (32 + 32), 1))
    assert costs["aten::mean"] == ("elementwise", Cost(32, 4 * (32 + 4), 1))


@pytest.mark.parametrize("spec", [*catalog.SPECS.values(), *catalog.PLAIN.values()], ids=lambda spec: spec.name)
def test_every_op_names_its_kind_of_work_and_its_tensors(spec) -> None:
    assert spec.family in FAMILIES and spec.label
    tensors = {name for name, kind in spec.reference.__annotations__.items() if str(kind).startswith("Tensor")}
    assert tensors == set(spec.args)


@pytest.mark.parametrize("spec", catalog.SPECS.values(), ids=lambda spec: spec.name)
def test_costs_from_fake_tensors_are_those_of_real_ones(spec: KernelSpec) -> None:
    for case in spec.test_cases:
        real = spec.cost(spec.make_inputs(case, torch.float32, "cpu", 0))
        with torch._subclasses.FakeTensorMode():
            fake = spec.cost(spec.make_inputs(case, torch.float32, "cpu", 0))
        assert real == fake and real.flops > 0 and real.nbytes > 0
