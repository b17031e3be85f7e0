"""The block graph of each preset: its interpretation equals the model's own forward and the sampler's own step."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from filled import random_values
from oracles import TINY, randomise

from inferix.graphs.interpret import run_block
from inferix.graphs.rewrites import REWRITES, chosen, rewritten
from inferix.graphs.types import BlockGraph
from inferix.graphs.validate import validate
from inferix.models.wan.transformer import WanTransformer
from inferix.runtime.block_graph import Builder, ModelPass, SolverStep
from inferix.runtime.presets import PRESETS, make_preset

SPEC = dataclasses.replace(TINY, dim=128, actions=())
SIZE = (48, 32)
GRID = (2, 3)
STEPS = {"causal-diffusion": {"num_steps": 4}}


def spec_for(preset: str):
    return dataclasses.replace(SPEC, actions=("stay", "go")) if preset == "tinyworld" else SPEC


@cache
def built(preset: str) -> Builder:
    return Builder(spec_for(preset), make_preset(preset, **STEPS.get(preset, {})), SIZE, torch.float64)


@cache
def block_of(preset: str) -> BlockGraph:
    return built(preset).build()


@cache
def model_of(preset: str) -> WanTransformer:
    model = WanTransformer(spec_for(preset))
    randomise(model)
    return model.double().eval().requires_grad_(False)


@cache
def values_of(preset: str) -> dict[str, torch.Tensor]:
    return random_values(block_of(preset), dict(model_of(preset).named_parameters()), GRID, SPEC.head_dim)


@cache
@torch.no_grad()
def eager(preset: str) -> dict[str, torch.Tensor]:
    """All values after the block, from the modules themselves, with no graph."""
    builder = built(preset)
    values = {name: tensor.clone() for name, tensor in values_of(preset).items()}
    for planned in builder.planned:
        values["timesteps"] = torch.tensor([planned.run.timesteps])
        module = ModelPass(model_of(preset), builder.layout(planned), builder.guidance)
        values |= module(values)
        if planned.steps:
            step = SolverStep(builder.sampler, planned.steps, builder.preset.num_frame_per_block, planned.lead)
            values |= step(values)
    return values


def differences(preset: str, found: dict[str, torch.Tensor], block: BlockGraph) -> dict[str, float]:
    wanted = eager(preset)
    names = (*block.results, *(f"kv.{layer}" for layer in range(SPEC.num_layers)))
    return {name: float((found[name] - wanted[name]).abs().max()) for name in names}


def interpreted(preset: str, block: BlockGraph) -> dict[str, torch.Tensor]:
    return run_block(block, {name: tensor.clone() for name, tensor in values_of(preset).items()})


@pytest.mark.parametrize("preset", PRESETS)
def test_the_traced_block_is_the_model(preset: str) -> None:
    block = block_of(preset)
    validate(block)
    assert max(differences(preset, interpreted(preset, block), block).values()) < 1e-12


@pytest.mark.parametrize("preset", PRESETS)
def test_rewritten_blocks_compute_the_same(preset: str) -> None:
    """Each exact rewrite alone, with those it needs, and all together."""
    block = block_of(preset)
    for names in [*([*REWRITES[name].needs, name] for name in chosen()), chosen()]:
        found = rewritten(block, names)
        validate(found)
        worst = max(differences(preset, interpreted(preset, found), found).values())
        assert worst < 1e-9, f"{names}: {worst}"
    assert all(change.places > 0 for change in found.changes), found.changes
