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

LAYERS = 3  # scratch is that of one layer, so it does not grow with their number
SPEC = dataclasses.replace(MODELS["wan-1.3b"], num_layers=LAYERS)
FRAMES = 3
LATENT = (FRAMES, SPEC.out_channels, *SPEC.latent_size(SPEC.default_size))
HIDDEN = FRAMES * SPEC.tokens_per_frame(SPEC.default_size) * SPEC.ffn_dim * torch.bfloat16.itemsize


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    graphs = GraphBuilder(SPEC, make_preset("self-forcing"), "reference", torch.bfloat16, "cpu", tuple(chosen()))
    return lower_block(graphs(GraphKey(True, ((1, FRAMES),), LATENT, False, width=32, pages=24)))


def test_scratch_is_at_most_1_3_times_what_is_alive_together(lowered: Lowered) -> None:
    plan = lowered.body.plan
    assert plan.size <= 1.3 * plan.live
    alive = plan.at(plan.peak)
    assert alive[0].size == HIDDEN  # the widest activation of a feed-forward network holds the peak
    assert plan.size < 1.5 * HIDDEN
    assert f"arena {plan.size} bytes" in plan.text(lowered.body.program)


def test_what_is_launched_and_what_makes_torch_allocate(lowered: Lowered) -> None:
    """Five passes, each layer's kernels once, the last layer of the commit pass without what nobody reads."""
    calls = Counter(call.op._schema.name for call in lowered.body.program.calls)
    layers = 5 * LAYERS
    assert calls["inferix::block_attention"] == 2 * (layers - 1)  # over the window, and over the prompt
    assert calls["inferix::qk_norm_rope_append"] == layers
    assert calls["inferix::denoise_step"] == 4
    assert calls["inferix::linear_gelu"] == layers - 1
    allocating = {call.op._schema.name for call in lowered.body.program.calls if call.allocates}
    assert allocating == set()
    assert [section.name for section in lowered.body.program.sections][-1] == "commit"
