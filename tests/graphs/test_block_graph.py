"""The block graph of each preset, traced and rewritten, against the model's own forward and the sampler's own step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from filled import random_values
from oracles import KINDS as PRESET_KINDS
from oracles import TINY, randomise
from torch import Tensor, fx

from inferix.graphs.cost import PassCost, name_of
from inferix.graphs.interpret import run_block
from inferix.graphs.rewrites import chosen, copied, rewritten
from inferix.graphs.rewrites.lowp import KINDS, PrecisionMap
from inferix.graphs.show.plain import to_dict
from inferix.graphs.types import BlockGraph, PassGraph, Role, Runs
from inferix.graphs.validate import GraphError, validate
from inferix.kernels.attention_parts.rule import parts_for
from inferix.kernels.block_attention import reference
from inferix.kernels.linear_lowp import linear_lowp, pack
from inferix.models.registry import PRESETS, make_preset
from inferix.models.wan.transformer import WanTransformer
from inferix.runtime.capacity import costs
from inferix.runtime.programs.block_graph import BlockGraphBuilder, ModelPass, SolverStep
from inferix.runtime.programs.block_plan import plan_block

SPEC = dataclasses.replace(TINY, dim=128, actions=())
SIZE = (48, 32)
GRID = (2, 3)
IN_FULL = " in full"  # of a preset's name: with all of its steps
EXACT = 1e-9
Values = dict[str, Tensor]
ops = torch.ops.inferix


def plain(preset: str):
    """A preset without what only names it."""
    return dataclasses.replace(PRESETS[preset], name="", about=PRESETS["krea"].about)


SINGLE = [name for name in PRESET_KINDS if len(PRESETS[name].weight_sets) == 1]
DISTINCT = [name for at, name in enumerate(SINGLE) if plain(name) not in map(plain, SINGLE[:at])]
VARIED = ("self-forcing", "longlive-infinity", "longlive2", "tinyworld")  # plain, a moving sink, a history, actions
assert set(VARIED) <= set(DISTINCT)


def slow(preset: str):
    return pytest.param(preset, marks=pytest.mark.slow)


def settings(preset: str) -> dict[str, object]:
    """Steps of a preset: as few as show each kind of step, and all where its name says so."""
    name, full, _ = preset.partition(IN_FULL)
    if name == "causal-diffusion" and full:
        return {"num_steps": 4}
    if full or PRESETS[name].window_blocks > 1:
        return {}
    sampler = PRESETS[name].sampler
    return {"num_steps": 3} if sampler.solver == "unipc" else {"denoising_step_list": sampler.denoising_step_list[:2]}


# Rewrites without a place here: nothing is known frame by frame, no norm follows a gate, all is in one dtype.
ELSEWHERE = ("hoist-frames", "gated-norm", "swiglu", "wide-linear")
PRESETS_AND_FULL = [*DISTINCT, *(slow(name + IN_FULL) for name in DISTINCT)]


def spec_for(preset: str):
    return dataclasses.replace(SPEC, actions=("stay", "go")) if preset.startswith("tinyworld") else SPEC


@cache
def built(preset: str, fuse_commit: bool = False) -> BlockGraphBuilder:
    scheme = make_preset(preset.removesuffix(IN_FULL), **settings(preset))
    return BlockGraphBuilder(spec_for(preset), scheme, SIZE, torch.float64, fuse_commit=fuse_commit)


@cache
def block_of(preset: str, fuse_commit: bool = False) -> BlockGraph:
    return built(preset, fuse_commit).build()


@cache
def all_done(preset: str) -> BlockGraph:
    return rewritten(block_of(preset), chosen())


@cache
def model_of(preset: str) -> WanTransformer:
    model = WanTransformer(spec_for(preset))
    randomise(model)
    return model.double().eval().requires_grad_(False)


@cache
def held_values(preset: str, fuse_commit: bool = False) -> Values:
    weights = dict(model_of(preset).named_parameters())
    return random_values(block_of(preset, fuse_commit), weights, GRID, SPEC.head_dim)


def values_of(preset: str, fuse_commit: bool = False) -> Values:
    return {name: tensor.clone() for name, tensor in held_values(preset, fuse_commit).items()}


@torch.no_grad()
def run_plainly(builder: BlockGraphBuilder, values: Values, names: tuple[str, ...] | None = None) -> Values:
    """Passes as the modules themselves compute them, with no graph; names: None for all."""
    model = model_of(builder.preset.name)
    for planned in (planned for planned in builder.planned if names is None or planned.name in names):
        values["timesteps"] = torch.tensor([planned.run.timesteps])
        values |= ModelPass(model, builder.layout(planned), builder.guidance)(values)
        if planned.steps:
            values |= SolverStep(builder.sampler, planned.steps, builder.preset.num_frame_per_block)(values)
    return values


@cache
def eager(preset: str) -> Values:
    return run_plainly(built(preset), values_of(preset))


def differences(preset: str, block: BlockGraph) -> float:
    """The largest difference of results and states."""
    actual, expected = run_block(block, values_of(preset)), eager(preset)
    names = (*block.results, *(f"kv.{layer}" for layer in range(SPEC.num_layers)))
    return max(float((actual[name] - expected[name]).abs().max()) for name in names)


@pytest.mark.parametrize("preset", PRESETS_AND_FULL)
def test_the_traced_block_is_the_model(preset: str) -> None:
    block = block_of(preset)
    validate(block)
    assert differences(preset, block) < 1e-12


STAGGERED = {  # two blocks in flight, each two steps ahead of the next, in key ranges of their own
    "window_blocks": 2, "noise2clean_kvrange": [3, 2], "clean_chunk_kvrange": 1, "clean_text": "null",
    "local_attn_size": 9,
}  # fmt: skip


@pytest.mark.parametrize("overrides", [{"window_blocks": 2}, STAGGERED], ids=["joint", "ranges"])
def test_a_block_takes_several_passes_between_two_joins(overrides: dict) -> None:
    builder = BlockGraphBuilder(SPEC, make_preset("self-forcing", **overrides), SIZE, torch.float64)
    block = builder.build()
    assert [graph.name for graph in block.passes] == ["denoise 0", "denoise 1", "commit"]
    assert block.results == ("clean", "latents.0")
    weights = dict(model_of("self-forcing").named_parameters())
    given = random_values(block, weights, GRID, SPEC.head_dim)
    wanted = run_plainly(builder, {name: tensor.clone() for name, tensor in given.items()})
    for graph in (block, rewritten(block, chosen())):
        validate(graph)
        found = run_block(graph, {name: tensor.clone() for name, tensor in given.items()})
        for name in (*block.results, "kv.0", "kv.1"):
            assert (found[name] - wanted[name]).abs().max() < EXACT, name


@pytest.mark.parametrize("preset", [*VARIED, *(slow(name + IN_FULL) for name in DISTINCT)])
def test_each_rewrite_computes_the_same(preset: str) -> None:
    """Each exact rewrite with those that it needs."""
    for name in chosen():
        actual = rewritten(block_of(preset), ["merge-qkv", name])
        validate(actual)
        assert differences(preset, actual) < EXACT, name


@pytest.mark.parametrize("preset", PRESETS_AND_FULL)
def test_all_rewrites_compute_the_same(preset: str) -> None:
    block = block_of(preset)
    actual = all_done(preset)
    validate(actual)
    assert differences(preset, actual) < EXACT
    places = {change.rewrite: change.places for change in actual.changes if change.rewrite not in ELSEWHERE}
    assert all(places.values()), places
    assert block.changes == () and len(list(block.passes[0])) > len(list(actual.passes[0]))


@pytest.mark.parametrize("preset", PRESETS_AND_FULL)
def test_passes_hold_neither_time_mlp_nor_prompt_work_nor_what_follows_the_last_keys(preset: str) -> None:
    block, fused = all_done(preset), {"rope_append", "layer_norm", "gelu", "rsqrt", "frame_noise"}
    assert block.prompt is not None and block.fold is not None
    for graph in block.passes:
        weights = graph.named(Role.WEIGHT).values()
        read = {value.name for value in weights if value.name.startswith(("time_", "text_"))}
        told_by_actions = {"time_embedding.projection.weight", "time_embedding.projection.bias"}
        assert read == (told_by_actions if preset.startswith("tinyworld") else set())
        assert not fused & {name_of(node.target) for node in graph}
        if not graph.outputs:  # run for its keys and values only
            costs_of = PassCost(graph)
            calls = [name_of(node.target) for node in graph if costs_of[node].launches]
            assert calls[-1] == "qk_norm_rope_append" and calls.count("qk_norm_rope_append") == SPEC.num_layers
            assert calls.count("block_attention") == 2 * (SPEC.num_layers - 1)  # of the window and of the prompt
            assert not any(value.name.startswith("head.") for value in weights)
    assert {value.name for value in block.prompt.outputs} == {f"prompt.{index}" for index in range(SPEC.num_layers)}
    assert block.prompt.runs == Runs.PROMPT and "text" in block.prompt.reads


def swapped(node: fx.Node, one: int, other: int) -> None:
    args = list(node.args)
    args[one], args[other] = args[other], args[one]
    node.args = tuple(args)


def changed(node: fx.Node, place: int, value: object) -> None:
    node.args = (*node.args[:place], value, *node.args[place + 1 :])


def swap_inputs(graph: PassGraph, one: str, other: str) -> None:
    """Two values of one shape in each other's place."""
    keys = {value.name: key for key, value in graph.inputs.items()}
    graph.inputs[keys[one]], graph.inputs[keys[other]] = graph.inputs[keys[other]], graph.inputs[keys[one]]


BROKEN: dict[str, tuple[object, Callable[[PassGraph, fx.Node], None]]] = {
    "patch-embedding": (torch.ops.aten.permute.default, lambda _, node: changed(node, 1, (0, 2, 4, 6, 1, 3, 7, 5))),
    "merge-qkv": (torch.ops.aten.cat.default, lambda _, node: changed(node, 0, node.args[0][::-1])),
    "qk-norm-rope": (ops.qk_norm_rope_append.default, lambda _, node: swapped(node, 1, 2)),
    "rms-norm": (ops.rms_norm.default, lambda _, node: changed(node, 3, 0.1)),
    "cross-attention": (torch.ops.aten.stack.default, lambda _, node: changed(node, 0, node.args[0][::-1])),
    "adaln": (ops.adaln.default, lambda _, node: swapped(node, 3, 4)),
    "denoise-step": (ops.denoise_step.default, lambda _, node: changed(node, 11, node.args[11] + 1)),
    "gelu": (ops.linear_gelu.default, lambda _, node: swapped(node, 2, 2) or changed(node, 0, node.args[3])),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rewrite_is_noticed(name: str) -> None:
    """The same comparison fails where a rewrite mixes up what it was given."""
    op, damage = BROKEN[name]
    block = rewritten(block_of("self-forcing"), ["merge-qkv", name])
    graph = block.passes[0]
    listed = {"merge-qkv": (0, 3), "patch-embedding": (1, 8)}.get(name)  # an argument that is a list of so many
    calls = (node for node in graph if node.target is op)
    node = next(node for node in calls if listed is None or len(node.args[listed[0]]) == listed[1])
    damage(graph, node)
    try:
        assert differences("self-forcing", block) > 1e-6
    except RuntimeError:  # shapes that do not fit any more
        assert name == "gelu"


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are split in float64 too and at the test model's sizes, in steps of 8."""
    module = import_module(f"{rewritten.__module__}.split_keys")
    monkeypatch.setattr(module, "HALF", (torch.float64,))
    monkeypatch.setattr(module, "HEAD_DIMS", (SPEC.head_dim,))
    monkeypatch.setattr(module, "parts_for", lambda rows, tokens, heads, keys, multiprocessors: 3)
    monkeypatch.setattr(reference, "STEP", 8)


def attention_calls(block: BlockGraph) -> list[list[str]]:
    names = ("block_attention", "attention_parts", "merge_parts")
    return [[name for node in graph if (name := name_of(node.target)) in names] for graph in block.passes]


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("preset", VARIED)
def test_split_keys_compute_the_same(preset: str) -> None:
    names = ["merge-qkv", "cross-attention", "split-keys"]
    whole, block = rewritten(block_of(preset), names), rewritten(block_of(preset), names, multiprocessors=132)
    validate(block)
    assert differences(preset, block) < EXACT
    for before, after in zip(attention_calls(whole), attention_calls(block), strict=True):
        assert after == [name for _ in before for name in ("attention_parts", "merge_parts")]
    assert {change.rewrite: change.places for change in block.changes}["split-keys"] == sum(
        map(len, attention_calls(whole))
    )


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("op", ["attention_parts", "merge_parts"])
def test_broken_parts_are_noticed(op: str) -> None:
    block = rewritten(block_of("self-forcing"), ["merge-qkv", "split-keys"], multiprocessors=132)
    one, other = [node for node in block.passes[0] if name_of(node.target) == op][:2]
    if op == "merge_parts":
        changed(other, 1, one.args[1])  # the sums of another layer
    else:
        changed(one, 9, 2 * one.args[9])  # another scale
    assert differences("self-forcing", block) > 1e-6


def test_keys_are_split_where_waves_of_programs_are_not_full() -> None:
    """Wan 1.3B on 132 multiprocessors: blocks of three frames and of one, four sessions, its prompt; 14B."""
    keys = 21 * 1560
    assert [parts_for(1, tokens, 12, keys, 132) for tokens in (4680, 1560)] == [2, 4]
    assert parts_for(4, 4680, 12, keys, 132) == parts_for(1, 4680, 40, keys, 132) == 1
    assert parts_for(1, 4680, 12, 512, 132) == 1
    assert parts_for(1, 64, 4, 640, 132) == 1  # shorter than a merge
    assert parts_for(1, 4680, 12, keys, 0) == 1


def test_keys_stay_whole_without_a_gpu_and_in_float64() -> None:
    assert "split-keys" not in {change.rewrite for change in rewritten(block_of("self-forcing"), chosen()).changes}
    block = rewritten(block_of("self-forcing"), ["split-keys"], multiprocessors=132)
    assert all("attention_parts" not in calls for calls in attention_calls(block))


@pytest.mark.parametrize(
    ("name", "values"), [("fold", ("fold.0", "fold.3")), ("hoist-prompt", ("prompt.0", "prompt.2"))]
)
def test_values_moved_to_the_wrong_place_are_noticed(name: str, values: tuple[str, str]) -> None:
    block = rewritten(block_of("self-forcing"), [name])
    swap_inputs(block.passes[0], *values)
    assert differences("self-forcing", block) > 1e-6


def first(graph: PassGraph, op: object) -> fx.Node:
    return next(node for node in graph if node.target is op)


def lose_a_write(graph: PassGraph) -> None:
    """As dead-code removal by data flow would: queries come from elsewhere, so nothing uses the call that writes."""
    node = first(graph, ops.qk_norm_rope_append.default)
    queries = node.args[6]
    with graph.graph.inserting_before(node):
        zeros = graph.graph.call_function(torch.ops.aten.zeros.default, (list(queries.meta["val"].shape),))
    zeros.meta["val"] = queries.meta["val"]
    queries.replace_all_uses_with(zeros, lambda user: user is not zeros)
    graph.graph.erase_node(node)


def read_too_early(graph: PassGraph) -> None:
    writer, reader = first(graph, ops.qk_norm_rope_append.default), first(graph, ops.block_attention.default)
    reader.append(writer)


def write_twice(graph: PassGraph) -> None:
    node = first(graph, ops.rms_norm.default)
    with graph.graph.inserting_after(node):
        graph.graph.call_function(node.target, node.args).meta["val"] = None


def write_foreign_pages(graph: PassGraph) -> None:
    key = next(key for key, value in graph.inputs.items() if value.owned)
    graph.inputs[key] = dataclasses.replace(graph.inputs[key], owned=False)


def write_an_input(graph: PassGraph) -> None:
    node = first(graph, ops.denoise_step.default)
    changed(node, 6, node.args[1])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_a_write, "kv.0"),
        (read_too_early, "block_attention.*empty"),
        (write_twice, "adaln|second"),
        (write_foreign_pages, "pages of kv.0"),
        (write_an_input, "denoise_step.*latents"),
    ],
)
def test_validate_refuses(damage: Callable[[PassGraph], None], named: str) -> None:
    block = copied(all_done("self-forcing"))
    validate(block)
    damage(block.passes[0])
    with pytest.raises(GraphError, match=f"denoise 0: .*{named}"):
        validate(block)


def test_validate_refuses_missing_values() -> None:
    block = all_done("self-forcing")
    with pytest.raises(GraphError, match=r"fold\.\d+"):
        validate(dataclasses.replace(block, fold=None))
    with pytest.raises(GraphError, match="pictures"):
        validate(dataclasses.replace(block, results=("pictures",)))


@torch.no_grad()
def test_a_commit_in_the_next_blocks_first_pass_equals_one_after_the_other() -> None:
    values = values_of("self-forcing", fuse_commit=True)
    pages = values["both.pages"].tolist()
    rest = [page for page in range(block_of("self-forcing", True).shape.pages) if page not in pages[0] + pages[1]]
    for row, seen in enumerate((rest[:15] + pages[0], rest[3:18] + pages[0] + pages[1])):
        values["both.page_table"][row, : len(seen)] = torch.tensor(seen)
        values["both.page_count"][row] = len(seen)
    plain = {name: tensor.clone() for name, tensor in values.items()}
    for row, latents, name in ((0, "before", "commit"), (1, "latents", "denoise 0")):
        for what in ("pages", "page_table", "page_count", "rope_time"):
            plain[f"block.{what}"] = values[f"both.{what}"][row : row + 1]
        plain |= run_plainly(built("self-forcing"), plain | {"latents": values[latents]}, (name,))
    for block in (block_of("self-forcing", True), rewritten(block_of("self-forcing", True), chosen())):
        validate(block)
        both = dataclasses.replace(block, passes=tuple(graph for graph in block.passes if "+" in graph.name))
        actual = run_block(both, {name: tensor.clone() for name, tensor in values.items()})
        for name in ("latents", "kv.0", "kv.1"):
            assert (actual[name] - plain[name]).abs().max() < EXACT, name
    with pytest.raises(ValueError, match=r"krea.*fuse_commit"):
        plan_block(PRESETS["krea"], fuse_commit=True)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_layers_are_those_of_the_map(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers compute what `linear_lowp` does on packed operands, bit for bit, and the others what they did."""
    packed = PrecisionMap(kind, ("blocks.*",), keep=("blocks.0.*", "*.cross_attn.[kv]"))
    block = rewritten(block_of("self-forcing"), ["lowp"], packed)
    validate(block)
    assert block.changes[0].places == 8 * len(block.passes)  # q, k, v, o; cross q, o; up, down of one layer
    model = model_of("self-forcing")
    expected = {id(p) for name, p in model.named_parameters() if packed.has(name.removesuffix(".weight"))}
    plain = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in expected:
            return plain(x, weight, bias)
        (rows, scale), (low, low_scale) = (pack(part, KINDS[kind]) for part in (x.flatten(0, -2), weight))
        out = linear_lowp(rows, low, scale, low_scale, bias=bias, dtype=x.dtype)
        return out.unflatten(0, x.shape[:-1])

    monkeypatch.setattr(F, "linear", linear)
    values = run_plainly(built("self-forcing"), values_of("self-forcing"), ("denoise 0",))
    monkeypatch.undo()
    actual = run_block(dataclasses.replace(block, passes=block.passes[:1]), values_of("self-forcing"))
    assert torch.equal(actual["latents"], values["latents"])
    everything = rewritten(block_of("self-forcing"), chosen(["lowp"]), packed)
    validate(everything)
    calls = [name_of(node.target) for node in everything.passes[0]]
    assert calls.count("linear_lowp") == 6  # q, k and v are one
    assert calls.count("quantise_rows") == (3 if kind == "fp8" else 6)  # `adaln` packs FP8 itself
    gelus = [node.args for node in everything.passes[0] if name_of(node.target) in ("quantise_rows", "linear_lowp")]
    assert [args[-1] for args in gelus].count(True) == 1  # between up and down
    fused = run_block(dataclasses.replace(everything, passes=everything.passes[:1]), values_of("self-forcing"))
    scale = eager("self-forcing")["latents"].abs().max()
    assert (fused["latents"] - actual["latents"]).abs().max() < 2e-2 * scale  # rounding goes another way at ties
    with pytest.raises(ValueError, match=r"'blok\.\*'"):
        rewritten(block_of("self-forcing"), ["lowp"], PrecisionMap(kind, ("blok.*",)))


@pytest.mark.parametrize("preset", PRESETS_AND_FULL)
def test_operations_are_those_counted_from_sizes(preset: str) -> None:
    block, spec = block_of(preset), spec_for(preset)
    for graph, planned in zip(block.passes, built(preset).planned, strict=True):
        rows = built(preset).rows
        by_family = PassCost(graph).by_family()
        expected = costs.pass_flops(spec, GRID[0] * GRID[1], planned.run)
        actual = by_family["matmul"].flops + by_family["attention"].flops
        assert actual == rows * (expected.total + costs.prompt_flops(spec))


def test_a_block_as_plain_values_has_every_call_with_its_cost() -> None:
    block = rewritten(block_of("tinyworld"), chosen(["lowp"]))
    plain = json.loads(json.dumps(to_dict(block)))
    assert [graph["name"] for graph in plain["passes"]] == [graph.name for graph in block.passes]
    for graph, written in zip(block.passes, plain["passes"], strict=True):
        total = PassCost(graph).total
        assert [node["name"] for node in written["nodes"]] == [node.name for node in graph]
        assert (written["flops"], written["bytes"], written["launches"]) == (total.flops, total.nbytes, total.launches)
        assert sum(node.get("flops", 0) for node in written["nodes"]) == total.flops
    literals = [value for graph in plain["passes"] for value in graph["inputs"].values() if value["data"]]
    assert literals and all(value["role"] == "constant" for value in literals)
