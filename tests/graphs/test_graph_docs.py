"""docs/graph.md and its picture are what the command gives; figures of Wan 1.3B against the model's published sizes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch

from inferix.cli.graph import format_plans
from inferix.graphs.cost import PassCost, name_of
from inferix.graphs.lowered import lower_block
from inferix.graphs.rewrites import REWRITES, chosen, rewritten
from inferix.graphs.show.outline import outline
from inferix.graphs.show.svg import svg
from inferix.graphs.show.text import text
from inferix.graphs.types import BlockGraph, Role
from inferix.models.registry import MODELS, PRESETS
from inferix.runtime.programs.block_graph import BlockGraphBuilder

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "docs/graph.md: inferix graph --model wan-1.3b --preset self-forcing --svg docs/graph.svg"


@cache
def traced() -> BlockGraph:
    return BlockGraphBuilder(MODELS["wan-1.3b"], PRESETS["self-forcing"], dtype=torch.bfloat16).build()


@cache
def done() -> BlockGraph:
    return rewritten(traced(), chosen())


def test_text_and_picture_are_those_of_the_command() -> None:
    page = (DOCS / "graph.md").read_text("utf-8")
    blocks = re.findall(r"```\n(.*?)\n```", page, re.DOTALL)
    assert text(done()) in blocks, AGAIN
    assert "\n\n".join(format_plans(lower_block(done()))) in blocks, AGAIN.replace("--svg docs/graph.svg", "--plan")
    assert (DOCS / "graph.svg").read_text("utf-8") == svg(done()), AGAIN
    assert all(f"| `{name}`" in page for name in REWRITES)


def test_figures_of_wan() -> None:
    """40.4 TFLOP a pass at a window of 21 frames, 0.14 TFLOP of a prompt: operations by the formula of Wan's sizes."""
    spec, tokens, seen = MODELS["wan-1.3b"], 3 * 1560, 21 * 1560
    dim, wide, rows = spec.dim, spec.ffn_dim, spec.text_len
    layer = 2 * tokens * (6 * dim**2 + 2 * dim * wide) + 4 * tokens * seen * dim + 4 * tokens * rows * dim
    block = done()
    for graph in block.passes[:4]:
        total = PassCost(graph).total.flops
        assert abs(total / (spec.num_layers * layer) - 1) < 2e-3
        assert f"{total / 1e12:.1f}" == "40.4"
    assert block.prompt is not None and block.fold is not None
    prompt = PassCost(block.prompt)
    keys = sum(prompt[node].flops for node in block.prompt if "cross_attn" in node.meta["module"])
    assert abs(keys / (spec.num_layers * 4 * rows * dim**2) - 1) < 1e-2
    commit = block.named("commit")
    whole, last = outline(PassCost(block.passes[0]))[3], outline(PassCost(commit))[-1]
    assert whole.layers == tuple(f"blocks.{layer}" for layer in range(1, 30)) and len(whole.launches) == 13
    assert [launch.op for launch in last.launches] == ["adaln", "linear", "qk_norm_rope_append"]
    assert not any(value.name.startswith("time_") for value in commit.named(Role.WEIGHT).values())
    assert {name_of(node.target) for node in block.passes[0]} == {
        "view", "permute", "clone", "empty", "select", "adaln", "linear", "linear_gelu", "rms_norm",
        "qk_norm_rope_append", "block_attention", "denoise_step",
    }  # fmt: skip
    before, after = (sum(PassCost(graph).total.launches for graph in made.passes) for made in (traced(), block))
    assert after < before / 4
