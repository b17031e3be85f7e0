"""The planner of several GPUs: bytes equal those of a run, choices that fit, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from oracles import ROWS, SIZE, TINY
from thread_ranks import grid_of, pair, thread_engine
from typer.testing import CliRunner

from inferix import UsageError, load
from inferix.bench import rank_links
from inferix.cli.main import app
from inferix.models.registry import MODELS, family_of, make_preset
from inferix.models.spec import ModelSpec
from inferix.runtime.capacity import memory_check, rank_planner
from inferix.runtime.capacity.available_memory import Available
from inferix.runtime.capacity.device_name import card_of
from inferix.runtime.capacity.gpus import CARDS, card_named
from inferix.runtime.capacity.links import LINKS, read_link
from inferix.runtime.capacity.measured_layouts import read_measured
from inferix.runtime.capacity.memory_check import MemoryCheck
from inferix.runtime.capacity.planner import Ceiling, Workload, blocks_before_repeat, steady_blocks
from inferix.runtime.capacity.rank_choice import choose_ranks
from inferix.runtime.capacity.rank_planner import choose, plans
from inferix.runtime.config import EngineConfig
from inferix.runtime.engine import Engine
from inferix.runtime.parallel.launch import Start
from inferix.runtime.parallel.rendezvous import LOCAL, Place
from inferix.runtime.sampler import scheduled_blocks
from inferix.schemes.layouts import BRANCHES, HEADS, JOINT, LAYERS, TOKENS, Divided, RankGrid, choose_layout

H200 = CARDS["h200"]
QUICK = {("rebuilt context", HEADS), ("small world", TOKENS)}  # the others run with the slow tests
CEILING = Ceiling(H200.tflops, H200.bandwidth, "maker's figures")


def workload(model: str, preset: str = "self-forcing", **settings: object) -> Workload:
    spec = MODELS[model]
    decoder = family_of(spec).chosen_decoder_spec(spec, tiny=False)
    return Workload(spec, make_preset(preset, **settings), decoder, 0, spec.default_size, "bfloat16", "bfloat16")


def options(load: Workload, gpus: int, link: str = "nvlink", memory: int = H200.memory_gb * 10**9):
    return list(plans(load, gpus, memory, CEILING, LINKS[link]))


@pytest.mark.parametrize(
    ("layout", "ranks"), [(HEADS, 2), (TOKENS, 2), (LAYERS, 2), pytest.param(JOINT, 4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("self-forcing", {"local_attn_size": 6, "denoising_step_list": [1000, 500]}),
        ("longlive", {"local_attn_size": 6, "sink_size": 1, "denoising_step_list": [1000]}),
    ],
)
def test_bytes_sent_in_a_block_equal_the_formula(
    preset: str, settings: dict[str, object], layout: str, ranks: int
) -> None:
    with pair(preset, layout, ranks, **settings) as (_, engine):
        load = replace(workload("wan-tiny", preset, **settings), spec=engine.spec, size=SIZE, dtype="float64")
        traffic, grid = engine.resources.worker.group.traffic, grid_of(engine, ranks, layout)
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            list(session.stream(3, decode=False))
            before = traffic.sent, traffic.calls
            list(session.stream(1, decode=False))
        (block,) = steady_blocks(load.preset)
        assert traffic.sent - before[0] == rank_planner.block_bytes(load, block, grid)
        assert traffic.calls - before[1] == rank_planner.block_collectives(load, block, grid)


WALKING = replace(TINY, actions=("stay", "left", "right"), grid=(4, 6), default_size=SIZE)
MORE: dict[str, tuple[str, dict[str, object]]] = {
    "rebuilt context": ("krea", {"rebuild_frames": 3, "denoising_step_list": [1000]}),
    "staggered": (
        "rolling-forcing", {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]}
    ),
    "guidance": ("causal-diffusion", {"num_steps": 2}),
    "averaged sink": (
        "longlive", {"sink_decay": 0.9, "local_attn_size": 6, "sink_size": 1, "denoising_step_list": [1000]}
    ),
    "small world": ("tinyworld", {"num_steps": 2, "spec": WALKING}),
}  # fmt: skip
LAYOUTS_OF_MORE = [
    pytest.param(name, layout, 2, marks=() if (name, layout) in QUICK else pytest.mark.slow)
    for name in MORE for layout in (HEADS, TOKENS)
] + [pytest.param(name, JOINT, 4, marks=pytest.mark.slow) for name in MORE if name != "small world"]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "ranks"), LAYOUTS_OF_MORE)
def test_bytes_of_all_kinds_of_passes_equal_the_formula(name: str, layout: str, ranks: int) -> None:
    preset, settings = MORE[name]
    own = {key: value for key, value in settings.items() if key != "spec"}
    more = {"negative_embeds": ROWS * 0.5} if name == "guidance" else {}
    with pair(preset, layout, ranks, **settings) as (_, engine):
        load = replace(workload("wan-tiny", preset, **own), spec=engine.spec, size=SIZE, dtype="float64")
        check_bytes(load, engine, ROWS, grid_of(engine, ranks, layout), more)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks"), [(HEADS, 2), (TOKENS, 2), (JOINT, 4)])
@pytest.mark.parametrize("preset", ["magi-tiny", "magi-tiny-distill"])
def test_bytes_of_chunks_in_flight_equal_the_formula(preset: str, layout: str, ranks: int) -> None:
    alone = load("magi-tiny", preset, device="cpu", dtype="float64", num_steps=8)
    with thread_engine(alone, ranks, layout) as engine:
        of_model = replace(workload("magi-tiny", preset, num_steps=8), dtype="float64")
        rows = torch.ones(3, alone.spec.text_dim, dtype=torch.float64)
        check_bytes(of_model, engine, rows, grid_of(engine, ranks, layout), {})


def check_bytes(load: Workload, engine: Engine, rows: torch.Tensor, grid: RankGrid, more: dict[str, object]) -> None:
    """Compare bytes and collectives of a period of steady blocks with the planner's."""
    traffic, blocks = engine.resources.worker.group.traffic, steady_blocks(load.preset)
    with engine.open(prompt_embeds=rows, size=load.size, **more) as session:
        list(session.stream(blocks_before_repeat(load.preset), decode=False))
        before = traffic.sent, traffic.calls
        list(session.stream(len(blocks), decode=False))
    assert traffic.sent - before[0] == sum(rank_planner.block_bytes(load, block, grid) for block in blocks) > 0
    assert traffic.calls - before[1] == sum(rank_planner.block_collectives(load, block, grid) for block in blocks)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("causal-diffusion", {"num_steps": 2}),
        pytest.param("magi-tiny", {"num_steps": 8}, marks=pytest.mark.slow),
    ],
)
def test_bytes_of_branches_on_ranks_of_their_own_equal_the_formula(preset: str, settings: dict[str, object]) -> None:
    name = "magi-tiny" if preset == "magi-tiny" else "wan-ranks"
    alone = load(name, preset, device="cpu", dtype="float64", **settings)
    with thread_engine(alone, 2, BRANCHES) as engine:
        of_model = replace(workload(name, preset, **settings), dtype="float64")
        worker, grid = engine.resources.worker, RankGrid(branches=2)
        traffic = [group.traffic for group in worker.groups]
        rows = torch.ones(3, alone.spec.text_dim, dtype=torch.float64)
        with engine.open(prompt_embeds=rows, negative_embeds=rows * 0.5) as session:
            counts = []
            for _ in range(2):
                list(session.stream(1, decode=False))
                worker.peers.wait_for(lambda peer: peer.done >= worker.peers.ran)
                counts.append([(one.sent, one.calls) for one in traffic])
        block = next(islice(scheduled_blocks(of_model.preset), 1, None))
        for place, ((sent, calls), (more, later)) in enumerate(zip(*counts, strict=True)):
            assert more - sent == rank_planner.block_bytes(of_model, block, grid, place)
            assert later - calls == rank_planner.block_collectives(of_model, block, grid, place)
            assert (more > sent) == (place > 0)


@pytest.mark.parametrize(("layout", "ranks"), [(HEADS, 2), pytest.param(JOINT, 4, marks=pytest.mark.slow)])
def test_bytes_of_divided_weights_equal_the_formula(layout: str, ranks: int) -> None:
    settings: dict[str, object] = {"local_attn_size": 6, "denoising_step_list": [1000, 500]}
    with pair("self-forcing", layout, ranks, shard_weights=True, **settings) as (_, engine):
        load = replace(workload("wan-tiny", **settings), spec=engine.spec, size=SIZE, dtype="float64")
        traffic, grid = engine.resources.worker.group.traffic, grid_of(engine, ranks, layout)
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            list(session.stream(3, decode=False))
            before = traffic.sent, traffic.calls
            list(session.stream(1, decode=False))
        (block,) = steady_blocks(load.preset)
        assert traffic.sent - before[0] == rank_planner.block_bytes(load, block, grid, shard_weights=True)
        assert traffic.calls - before[1] == rank_planner.block_collectives(load, block, grid, shard_weights=True)


def test_latency_takes_the_shortest_block_and_throughput_the_most_frames() -> None:
    listed = options(workload("wan-1.3b"), 8)
    assert {(one.layout, one.ranks) for one in listed} >= {("one", 1), ("ulysses", 4), ("pass-q", 8)}
    assert not any(one.layout == "ulysses" and one.ranks == 8 for one in listed)  # 12 heads
    fastest, reason = choose(listed, "latency")
    assert fastest.block == min(one.block for one in listed) and fastest.ranks > 1 and str(fastest) in reason
    most, _ = choose(listed, "throughput")
    assert most.fps == max(one.fps for one in listed) and (most.ranks, most.replicas) == (1, 8)


def test_a_model_that_one_gpu_cannot_hold_is_not_planned_on_one() -> None:
    load = workload("wan-14b")
    needs = {one.ranks: one.memory for one in options(load, 4) if one.layout in ("one", "ulysses")}
    assert needs[1] > needs[2] > needs[4]
    best, _ = choose(options(load, 4, memory=needs[2]), "throughput")
    assert best.ranks > 1 and not best.shard_weights
    divided, reason = choose(options(load, 4, memory=needs[4] - 1), "latency")
    assert divided.shard_weights and "shard_weights" in reason and divided.ranks == 4
    least = min(one.memory for one in options(load, 4, memory=1))
    with pytest.raises(UsageError, match=f"{least / 1e9:.1f} GB"):
        choose(options(load, 4, memory=least - 1), "latency")


def test_layers_are_offered_where_nothing_else_fits_and_the_reason_says_so() -> None:
    load = replace(workload("wan-14b", "krea"), executor="captured")
    roomy, tight = options(load, 2), options(load, 2, memory=25 * 10**9)
    assert not any(one.layout == LAYERS for one in roomy)
    (layers,) = [one for one in tight if one.layout == LAYERS]
    rest = min(one.memory for one in tight if one is not layers)
    assert layers.memory <= 25 * 10**9 < rest and layers.shard_weights is False
    best, reason = choose(tight, "latency")
    assert best is layers and f"{rest / 1e9:.1f} GB" in reason
    assert layers.computing == pytest.approx(next(one for one in roomy if one.ranks == 1).computing)  # one by one


def test_layers_are_chosen_where_no_other_layout_is_left() -> None:
    load = replace(workload("wan-14b", "krea"), executor="captured")
    (layers,) = [one for one in options(load, 2, memory=25 * 10**9) if one.layout == LAYERS]
    assert choose([layers], "latency")[0] is layers


def test_a_decoder_that_is_not_divided_counts_whole() -> None:
    load = workload("wan-14b")
    divided, whole = (
        {one.ranks: one.memory for one in plans(load, 4, 10**12, CEILING, LINKS["nvlink"], shard_decoder=asked)
         if one.layout in ("one", "ulysses")}
        for asked in (None, False)
    )  # fmt: skip
    assert whole[1] == divided[1] and whole[4] > divided[4]


def test_settings_that_ranks_with_layers_do_not_take_are_refused_by_name() -> None:
    for key, value in (("shard_weights", True), ("lowp_keep", ("blocks.0.*",)), ("lowp_layers", "blocks.1.*")):
        more = {} if key == "shard_weights" else {"lowp": "int8", "executor": "fused"}
        with pytest.raises(UsageError, match=rf"{key}.*layers"):
            EngineConfig.of("wan-tiny", "self-forcing", device="cpu", gpus=2, parallel=LAYERS, **{key: value}, **more)
    with pytest.raises(UsageError, match=r"gpus is 3.*2 layers.*gpus=2"):
        choose_layout(Divided(2, 2, (4, 6), layers=2), 3, LAYERS)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("model", ["wan-1.3b", "wan-14b", "wan-5b"])
def test_load_takes_the_layout_that_the_planner_predicts_to_be_faster(model: str, link: str) -> None:
    load = workload(model)
    for ranks in (2, 4, 5, 8):
        same = [one for one in options(load, ranks, link) if one.ranks == ranks]
        if same:
            config = EngineConfig.of("wan-tiny", "self-forcing", device="cpu", gpus=ranks)
            chosen = choose_ranks(config, load, H200.memory_gb * 10**9)
            best, reason = choose(same, "latency")
            assert (chosen.grid.layout, chosen.shard_weights) == (best.layout, best.shard_weights)
            assert (chosen.reason is not None and chosen.reason == reason) or link != "nvlink"


def table(tmp_path: Path, load: Workload, times: dict[tuple[str, int], float], **about: object) -> str:
    """A file of measured layouts of a workload, on this machine."""
    file = tmp_path / "table.json"
    rows = [
        {"layout": layout, "ranks": ranks, "shard_weights": False, "block_ms": time}
        for (layout, ranks), time in times.items()
    ]
    here = {
        "model": load.spec.name, "preset": load.preset.name, "size": list(load.size), "dtype": load.dtype,
        "device": card_of(torch.device("cpu")),
    }  # fmt: skip
    file.write_text(json.dumps({**here, **about, "layouts": rows}))
    return str(file)


def test_measured_times_reverse_the_choice_and_the_reason_names_their_file(tmp_path: Path) -> None:
    load, memory = workload("wan-1.3b"), H200.memory_gb * 10**9
    plain = EngineConfig.of("wan-tiny", "self-forcing", device="cpu", gpus=4)
    assert choose_ranks(plain, load, memory).grid == RankGrid(4)
    config = replace(plain, measured=table(tmp_path, load, {(HEADS, 4): 90.0, (TOKENS, 4): 80.0}))
    chosen = choose_ranks(config, load, memory)
    assert chosen.grid == RankGrid(1, 4)
    assert chosen.reason is not None and "80 ms measured (table.json)" in chosen.reason
    listed = list(plans(load, 4, memory, CEILING, LINKS["nvlink"], read_measured(config.measured or "")))
    best, reason = choose(listed, "latency")
    assert (best.layout, best.block) == (TOKENS, 80.0) and "measured (table.json)" in reason
    assert best.predicted != best.block and best.per_pass == (best.predicted - best.decoding) / best.passes
    other = replace(plain, measured=table(tmp_path, load, {(HEADS, 2): 90.0}))
    unmeasured = choose_ranks(other, load, memory)
    assert unmeasured.grid == RankGrid(4) and "table.json has no layout of 4" in (unmeasured.reason or "")


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"model": "wan-14b"}, ("model", "wan-14b", "wan-1.3b")),
        ({"preset": "krea"}, ("preset", "krea", "self-forcing")),
        ({"size": [64, 64]}, ("size", "64", "832")),
        ({"dtype": "float32"}, ("dtype", "float32", "bfloat16")),
        ({"device": "NVIDIA H100 PCIe sm_90"}, ("device", "H100", "cpu")),
        ({"executor": "captured"}, ("executor", "captured", "eager")),
        ({"kv_dtype": "fp8"}, ("kv_dtype", "fp8", "bfloat16")),
        ({"settings": {"num_frame_per_block": 3, "local_attn_size": 9}}, ("local_attn_size", "9", "21")),
    ],
)
def test_measured_times_of_something_else_are_refused_by_name(about, words, tmp_path: Path) -> None:
    load = workload("wan-1.3b")
    name = table(tmp_path, load, {(HEADS, 4): 90.0}, **about)
    config = EngineConfig.of("wan-tiny", "self-forcing", device="cpu", gpus=4, measured=name)
    with pytest.raises(UsageError) as error:
        choose_ranks(config, load, None)
    assert all(word in str(error.value) for word in ("table.json", *words))


def test_files_that_are_no_measured_times_are_refused(tmp_path: Path) -> None:
    good = json.loads(Path(table(tmp_path, workload("wan-1.3b"), {(HEADS, 4): 90.0})).read_text())
    (row,) = good["layouts"]
    wrong = (
        {"layouts": []}, {"bandwidth": 0, "latency": 2}, {"layouts": [row | {"ranks": float("inf")}]},
        {"layouts": [row | {"shard_weights": "false"}]},
    )  # fmt: skip
    for text in ("{}", "[]", "nonsense", '{"bandwidth": 1, "latency": 2}', *(json.dumps(good | one) for one in wrong)):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(UsageError, match=r"table\.json"):
            read_measured(str(tmp_path / "table.json"))
    with pytest.raises(UsageError, match=r"0\.0 ms"):
        read_measured(table(tmp_path, workload("wan-1.3b"), {(HEADS, 4): 0.0}))
    with pytest.raises(UsageError, match=r"none\.json"):
        read_measured(str(tmp_path / "none.json"))
    for settings in ({"gpus": 1}, {"gpus": 2, "parallel": HEADS}):
        with pytest.raises(UsageError, match=r"measured"):
            EngineConfig.of("wan-tiny", "self-forcing", device="cpu", measured="table.json", **settings)


def test_plan_reads_measured_times(tmp_path: Path) -> None:
    name = table(tmp_path, workload("wan-1.3b"), {("one", 1): 50.0, (HEADS, 4): 90.0}, device="NVIDIA H200 NVL sm_90")
    options = ["plan", "--preset", "self-forcing", "--gpus", "4", "--measured", name, "--json"]
    facts = json.loads(CliRunner().invoke(app, [*options, "--gpu", "h200"]).stdout)["ranks"]
    assert facts["layouts"][facts["chosen"]]["layout"] == "one" and "measured (table.json)" in facts["reason"]
    refused = CliRunner().invoke(app, [*options, "--gpu", "h100"])
    assert refused.exit_code != 0 and "h200" in refused.stderr and "table.json" in refused.stderr
    for option, value in (("--measured", name), ("--link", "pcie"), ("--goal", "throughput")):
        refused = CliRunner().invoke(app, ["plan", "--preset", "self-forcing", option, value])
        assert refused.exit_code == 2 and all(word in refused.stderr for word in (option, "--gpus", Path(value).name))


MODEL = ["--model", "wan-tiny"]
REFUSED_BY_BENCH: dict[str, tuple[list[str], list[str]]] = {
    "setting without a model": (["--set", "local_attn_size=6"], ["--set", "--model"]),
    "blocks without a model": (["--blocks", "5"], ["--blocks", "--model"]),
    "gpus": ([*MODEL, "--set", "gpus=2"], ["gpus", "--gpus"]),
    "parallel": ([*MODEL, "--set", "parallel=heads"], ["parallel", "heads"]),
    "weights": ([*MODEL, "--set", "shard_weights=true"], ["shard_weights"]),
}


@pytest.mark.parametrize("case", REFUSED_BY_BENCH)
def test_bench_parallel_refuses_what_it_would_not_follow(case: str) -> None:
    arguments, words = REFUSED_BY_BENCH[case]
    done = CliRunner().invoke(app, ["bench", "parallel", "--gpus", "2", "--device", "cpu", *arguments])
    assert done.exit_code == 2 and all(word in done.stderr for word in words)


def test_the_choice_leaves_out_layouts_that_do_not_take_the_settings() -> None:
    load, memory = workload("wan-1.3b"), H200.memory_gb * 10**9
    narrow = EngineConfig.of("wan-tiny", "self-forcing", device="cpu", gpus=4, kv_dtype="int8")
    assert choose_ranks(narrow, load, memory).grid == RankGrid(4)
    divided = EngineConfig.of("wan-tiny", "self-forcing", device="cpu", gpus=4, shard_weights=True)
    assert choose_ranks(divided, load, memory).shard_weights
    assert not choose_ranks(divided, workload("wan-14b"), 1).grid.layers > 1  # nothing fits


def test_cards_are_found_by_the_names_of_devices() -> None:
    names = {"NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 80GB HBM3 sm_90": "h100"}
    names |= {"NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA GeForce RTX 4090 sm_89": "rtx-4090", "NVIDIA L4": "l4"}
    for device, name in names.items():
        card = card_named(device)
        assert card is not None and card.name == name
    assert card_named("cpu x86_64") is None


def test_a_link_between_ranks_is_measured_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_links, "LARGE", 1 << 16)
    monkeypatch.setattr(rank_links, "CALLS", 2)
    with pair("self-forcing", HEADS) as (_, engine):
        monkeypatch.setattr(rank_links, "load", lambda *given, **settings: engine)
        result = rank_links.measure(2, "cpu", lambda line: None)
    rank_links.write(result, tmp_path / "link.json")
    link = read_link(str(tmp_path / "link.json"))
    assert (link.bandwidth, link.latency) == (result["bandwidth"], result["latency"])
    assert link.bandwidth > 0 and link.latency > 0 and "link.json" in link.source
    with pytest.raises(UsageError, match="gpus is 1"):
        rank_links.measure(1, "cpu", lambda line: None)


def test_a_measured_link_replaces_the_assumed_one(tmp_path: Path) -> None:
    file = tmp_path / "link.json"
    file.write_text(json.dumps({"bandwidth": 12.5, "latency": 40}))
    assert (read_link(str(file)).bandwidth, read_link(str(file)).latency) == (12.5, 40)
    for text in ("{}", "[]", '{"bandwidth": 0, "latency": 1}', '{"bandwidth": "x", "latency": 1}', "nonsense"):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"link\.json"):
            read_link(str(file))
    with pytest.raises(UsageError, match=r"nvlnk.*nvlink"):
        read_link("nvlnk")


@pytest.mark.parametrize(
    ("divided", "ranks", "parallel", "words"),
    [
        (Divided(12, 12, (30, 52)), 8, "ulysses", ("12 heads", "parallel=ulysses+pass-q", "gpus=6")),
        (Divided(4, 2, (4, 6)), 4, "ulysses", ("2 of keys", "parallel=ulysses+pass-q", "gpus=2")),
        (Divided(4, 4, (4, 6)), 7, "auto", ("4 x 6", "gpus=6")),
        (Divided(1, 1, (1, 1)), 2, "auto", ("1 x 1", "gpus=1")),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_nearest_that_works(divided, ranks, parallel, words) -> None:
    with pytest.raises(UsageError) as error:
        choose_layout(divided, ranks, parallel)
    assert all(word in str(error.value) for word in (f"gpus is {ranks}", *words))


def test_memory_is_checked_for_a_rank_and_on_a_cpu_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, preset = MODELS["wan-14b"], make_preset("self-forcing")
    load = workload("wan-14b")
    both = 2 * rank_planner.rank_memory(replace(load, dtype="float32", kv_dtype="float32"), RankGrid(2), 1, decoders=2)
    config = EngineConfig.of("wan-14b", "self-forcing", device="cpu", gpus=2, parallel="ulysses")
    check = MemoryCheck(config, preset)
    for count, fits in ((both, True), (both - 1, False)):
        monkeypatch.setattr(memory_check, "available_memory", lambda device, count=count: Available(count, "test"))
        if fits:
            check(spec, load.decoder, text=0, fast=None, made_on_host=False)
        else:
            with pytest.raises(UsageError, match="wan-14b"):
                check(spec, load.decoder, text=0, fast=None, made_on_host=False)


def test_more_ranks_than_gpus_are_refused_here_and_left_to_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, preset = MODELS["wan-ranks"], make_preset("self-forcing")
    config = EngineConfig.of("wan-ranks", "self-forcing", device="cpu", gpus=4)
    object.__setattr__(config, "device", "cuda")
    checked: list[ModelSpec] = []
    check = MemoryCheck(config, preset)
    monkeypatch.setattr(MemoryCheck, "choice", lambda check, *given: None)
    monkeypatch.setattr(MemoryCheck, "__call__", lambda check, spec, *given: stop(checked, spec))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    start = Start(config, preset, check, None, None, {}, True)
    decoder = family_of(spec).chosen_decoder_spec(spec, tiny=False)
    with pytest.raises(UsageError, match=r"gpus is 4.*gpus=2"):
        start(spec, decoder, 0, None, False)
    for key, value in Place(0, 4, 0, LOCAL, 1234).environment.items():  # two machines of two GPUs
        monkeypatch.setenv(key, value)
    with pytest.raises(StopIteration):
        start(spec, decoder, 0, None, False)
    assert checked == [spec]


def stop(checked: list[ModelSpec], spec: ModelSpec) -> None:
    """Note a check that was come to, and end what calls it."""
    checked.append(spec)
    raise StopIteration
