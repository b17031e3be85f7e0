"""The plan of a real model's block, from shapes only: its scratch, its peak, and what torch allocates."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from inferix.graphs.lowered import Lowered, lower_block
from inferix.graphs.rewrites import chosen
from inferix.models.registry import MODELS, make_preset
from inferix.runtime.programs.graph_builder import GraphBuilder, GraphKey

SPEC = MODELS["wan-1.3b"]
FRAMES = 3
LATENT = (FRAMES, SPEC.out_channels, *SPEC.latent_size(SPEC.default_size))
HIDDEN = FRAMES * SPEC.tokens_per_frame(SPEC.default_size) * SPEC.ffn_dim * torch.bfloat16.itemsize


@pytest.fixture(
    scope="module",
    params=[(2, [1000, 500]), pytest.param((3, [1000, 750, 500, 250]), marks=pytest.mark.slow)],
    ids=["small", "whole"],
)
def planned(request: pytest.FixtureRequest) -> tuple[Lowered, int, int]:
    """The program, its layers and its denoising steps; scratch is that of one layer of one step."""
    layers, steps = request.param
    spec, preset = dataclasses.replace(SPEC, num_layers=layers), make_preset("self-forcing", denoising_step_list=steps)
    graphs = GraphBuilder(spec, preset, "reference", torch.bfloat16, "cpu", tuple(chosen()))
    lowered = lower_block(graphs(GraphKey(True, ((1, FRAMES),), LATENT, False, width=32, pages=24)))
    return lowered, layers, len(steps)


def test_scratch_is_at_most_1_3_times_what_is_alive_together(planned: tuple[Lowered, int, int]) -> None:
    lowered, _, _ = planned
    plan = lowered.body.plan
    assert plan.size <= 1.3 * plan.live
    alive = plan.at(plan.peak)
    assert alive[0].size == HIDDEN  # the widest activation of a feed-forward network holds the peak
    assert plan.size < 1.5 * HIDDEN
    assert f"arena {plan.size} bytes" in plan.text(lowered.body.program)


def test_what_is_launched_and_what_makes_torch_allocate(planned: tuple[Lowered, int, int]) -> None:
    """Each layer's kernels once a pass, the last layer of the commit pass without what nobody reads."""
    lowered, layers, steps = planned
    calls = Counter(call.op._schema.name for call in lowered.body.program.calls)
    runs = (steps + 1) * layers
    assert calls["inferix::block_attention"] == 2 * (runs - 1)  # over the window, and over the prompt
    assert calls["inferix::qk_norm_rope_append"] == runs
    assert calls["inferix::denoise_step"] == steps
    assert calls["inferix::linear_gelu"] == runs - 1
    allocating = {call.op._schema.name for call in lowered.body.program.calls if call.allocates}
    assert allocating == set()
    assert [section.name for section in lowered.body.program.sections][-1] == "commit"
