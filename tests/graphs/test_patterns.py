"""Matches and refusals of each pattern, on small functions; preconditions that no model meets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.graphs.cost import name_of
from inferix.graphs.interpret import run_pass
from inferix.graphs.rewrites.adaln import adaln
from inferix.graphs.rewrites.base import cleaned
from inferix.graphs.rewrites.gelu import gelu
from inferix.graphs.rewrites.merge_qkv import merge_qkv
from inferix.graphs.rewrites.rms_norm import rms_norm
from inferix.graphs.trace import trace
from inferix.graphs.types import PassGraph, Role, Value, When
from inferix.graphs.validate import validate_pass

B, T, FRAMES, D = 2, 6, 3, 8
SHAPES = {
    "x": (B, T, D), "u": (B, T, D), "shift": (B, FRAMES, D), "scale": (B, FRAMES, D), "gate": (B, FRAMES, D),
    "w": (D,), "b": (D,), "wide": (5, D), "bias": (5,),
}  # fmt: skip


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        actual = self.function(**values)
        return {str(at): part for at, part in enumerate(actual if isinstance(actual, tuple) else (actual,))}


def traced(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> PassGraph:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = [Value(name, Role.INPUT, SHAPES[name], torch.float64, When.PASS) for name in names]
    return trace("small", Function(function), values)


def rewritten(
    change: Callable[[PassGraph], int], function: Callable[..., Tensor | tuple[Tensor, ...]]
) -> tuple[int, list[str]]:
    """Places, and the calls after it; the result is held against the function."""
    graph = traced(function)
    places = change(graph)
    actual = cleaned(graph)
    validate_pass(actual)
    generator = torch.Generator().manual_seed(3)
    given = {
        value.name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for value in graph.inputs.values()
    }
    expected = function(**given)
    parts = expected if isinstance(expected, tuple) else (expected,)
    for part, result in zip(parts, run_pass(actual, given).values(), strict=True):
        assert (part - result).abs().max() < 1e-12
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
