"""docs/graph.md and its picture are what the command gives; figures of Wan 1.3B against the model's published sizes."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
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
FEW = replace(MODELS["wan-1.3b"], num_layers=4)  # layers are alike: fewer show the same lines


@cache
def traced(layers: int) -> BlockGraph:
    spec = replace(MODELS["wan-1.3b"], num_layers=layers)
    return BlockGraphBuilder(spec, PRESETS["self-forcing"], dtype=torch.bfloat16).build()


@cache
def done(layers: int) -> BlockGraph:
    return rewritten(traced(layers), chosen())


def code_blocks() -> list[str]:
    return re.findall(r"```\n(.*?)\n```", (DOCS / "graph.md").read_text("utf-8"), re.DOTALL)


def without_numbers(lines: str) -> str:
    return re.sub(r"[ -]*\d[\d.]*(?: [kMGT]?(?:B|FLOP|bytes)\b)?", " #", lines)


@pytest.mark.slow
def test_text_and_picture_are_those_of_the_command() -> None:
    block = done(MODELS["wan-1.3b"].num_layers)
    assert text(block) in code_blocks(), AGAIN
    plans = "\n\n".join(format_plans(lower_block(block)))
    assert plans in code_blocks(), AGAIN.replace("--svg docs/graph.svg", "--plan")
    assert (DOCS / "graph.svg").read_text("utf-8") == svg(block), AGAIN


def test_text_is_that_of_the_command_but_for_numbers() -> None:
    """Of as few layers as give too many values to be listed: rewrites, passes, kernels and where they come from."""
    assert without_numbers(text(done(6))) in map(without_numbers, code_blocks()), AGAIN
    page = (DOCS / "graph.md").read_text("utf-8")
    assert all(f"| `{name}`" in page for name in REWRITES)
    assert page.count("(every block): 396 launches, 40.4 TFLOP") == 4


def test_figures_of_wan() -> None:
    """Operations by the formula of Wan's sizes, of a pass at a window of 21 frames and of a prompt."""
    spec, tokens, seen = FEW, 3 * 1560, 21 * 1560
    dim, wide, rows = spec.dim, spec.ffn_dim, spec.text_len
    layer = 2 * tokens * (6 * dim**2 + 2 * dim * wide) + 4 * tokens * seen * dim + 4 * tokens * rows * dim
    assert f"{MODELS['wan-1.3b'].num_layers * layer / 1e12:.1f}" == "40.4"
    block = done(FEW.num_layers)
    for graph in block.passes[:4]:
        assert abs(PassCost(graph).total.flops / (spec.num_layers * layer) - 1) < 2e-3
    assert block.prompt is not None and block.fold is not None
    prompt = PassCost(block.prompt)
    keys = sum(prompt[node].flops for node in block.prompt if "cross_attn" in node.meta["module"])
    assert abs(keys / (spec.num_layers * 4 * rows * dim**2) - 1) < 1e-2
    commit = block.named("commit")
    whole, last = outline(PassCost(block.passes[0]))[3], outline(PassCost(commit))[-1]
    assert whole.layers == ("blocks.1", "blocks.2", "blocks.3") and len(whole.launches) == 13
    assert [launch.op for launch in last.launches] == ["adaln", "linear", "qk_norm_rope_append"]
    assert not any(value.name.startswith("time_") for value in commit.named(Role.WEIGHT).values())
    assert {name_of(node.target) for node in block.passes[0]} == {
        "view", "permute", "clone", "empty", "select", "adaln", "linear", "linear_gelu", "rms_norm",
        "qk_norm_rope_append", "block_attention", "denoise_step",
    }  # fmt: skip
    before = sum(PassCost(graph).total.launches for graph in traced(FEW.num_layers).passes)
    assert sum(PassCost(graph).total.launches for graph in block.passes) < before / 4
