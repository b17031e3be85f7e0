"""A lowered graph gives what the function gives, writes what it writes, and makes no tensor on the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import Watch, bound, result, traced
from torch import Tensor

from inferix.errors import InferixError
from inferix.graphs.program import Form


@torch.library.custom_op("inferix_test::append", mutates_args=("pages",))
def append(x: Tensor, pages: Tensor, index: Tensor) -> None:
    pages[index] = x


@torch.library.custom_op("inferix_test::no_out", mutates_args=())
def no_out(x: Tensor) -> Tensor:
    return x + 1


append.register_fake(lambda x, pages, index: None)
no_out.register_fake(lambda x: torch.empty_like(x))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(x: Tensor, weight: Tensor, bias: Tensor, pages: Tensor, index: Tensor) -> Tensor:
    """Views of every kind, a write that nobody uses, composite ops, and an op without an `out=` form."""
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, 2, -1)).unbind(2)
    append(k[:, 0], pages, index)
    seen = pages.unsqueeze(0)[:, :2]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), seen.transpose(1, 2), v[:, :2].transpose(1, 2))
    out = F.layer_norm(out.transpose(1, 2).flatten(2), (8,))
    first, second = torch.cat((out, out.flip(1)), -1).chunk(2, -1)
    return F.gelu(first.permute(0, 2, 1).reshape(1, 6, 4).contiguous()) * second.mT.reshape(1, 6, 4).to(torch.float64)


ARGS = (draw(1, 3, 8), draw(24, 8, seed=1), draw(24, seed=2), draw(4, 2, 4, seed=3), torch.tensor([1]))


def test_equal_to_the_function_with_its_writes_and_no_view_left() -> None:
    program = traced(block, *ARGS, roles="iiisi")
    args = [arg.clone() for arg in ARGS]
    launches = bound(program, *args)
    launches.run()
    expected = [arg.clone() for arg in ARGS]
    assert torch.equal(result(launches), block(*expected))
    assert torch.equal(args[3], expected[3])
    assert not torch.equal(args[3], ARGS[3])
    assert all(call.writes for call in program.calls)
    assert {call.op.name() for call in program.calls if call.allocates} == {
        "aten::scaled_dot_product_attention", "aten::native_layer_norm.out", "aten::flip.out",
    }  # fmt: skip
    assert "* aten::scaled_dot_product_attention(" in program.text()


def test_a_second_run_makes_no_tensor_and_moves_none() -> None:
    launches = bound(traced(block, *ARGS, roles="iiisi"), *(arg.clone() for arg in ARGS))
    launches.run()
    first, places = result(launches).clone(), [out.data_ptr() for out in launches.outputs.values()]
    with Watch(list(launches.flat.values())) as watch:
        launches.run()
    assert len(watch.made) == 1 and "scaled_dot_product" in watch.made[0]
    assert [out.data_ptr() for out in launches.outputs.values()] == places
    assert torch.equal(result(launches), first)


def test_memory_that_an_op_fills_is_no_call() -> None:
    def run(x: Tensor, index: Tensor) -> Tensor:
        pages = torch.empty(1, 4, dtype=torch.float64)
        append(x, pages, index)
        return pages * 2

    program = traced(run, draw(1, 4), torch.tensor([0]))
    assert [call.form for call in program.calls] == [Form.WRITES, Form.OUT]
    launches = bound(program, draw(1, 4), torch.tensor([0]))
    launches.run()
    assert torch.equal(result(launches), draw(1, 4) * 2)


def test_what_cannot_be_lowered_is_named() -> None:
    with pytest.raises(InferixError, match="inferix_test::no_out"):
        traced(lambda x: no_out(x), draw(2))
    with pytest.raises(InferixError, match="nonzero"):
        traced(lambda x: x.nonzero() * 1, draw(2))


def test_a_tensor_that_does_not_fit_is_refused() -> None:
    program = traced(lambda x: x + 1, draw(2, 3))
    with pytest.raises(ValueError, match=r"args_0 is .*\(3, 2\).*; expected"):
        bound(program, draw(3, 2))
