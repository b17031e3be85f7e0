"""Matches and refusals of each pattern, on small functions; preconditions that no model meets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.graphs.cost import name_of
from inferix.graphs.interpret import run_pass
from inferix.graphs.rewrites.adaln import adaln
from inferix.graphs.rewrites.base import cleaned
from inferix.graphs.rewrites.gated_norm import gated_norm, narrowest_first
from inferix.graphs.rewrites.gelu import gelu
from inferix.graphs.rewrites.merge_qkv import merge_qkv
from inferix.graphs.rewrites.rms_norm import rms_norm
from inferix.graphs.rewrites.swiglu import swiglu
from inferix.graphs.rewrites.wide_linear import wide_linear
from inferix.graphs.trace import trace
from inferix.graphs.types import PassGraph, Role, Value, When
from inferix.graphs.validate import validate_pass

B, T, FRAMES, D = 2, 6, 3, 8
SHAPES = {
    "x": (B, T, D), "u": (B, T, D), "shift": (B, FRAMES, D), "scale": (B, FRAMES, D), "gate": (B, FRAMES, D),
    "w": (D,), "b": (D,), "wide": (5, D), "bias": (5,), "c": (D,), "d": (D,),
}  # fmt: skip


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        actual = self.function(**values)
        return {str(at): part for at, part in enumerate(actual if isinstance(actual, tuple) else (actual,))}


def traced(
    function: Callable[..., Tensor | tuple[Tensor, ...]], dtype: torch.dtype = torch.float64, wide: tuple[str, ...] = ()
) -> PassGraph:
    """wide: inputs in float32."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = [
        Value(name, Role.INPUT, SHAPES[name], torch.float32 if name in wide else dtype, When.PASS) for name in names
    ]
    return trace("small", Function(function), values)


def rewritten(
    change: Callable[[PassGraph], int],
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    dtype: torch.dtype = torch.float64,
    wide: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    """Places, and the calls after it; the result is held against the function."""
    graph = traced(function, dtype, wide)
    places = change(graph)
    actual = cleaned(graph)
    validate_pass(actual)
    generator = torch.Generator().manual_seed(3)
    given = {
        value.name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for value in graph.inputs.values()
    }
    expected = function(**given)
    parts = expected if isinstance(expected, tuple) else (expected,)
    for part, result in zip(parts, run_pass(actual, given).values(), strict=True):
        assert part.dtype == result.dtype
        assert (part - result).abs().max() <= (1e-12 if dtype == torch.float64 else 0.02)
    return places, [name_of(node.target) for node in actual]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Frames by repetition's opposite: views; factors the other way round."""
    y = F.layer_norm(x, (D,), eps=1e-5).view(B, FRAMES, T // FRAMES, D)
    return (shift[:, :, None] + (scale.unsqueeze(2) + 1) * y).reshape(B, T, D)


def test_norms_and_sums_are_found_in_several_ways_of_writing() -> None:
    def gated(x: Tensor, u: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        total = (gate[:, :, None] * u.reshape(B, FRAMES, -1, D)).reshape(B, T, D) + x
        return modulated(total, shift, scale), total

    def plain(x: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + u
        return F.layer_norm(total, (D,), w, b), total * 2

    for function, views in ((gated, 0), (plain, 0)):
        places, calls = rewritten(adaln, function)
        assert places == 1
        assert calls.count("adaln") == 1 and "layer_norm" not in calls
        assert [name for name in calls if name not in ("empty", "view", "adaln", "mul")] == [], views


def test_a_sum_that_is_used_before_its_norm_is_left_alone() -> None:
    def early(x: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + u
        doubled = total * 2
        return F.layer_norm(total, (D,), w, b), doubled

    places, calls = rewritten(adaln, early)
    assert places == 1 and "add" in calls


def test_a_norm_that_something_else_uses_too_is_left_alone() -> None:
    def shared(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = F.layer_norm(x, (D,), eps=1e-5)
        frames = y.view(B, FRAMES, -1, D)
        return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2), y.square()

    assert rewritten(adaln, shared)[0] == 0


def test_what_only_looks_like_modulation_is_left_alone() -> None:
    def by_token(x: Tensor, u: Tensor, shift: Tensor) -> Tensor:
        """Scale per token, not per frame."""
        y = F.layer_norm(x, (D,), eps=1e-5)
        return y * (1 + u) + shift.repeat_interleave(T // FRAMES, 1)

    def other_norm(x: Tensor, w: Tensor) -> Tensor:
        """A sum where an RMS norm has a mean."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * w

    assert rewritten(adaln, by_token)[0] == 0
    assert rewritten(rms_norm, other_norm)[0] == 0


def test_rms_norms_in_the_ways_of_wan_and_of_torch() -> None:
    def wan(x: Tensor, w: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype) * w

    def torchs(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), w, 1e-3)

    for function in (wan, torchs):
        places, calls = rewritten(rms_norm, function)
        assert places == 1 and [name for name in calls if name not in ("view", "empty")] == ["rms_norm"]


def gated(x: Tensor, u: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The norm of a gated update, added; what is wide already stays so."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    update = (gate.to(dtype)[:, :, None] * u.to(dtype).view(B, FRAMES, -1, D)).flatten(1, 2)
    return (x.to(dtype) + F.layer_norm(update, (D,), w.to(dtype) + 1, b.to(dtype), 1e-4)).to(x.dtype)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float64, ()), (torch.bfloat16, ()), (torch.bfloat16, ("u", "w", "b"))], ids=str
)
def test_norms_of_gated_updates_take_in_the_norm_after_them(dtype: torch.dtype, wide: tuple[str, ...]) -> None:
    def both(x: Tensor, u: Tensor, gate: Tensor, w: Tensor, b: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        total = gated(x, u, gate, w, b)
        return total, F.layer_norm(total, (D,), shift[0, 0].to(x.dtype), shift[0, 1].to(x.dtype))

    def placed(x: Tensor, u: Tensor, gate: Tensor, w: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        total = gated(x, u, gate, w, b)
        return total, F.layer_norm(total, (D,), c, d, 1e-3)

    for function, norms in ((both, 1), (placed, 0)):  # weights that are computed may come too late
        places, calls = rewritten(gated_norm, function, dtype, wide)
        assert places == 1 and calls.count("layer_norm") == norms and "gated_norm" in calls


def test_the_order_of_dtypes_does_not_decide_what_a_gated_norm_takes_in() -> None:
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    orders = [narrowest_first(order) for order in permutations(dtypes)]
    assert set(map(tuple, orders)) == {(torch.bfloat16, torch.float16, torch.float32, torch.float64)}


def test_what_only_looks_like_a_gated_norm_is_left_alone() -> None:
    def by_token(x: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x + F.layer_norm(u * x, (D,), w, b)

    def used(x: Tensor, u: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        update = (u.view(B, FRAMES, -1, D) * gate[:, :, None]).flatten(1, 2)
        return x + F.layer_norm(update, (D,), w, b), update

    assert rewritten(gated_norm, by_token)[0] == 0
    assert rewritten(gated_norm, used)[0] == 0


def test_the_halves_of_a_projection_are_joined_by_swiglu_in_their_order() -> None:
    def halves(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def turned(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return value * F.silu(gate)

    def second(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def shared(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value, F.silu(gate)

    def of_two(x: Tensor, u: Tensor) -> Tensor:
        return F.silu(x.chunk(2, dim=-1)[0]) * u.chunk(2, dim=-1)[1]

    for function in (halves, turned):
        places, calls = rewritten(swiglu, function)
        assert places == 1 and "silu" not in calls
    assert rewritten(swiglu, halves, torch.bfloat16)[0] == 1
    for function in (second, of_two):
        assert rewritten(swiglu, function)[0] == 0
    assert rewritten(swiglu, shared)[0] <= 1


def test_operands_in_half_precision_are_not_converted_for_a_wide_result() -> None:
    def converted(x: Tensor, wide: Tensor) -> Tensor:
        return F.linear(x.float(), wide.float())

    def added(x: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x.float(), wide.float(), bias.float())

    places, calls = rewritten(wide_linear, converted, torch.bfloat16)
    assert places == 1 and not {"linear", "_to_copy"} & set(calls)
    assert rewritten(wide_linear, added, torch.bfloat16)[0] == 0
    assert rewritten(wide_linear, converted, torch.bfloat16, ("x",))[0] == 0
    assert rewritten(wide_linear, lambda x, wide: F.linear(x, wide))[0] == 0


def test_only_the_tanh_form_of_gelu_is_an_epilogue_and_only_of_its_own_layer() -> None:
    def tanh(x: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, wide, bias), approximate="tanh")

    def exact(x: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, wide, bias))

    def shared(x: Tensor, wide: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, wide, bias)
        return F.gelu(y, approximate="tanh"), y

    assert rewritten(gelu, tanh)[0] == 1
    assert rewritten(gelu, exact)[0] == 0
    assert rewritten(gelu, shared)[0] == 0


def test_layers_of_one_input_that_meet_in_no_attention_stay_apart() -> None:
    def apart(x: Tensor, wide: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, wide, bias), F.linear(x, wide * 2, bias)

    assert rewritten(merge_qkv, apart)[0] == 0
