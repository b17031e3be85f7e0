"""A model that the compiler has never seen: it traces, fuses what matches, and runs, with no change in `graphs/`."""

from __future__ import annotations

import pytest
import torch
from filled import random_values
from oracles import randomise
from toy import CHANNELS, DIM, KV_HEADS, LAYERS, TEXT, Toy

from inferix.graphs.interpret import run_block
from inferix.graphs.rewrites import chosen, rewritten
from inferix.graphs.trace import trace
from inferix.graphs.types import BlockGraph, GraphShape, Role, Value, When
from inferix.graphs.validate import validate

GRID, FRAMES, PAGES, SEEN = (2, 3), 2, 9, 5
FLOAT = torch.float64
PAIRS = (DIM // 2 - 2 * (DIM // 6), DIM // 6)


def given(name: str, when: When, *size: int, dtype: torch.dtype = FLOAT, owned: bool = False) -> Value:
    return Value(name, Role.INPUT, size, dtype, when, owned=owned)


def toy_block() -> tuple[BlockGraph, Toy]:
    latents = (CHANNELS, 2 * GRID[0], 2 * GRID[1])
    inputs = [
        given("latents", When.PASS, 1, FRAMES, *latents),
        Value.of_literal([700.0] * FRAMES, (1, FRAMES), torch.float32),
        given("text", When.PROMPT, 1, 7, TEXT),
        given("pages", When.BLOCK, 1, FRAMES, dtype=torch.int32, owned=True),
        given("page_table", When.BLOCK, 1, SEEN, dtype=torch.int32),
        given("page_count", When.BLOCK, 1, dtype=torch.int32),
        given("rope_time", When.BLOCK, 1, FRAMES, PAIRS[0], 2),
        given("rope_rows", When.LOAD, GRID[0], PAIRS[1], 2),
        given("rope_columns", When.LOAD, GRID[1], PAIRS[1], 2),
        given("frames", When.BLOCK, 1, FRAMES, dtype=torch.int32),
        given("noise_key", When.BLOCK, 1, dtype=torch.int64),
    ]
    store = (2, PAGES, GRID[0] * GRID[1], KV_HEADS, DIM)
    inputs += [Value(f"kv.{layer}", Role.STATE, store, FLOAT, When.PASS) for layer in range(LAYERS)]
    model = Toy()
    randomise(model)
    model.double().requires_grad_(False)
    names = {inputs[1].name: "timesteps"}
    graph = trace("denoise 0", Named(model, names), inputs, model="model")
    shape = GraphShape(1, FRAMES, latents, GRID[0] * GRID[1], PAGES, SEEN)
    return BlockGraph("toy", "toy", FLOAT, "cpu", shape, (700.0,), (0.8,), (graph,), None, None), model


class Named(torch.nn.Module):
    """Calls one value by another name."""

    def __init__(self, model: torch.nn.Module, names: dict[str, str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.model({self.names.get(name, name): tensor for name, tensor in values.items()})


@torch.no_grad()
def test_a_model_that_is_not_wan_is_traced_fused_and_run() -> None:
    block, model = toy_block()
    validate(block)
    values = random_values(block, dict(model.named_parameters()), GRID, DIM)
    own = {name: tensor.clone() for name, tensor in values.items()}
    expected = model(own | {"timesteps": torch.full((1, FRAMES), 700.0)})
    actual = rewritten(block, chosen())
    validate(actual)
    for graph in (block, actual):
        results = run_block(graph, {name: tensor.clone() for name, tensor in values.items()})
        assert (results["latents"] - expected["latents"]).abs().max() < 1e-9
        for layer in range(LAYERS):
            assert (results[f"kv.{layer}"] - own[f"kv.{layer}"]).abs().max() < 1e-9
    places = {change.rewrite: change.places for change in actual.changes}
    assert places == {
        "dead-work": 0, "patch-embedding": 0, "merge-qkv": 2, "qk-norm-rope": 2, "rms-norm": 0, "cross-attention": 0,
        "gated-norm": 0, "adaln": 4, "denoise-step": 1, "gelu": 2, "swiglu": 0,
        "hoist-prompt": 1, "hoist-frames": 0, "wide-linear": 0, "fold": 4,
    }  # fmt: skip


def test_a_model_that_branches_on_values_is_refused_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(torch.nn.Module):
        def forward(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            x = values["x"]
            return {"y": x * 2 if x.sum() > 0 else x}

    with pytest.raises(ValueError, match=r"branching .*test_toy.py:\d+ .*x.sum\(\) > 0"):
        trace("branching", Branching(), [given("x", When.PASS, 3)])
    assert capfd.readouterr() == ("", "")


def test_writes_in_place_and_into_inputs_are_refused() -> None:
    class InPlace(torch.nn.Module):
        def forward(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"y": (values["x"] * 2).add_(1)}

    with pytest.raises(ValueError, match=r"aten::add_ .*test_toy.py:\d+"):
        trace("in place", InPlace(), [given("x", When.PASS, 3)])


def test_an_op_without_a_fake_kernel_is_named() -> None:
    @torch.library.custom_op("toy::unknown", mutates_args=())
    def unknown(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    class Unknown(torch.nn.Module):
        def forward(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"y": unknown(values["x"])}

    with pytest.raises(ValueError, match=r"odd: .*toy::unknown.*register_fake"):
        trace("odd", Unknown(), [given("x", When.PASS, 3)])
