"""The dry run on fake CUDA tensors: launches of a whole block, the rules of capture, and the time model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from inferix.bench.dry_run import (
    MULTIPROCESSORS,
    DryRun,
    FakeCard,
    Recorder,
    WithoutDriver,
    dry_run,
    facts,
    fake_shard,
    run_decoder,
    summary,
)
from inferix.bench.dry_run_table import extended
from inferix.bench.time_model import RATES, rates_of, tiles_of
from inferix.errors import InferixError, UsageError
from inferix.graphs.cost import PassCost
from inferix.graphs.lowered import lower_block
from inferix.graphs.program import Form
from inferix.graphs.rewrites import chosen, rewritten
from inferix.graphs.rewrites.lowp import PrecisionMap
from inferix.graphs.types import BlockGraph, Runs
from inferix.models.registry import MODELS, family_of, make_preset
from inferix.runtime.capacity.planner import Workload, steady_blocks
from inferix.runtime.capacity.rank_planner import pass_bytes, weight_bytes
from inferix.runtime.config import EVERY_BLOCK
from inferix.runtime.kv.page_store import KV_DTYPES
from inferix.runtime.programs.block_graph import BlockGraphBuilder
from inferix.runtime.programs.graph_builder import GraphBuilder
from inferix.runtime.programs.warmup import graph_keys
from inferix.schemes.layouts import RankGrid

SPEC = replace(MODELS["wan-tiny"], num_layers=2)
PRESET = make_preset("self-forcing", denoising_step_list=(1000, 500))
PASSES = 3


@cache
def block() -> BlockGraph:
    builder = BlockGraphBuilder(SPEC, PRESET, (64, 64), torch.bfloat16)
    return rewritten(builder.build(), chosen())


def recorded(call) -> DryRun:
    """What a recorder notes of `call(tensor)`, a fake [4, 8] on a card."""
    run = DryRun(90)
    with torch.no_grad(), WithoutDriver(), FakeCard():
        tensor = torch.empty(4, 8, device="cuda")
        with Recorder(run, "block"):
            call(tensor)
    return run


def test_a_dry_run_launches_every_call_of_the_program():
    run, program = dry_run(block(), 90, compiled=False), lower_block(block()).body.program
    assert len(run.of("block")) == len(program.calls)
    attention = [launch for launch in run.of("block") if launch.op == "inferix::block_attention"]
    assert len(attention) == 2 * (PASSES * SPEC.num_layers - 1)  # the commit's last layer only writes its pages
    costs = [PassCost(graph).total for graph in block().passes if graph.runs is Runs.BLOCK]
    assert sum(launch.flops for launch in run.of("block")) == sum(cost.flops for cost in costs)
    assert sum(launch.nbytes for launch in run.of("block")) == pytest.approx(
        sum(cost.nbytes for cost in costs), rel=0.01
    )
    assert not any(launch.allocated for launch in run.of("block"))
    assert {launch.rate for launch in attention} == {"attention"}
    assert all(launch.tiles for launch in attention)
    assert run.faults() == []


@pytest.mark.parametrize(
    ("grid", "shard_weights"),
    [
        (RankGrid(heads=2), False),
        *(
            pytest.param(grid, shard_weights, marks=pytest.mark.slow)
            for grid in (RankGrid(tokens=2), RankGrid(heads=2, tokens=2), RankGrid(heads=2))
            for shard_weights in (False, True)
        ),
        pytest.param(RankGrid(layers=2), False, marks=pytest.mark.slow),
    ],
)
def test_a_dry_run_of_one_rank_of_several_sends_what_the_planner_counts(grid: RankGrid, shard_weights: bool):
    builder = BlockGraphBuilder(SPEC, PRESET, (64, 64), torch.bfloat16, shard=fake_shard(grid, shard_weights))
    run = dry_run(rewritten(builder.build(), chosen()), 90, compiled=False)
    assert run.faults() == []
    assert not any(launch.allocated for launch in run.of("block"))
    sent = [launch for launch in run.of("block") if launch.rate == "link"]
    load = Workload(SPEC, PRESET, None, 0, (64, 64), "bfloat16", "bfloat16")
    passes = [scheduled.run for scheduled in steady_blocks(PRESET)[0].passes]
    each = pass_bytes(load, passes[0], grid) + (weight_bytes(load, grid) if shard_weights else 0)
    denoised = sum(launch.nbytes for launch in sent if launch.section.startswith("denoise"))
    assert denoised == (len(passes) - 1) * each  # what the commit does not need of its last layer is left out
    assert 0 < sum(launch.nbytes for launch in sent) - denoised < each
    assert all(RATES[90].seconds(one.rate, 0, one.nbytes, 0) > 1e-5 for one in sent)


def test_split_keys_fill_the_waves_of_a_card_and_allocate_nothing():
    spec = replace(MODELS["wan-1.3b"], num_layers=1)
    built = BlockGraphBuilder(spec, PRESET, dtype=torch.bfloat16).build()
    split = rewritten(built, chosen(), multiprocessors=MULTIPROCESSORS[90])
    run = dry_run(split, 90, compiled=False)
    assert run.faults() == [] and not any(launch.allocated for launch in run.of("block"))
    launches = {op: [one for one in run.of("block") if one.op == f"inferix::{op}"] for op in (
        "attention_parts", "merge_parts", "block_attention"
    )}  # fmt: skip
    assert [len(of_op) for of_op in launches.values()] == [2, 2, 2]  # a window, its merge and a prompt in each step
    assert {launch.tiles for launch in launches["attention_parts"]} == {2 * 37 * 12}
    whole = dry_run(rewritten(built, chosen()), 90, compiled=False).of("block")
    before = [one for one in whole if one.op == "inferix::block_attention" and one.tiles == 37 * 12][::2]
    assert sum(one.flops for one in before) == sum(one.flops for one in launches["attention_parts"])

    def seconds(listed):
        return sum(RATES[90].seconds(one.rate, one.flops, one.nbytes, one.tiles) for one in listed)

    assert seconds([*launches["attention_parts"], *launches["merge_parts"]]) < 0.93 * seconds(before)


def test_attention_over_one_run_is_cudnns_and_copies_its_result_alone():
    spec = replace(MODELS["wan-1.3b"], num_layers=1)
    built = BlockGraphBuilder(spec, make_preset("self-forcing"), dtype=torch.bfloat16).build()
    dense = rewritten(built, chosen(), multiprocessors=MULTIPROCESSORS[90], run=(0, 21))
    run = dry_run(dense, 90, compiled=False)
    assert run.faults() == []
    calls = [launch for launch in run.of("block") if launch.rate == "cudnn"]
    assert [one.flops for one in calls] == 4 * [4 * 4680 * 21 * 1560 * 1536]
    assert {one.tiles for one in calls} == {37 * 12}
    assert not any(launch.op.endswith(("attention_parts", "merge_parts")) for launch in run.of("block"))
    prompts = [launch.flops for launch in run.of("block") if launch.op == "inferix::block_attention"]
    assert prompts == 4 * [4 * 4680 * spec.text_len * 1536]  # which read one page each, and not those of the window
    allocated = [launch for launch in run.of("block") if launch.allocated]
    assert allocated == calls  # the result, in memory of the graph
    size = 4680 * 1536 * 2
    assert {launch.allocated // size for launch in calls} == {1}
    places = [run.launches.index(launch) + 1 for launch in calls]
    assert {run.launches[place].nbytes for place in places} == {2 * size}  # its copy


def test_calls_that_allocate_are_seen_where_the_rewrites_are_left_out():
    builder = BlockGraphBuilder(SPEC, PRESET, (64, 64), torch.bfloat16)
    plain = rewritten(builder.build(), chosen(without=["cross-attention", "patch-embedding"]))
    run, program = dry_run(plain, 90, compiled=False), lower_block(plain).body.program
    copies = sum(call.form is Form.COPIED for call in program.calls)  # what such a call returns is copied into place
    assert len(run.of("block")) == len(program.calls) + copies
    allocating = [launch for launch in run.of("block") if launch.allocated]
    assert len(allocating) == sum(call.allocates for call in program.calls) == PASSES * SPEC.num_layers - 1 + PASSES


def test_a_block_in_fp8_packs_in_one_launch_and_allocates_nothing():
    builder = BlockGraphBuilder(SPEC, PRESET, (64, 64), torch.bfloat16, kv_dtype=KV_DTYPES["fp8"])
    packed = rewritten(builder.build(), chosen(["lowp"]), PrecisionMap("fp8", EVERY_BLOCK))
    run = dry_run(packed, 90, compiled=False)
    assert run.faults() == [] and not any(launch.allocated for launch in run.of("block"))
    extra = len(run.of("block")) - len(dry_run(block(), 90, compiled=False).of("block"))
    quantised = sum(launch.op == "inferix::quantise_rows" for launch in run.of("block"))
    # Results of both attentions and of the feed-forward network; pages; the commit's last layer ends at its pages.
    layers = PASSES * SPEC.num_layers - 1
    assert quantised == 3 * layers and extra == quantised + layers + 1


def test_a_dry_run_reports_totals_by_kind_and_by_op():
    run = dry_run(block(), 90, compiled=False)
    sums = summary(run, RATES[90])["block"]
    for parts in (sums["kinds"], sums["ops"]):
        assert sum(row["flops"] for row in parts.values()) == sums["flops"] > 0
        assert sum(row["predicted"] for row in parts.values()) == pytest.approx(sums["predicted"])
    assert json.loads(json.dumps(facts(run, None, block())))["parts"]["block"]["calls"] == sums["calls"]
    assert "predicted" not in summary(run, None)["block"]


def decoded(tiny: bool, faster=None) -> DryRun:
    """A block of two latent frames through a decoder of SPEC."""
    family = family_of(SPEC)
    sizes = family.chosen_decoder_spec(SPEC, tiny)
    run = run_decoder(
        90, lambda: family.build_decoder(sizes), (2, SPEC.out_channels, 4, 4), torch.bfloat16, False,
        *([] if faster is None else [faster]),
    )  # fmt: skip
    assert torch.get_default_dtype() == torch.float32
    return run


@pytest.mark.parametrize("tiny", [False, True])
def test_a_decoder_with_the_layers_of_a_card_joins_pads_and_widens_nothing(tiny):
    plain, run = decoded(tiny), decoded(tiny, family_of(SPEC).with_fast_layers)
    assert plain.faults() == run.faults() == []
    assert run.broken == {}  # it could be captured
    ops = Counter(launch.op for launch in run.of("decoder"))
    assert ops["aten::cat"] == 1  # of the pictures
    assert not {"aten::_to_copy", "aten::constant_pad_nd", "aten::silu", "aten::relu", "aten::div.Tensor"} & (
        ops.keys() - ({"aten::div.Tensor"} if tiny else set())  # of the latents
    )
    before = sum(launch.kind != "allocation" for launch in plain.of("decoder"))
    assert sum(launch.kind != "allocation" for launch in run.of("decoder")) < (0.8 if tiny else 0.6) * before
    flops = [sum(launch.flops for launch in one.of("decoder") if launch.rate) for one in (plain, run)]
    assert flops[1] <= flops[0]


def test_a_convolution_on_a_card_keeps_channels_last():
    layouts = []

    def convolve(tensor: Tensor) -> None:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(1, 4, 6, 6, device="cuda").contiguous(memory_format=layout)
            y = torch.nn.functional.conv2d(x, torch.empty(8, 4, 3, 3, device="cuda"))
            layouts.append(y.is_contiguous(memory_format=layout))

    recorded(convolve)
    assert layouts == [True, True]


def test_reads_on_the_host_are_refused():
    with pytest.raises(InferixError, match="_local_scalar_dense"):
        recorded(lambda tensor: tensor.sum().item())


def test_heads_without_a_kernel_are_refused():
    spec = replace(MODELS["wan-ranks"], num_layers=1)
    narrow = BlockGraphBuilder(spec, PRESET, (64, 64), torch.bfloat16).build()
    with pytest.raises(InferixError, match="block_attention"):
        dry_run(rewritten(narrow, chosen()), 90, compiled=False)


def test_copies_between_host_and_card_and_random_numbers_are_faults():
    assert "_to_copy" in recorded(lambda tensor: tensor.to("cpu")).faults()[0]
    assert "copy" in recorded(lambda tensor: tensor.copy_(torch.zeros(4, 8))).faults()[0]
    assert "_to_copy" in recorded(lambda tensor: torch.tensor([1.0, 2.0], device="cuda")).faults()[0]
    assert "bernoulli" in recorded(torch.bernoulli).faults()[0]
    assert recorded(lambda tensor: tensor.add_(1)).faults() == []


def test_allocations_are_counted_in_bytes():
    (launch,) = recorded(lambda tensor: tensor + 1).launches
    assert (launch.allocated, launch.nbytes) == (128, 256)
    (launch,) = recorded(lambda tensor: torch.add(tensor, 1, out=tensor)).launches
    assert launch.allocated == 0
    assert recorded(lambda tensor: tensor.t()[1:, None].transpose(0, 1)).launches == []


@pytest.mark.parametrize(
    "index", [0, -1, slice(1, 3), (slice(None), 2), (..., None, 3), (1, ..., slice(0, 8, 3)), (None, slice(-2, None))]
)
def test_indices_on_fake_tensors_are_views_as_torch_makes_them(index):
    shapes = {}

    def shape(tensor: Tensor) -> None:
        part = tensor[index]
        shapes["fake"] = tuple(part.shape), part.stride(), part.storage_offset()

    recorded(shape)
    part = torch.empty(4, 8)[index]
    assert shapes["fake"] == (tuple(part.shape), part.stride(), part.storage_offset())


def test_an_architecture_without_code_is_refused():
    with pytest.raises(UsageError, match="91"):
        dry_run(block(), 91)


def test_the_time_model_counts_waves_bytes_and_starts():
    rates = RATES[90]
    assert rates.full(444) == pytest.approx(444 / 528)  # 37 tiles of queries, 12 heads, on 132 multiprocessors
    assert rates.full(0) == rates.full(132) == 1
    start = rates.start * 1e-6
    assert rates.seconds("", 0, 3_000_000_000_000, 0) == pytest.approx(1 + start)
    assert rates.seconds("matmul", 700 * 10**12, 0, 0) == pytest.approx(1 + start)
    assert rates.seconds("matmul", 700 * 10**12, 0, 66) == pytest.approx(2 + start)
    assert tiles_of((2, 129, 512)) == 8


def test_the_time_model_takes_other_constants_by_name():
    assert RATES[90].changed({"attention": "600"}).attention == 600
    with pytest.raises(UsageError, match="atention"):
        RATES[90].changed({"atention": "600"})
    assert rates_of(80, {}) is None
    with pytest.raises(UsageError, match="attention"):
        rates_of(80, {"attention": "600"})
    with pytest.raises(UsageError, match="'fast'"):
        RATES[90].changed({"attention": "fast"})


@pytest.mark.slow
def test_the_kernels_of_a_block_compile_for_a_card():
    run = dry_run(block(), 90)
    assert {name.partition(",")[0] for name in run.kernels} >= {"block_attention", "adaln", "qk_norm_rope_append"}
    assert run.faults() == []


@pytest.mark.slow
def test_the_command_prints_a_dry_run_and_fails_for_a_fault():
    command = [sys.executable, "-m", "inferix", "graph", "--model", "wan-tiny", "--dry-run", "cuda:90", "--no-compile"]
    done = subprocess.run([*command, "--vae", "none", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "fp8"])
def test_a_batch_is_captured_with_as_many_launches_as_one_session(kind: str | None):
    """Of a whole block, with pages and layers of all bits or in FP8: operations grow with the rows, launches do not."""
    preset, rewrites = make_preset("longlive"), tuple(chosen(["lowp"] if kind else []))
    layers, pages = (PrecisionMap(kind, EVERY_BLOCK), KV_DTYPES[kind]) if kind else (None, None)
    graphs = GraphBuilder(SPEC, preset, "reference", torch.bfloat16, "cpu", rewrites, layers, pages)
    keys = graph_keys(SPEC, preset, (64, 64), kind is not None, (1, 4))
    runs = {key.sessions: dry_run(graphs(key), 90, compiled=False) for key in keys if key.whole}
    assert [run.faults() for run in runs.values()] == [[], []]
    one, four = (run.of("block") for run in runs.values())
    assert [launch.op for launch in one] == [launch.op for launch in four]
    matmuls, of_four = (sum(launch.flops for launch in run if launch.kind != "norm and gate") for run in (one, four))
    assert of_four == pytest.approx(4 * matmuls, rel=0.01)
    assert runs[1].of("prompt") == runs[4].of("prompt")  # made for one session at a time


def test_values_grow_with_layers():
    fewer = {"part": {"calls": 5, "seconds": 0.5}, "fp8": False, "from": None}
    more = {"part": {"calls": 7, "seconds": 0.75}, "fp8": False, "from": None}
    assert extended(fewer, more, 3) == {"part": {"calls": 11, "seconds": 1.25}, "fp8": False, "from": None}
    for other in ({"decoder": 1}, fewer | {"from": "x"}):
        with pytest.raises(AssertionError):
            extended(fewer, other, 3)


@pytest.mark.slow
def test_a_row_from_runs_of_fewer_layers_is_that_of_all():
    spec = replace(MODELS["wan-tiny"], num_heads=2)
    scheme = make_preset("self-forcing", denoising_step_list=(1000,), local_attn_size=6)

    def row(layers: int) -> dict:
        built = BlockGraphBuilder(replace(spec, num_layers=layers), scheme, (32, 32), torch.bfloat16).build()
        graph = rewritten(built, chosen())
        return facts(dry_run(graph, 90, compiled=False), RATES[90], graph)["parts"]["block"]

    fewer, more, whole = (row(layers) for layers in (2, 3, 5))
    made = extended(fewer, more, 3)
    assert made["predicted"] == pytest.approx(whole["predicted"], rel=1e-9)
    for key in ("calls", "allocating", "flops", "bytes"):
        assert made[key] == whole[key] > fewer[key] or key == "allocating"
