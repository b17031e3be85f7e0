"""The block benchmark on a CPU: it times matching candidates, refuses others, and detects a planted slowdown.

A fake clock that only moves when it is read or slept on replaces the real one, so no figure depends on the machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inferix import load
from inferix.bench import baseline, inspection
from inferix.bench import block as bench
from inferix.bench.baseline import BlockOutput, PlainLoop, run_layer, run_layers, unsupported_reason
from inferix.bench.block import Options, run
from inferix.bench.candidates import EngineStream, OutputChecker, executor_candidate, outputs_of, relative_difference
from inferix.bench.compare import compare
from inferix.bench.gpu_check import check_graph
from inferix.bench.inspection import count_launches
from inferix.bench.report import page
from inferix.bench.result import Result, read_result
from inferix.bench.subject import Subject, draw_weights, full_precision_engine, open_engine, random_prompt
from inferix.bench.work import blocks_until_full, decoder_work, pass_work, stays_full
from inferix.cli.main import app
from inferix.errors import InferixError, UsageError
from inferix.models.registry import MODELS, PRESETS, make_preset
from inferix.models.wan.transformer import WanTransformer
from inferix.models.wan.vae_spec import WAN21_VAE
from inferix.runtime.block_loop import BlockLoop
from inferix.runtime.execution.decode_pipeline import DecoderTrack
from inferix.runtime.execution.launcher import owns_storage
from inferix.runtime.sampler import scheduled_blocks

ALL_STEPS = Subject("wan-tiny", frames_in_window=6, size=(32, 32), device="cpu")
ONE_STEP = {"denoising_step_list": [1000]}
SMALL = replace(ALL_STEPS, overrides=ONE_STEP)
OPTIONS = Options(SMALL, rounds=1, blocks=4)
FEWER_BITS = {"lowp": "fp8", "kv_dtype": "fp8"}
FP8 = replace(SMALL, overrides=ONE_STEP | FEWER_BITS)


class FakeTime:
    """A clock that moves a millisecond whenever it is read, and as far as it is slept on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(bench, "time", clock)
    return clock


@pytest.fixture(
    scope="module",
    params=[Options(SMALL, 1, 2), pytest.param(Options(ALL_STEPS, 1, 4), marks=pytest.mark.slow)],
    ids=["one step", "all steps"],
)
def result(request: pytest.FixtureRequest) -> Result:
    return run(request.param, lambda message: None)


def test_a_block_is_timed_stage_by_stage_at_a_full_window(result):
    blocks, steps = result.settings["blocks"], 4 if result.settings["blocks"] == 4 else 1
    assert set(result.facts["candidates"]) == {"eager", "fused", "plain", "diffusers"}
    assert result.facts["left_out"].keys() == {"captured", "compiled", "reduce-overhead"}
    for name, facts in result.facts["candidates"].items():
        assert facts["refused"] is None and facts["difference"] <= result.facts["tolerance"]
        assert facts["memory"]["decoder state"] > 0 and facts["launches"] is None
        assert (facts["memory"]["cache"] > 0) == (name != "diffusers")
        series = result.of(name)
        assert len(series["block"].samples) == len(series["transformer"].samples) == blocks
        growth = {frames: len(samples) for frames, samples in result.facts["growth"][name].items()}
        assert growth == {"3": 1, "6": blocks}
    assert result.facts["block"]["window_frames"] == 6 and result.facts["block"]["pixel_frames"] == 12
    assert [step["kind"] for step in result.facts["block"]["passes"]] == ["denoise"] * steps + ["commit"]
    assert {"denoise", "commit", "decode"} <= result.of("eager").keys()
    profile = result.facts["candidates"]["fused"]["profile"]
    denoised = [f"denoise {step}" for step in range(steps)] if steps > 1 else ["denoise"]
    assert list(profile["passes"]) == ["noise", *denoised, "commit"]
    written = result.facts["work"]["transformer"]["flops"]  # the graph leaves out what is constant or has no effect
    assert 0.7 * written < sum(cost["flops"] for cost in profile["families"].values()) < written
    assert "fewer_bits" not in result.facts["work"]
    assert not result.on_gpu and result.environment["clocks"] is None
    assert "## On a CPU" in page({"a.json": result}, "results", "page.md", {})


def test_a_planted_slowdown_is_found_by_comparing_two_runs(clock, monkeypatch):
    options = replace(OPTIONS, executors=("eager",), baselines=("plain",))
    before = run(options, lambda message: None)
    denoise = BlockLoop.denoise

    def slower(self, state, record):
        clock.sleep(0.05)
        return denoise(self, state, record)

    monkeypatch.setattr(BlockLoop, "denoise", slower)
    after = run(options, lambda message: None)
    verdicts = {change.name: change.verdict for change in compare(before, after).changes}
    assert verdicts["eager/block"] == verdicts["eager/transformer"] == "slower"
    assert verdicts["plain/block"] == verdicts["plain/transformer"] == "same"


class NeverRolls(PlainLoop):
    """Keeps reading the frames that have left the window."""

    def make_room(self, context):
        self.frames = context


class NoCommit(PlainLoop):
    """Leaves the keys of a noisy pass for the blocks after it."""

    def forward(self, run, latents):
        return latents if run.timesteps[0] == 0 else super().forward(run, latents)


def plant(
    monkeypatch: pytest.MonkeyPatch, streams: dict[str, Callable[..., PlainLoop]], fewer_bits: bool = False
) -> None:
    """Put these streams in place of all candidates but the oracle."""
    offer = bench.candidates

    def candidates(engine, rows, subject):
        available, left_out = offer(engine, rows, subject)
        more = [
            replace(
                available[-1], name=name, fewer_bits=fewer_bits, compared=None,
                open=lambda make=make: make(engine, rows, 0, (32, 32), run_layer),
            )
            for name, make in streams.items()
        ]
        return [*available[:1], *more], {name: reason for name, reason in left_out.items() if name not in streams}

    monkeypatch.setattr(bench, "candidates", candidates)


def test_what_does_not_match_is_refused_and_not_timed(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image is available\nsecond line")

    opened = []

    def right_at_first(*args):
        opened.append((PlainLoop, NoCommit)[min(len(opened), 1)])
        return opened[-1](*args)

    plant(monkeypatch, {"fused": NoCommit, "captured": broken, "plain": NeverRolls, "compiled": right_at_first})
    result = run(replace(OPTIONS, blocks=1, baselines=("plain", "compiled")), lambda message: None)
    refused = {name: facts["refused"] for name, facts in result.facts["candidates"].items()}
    assert "latents of block 1 " in refused["fused"]
    assert "no kernel image is available" in refused["captured"] and "second line" not in refused["captured"]
    assert "latents of block 2 " in refused["plain"]
    assert "round 1" in refused["compiled"] and "latents of block 1 " in refused["compiled"]
    assert {name.partition("/")[0] for name in result.series} == {"eager"}
    assert refused["fused"] in page({"a.json": result}, "results", "page.md", {})
    with pytest.raises(InferixError, match=r"fused: .*plain: "):
        run(replace(OPTIONS, executors=("fused",), baselines=("plain",)), lambda message: None)


class Black(PlainLoop):
    """Right latents and black pictures."""

    def step(self, decode=True):
        output = super().step(decode)
        return replace(output, frames=None if output.frames is None else np.zeros_like(output.frames))


class Stuck(PlainLoop):
    """Right up to the second block at a full window, then returns that block repeatedly without work."""

    def step(self, decode=True):
        if self.frames[-1:] < (8,):
            self.last = super().step(decode)
        return self.last


def test_all_that_is_timed_is_compared_and_pictures_too(monkeypatch):
    opened = []

    def fails_later(*args):
        opened.append(args)
        if len(opened) > 1:
            raise ValueError
        return PlainLoop(*args)

    def no_memory(*args):
        raise MemoryError

    plant(monkeypatch, {"fused": PlainLoop, "captured": Black, "plain": Stuck, "compiled": fails_later})
    monkeypatch.setattr(inspection, "profiled", no_memory)
    result = run(replace(OPTIONS, blocks=2, baselines=("plain", "compiled")), lambda message: None)
    facts = result.facts["candidates"]
    assert facts["fused"]["refused"] is None and "MemoryError" in facts["fused"]["not_seen"]
    assert facts["fused"]["memory"]["cache"] > 0 and "profile" not in facts["fused"]
    assert "frames of block 0 " in facts["captured"]["refused"]
    assert "round 1" in facts["plain"]["refused"] and "latents of block 3 " in facts["plain"]["refused"]
    assert "round 1" in facts["compiled"]["refused"] and "ValueError" in facts["compiled"]["refused"]
    assert {name.partition("/")[0] for name in result.series} == {"eager", "fused"}


def test_what_is_no_number_or_of_another_size_is_refused_with_a_reason():
    engine = open_engine(SMALL)
    fused = executor_candidate(engine, "fused", random_prompt(engine, 0), SMALL)
    good, frames = torch.ones(3, 2, 4, 4), np.full((2, 8, 8, 3), 100, np.uint8)
    checker = OutputChecker([BlockOutput(good, frames, {})], 1e-3)
    for output, part, value, expected in (
        (BlockOutput(good * torch.nan, frames, {}), "latents", "nan", "1.0e-03"),
        (BlockOutput(good[1:], frames, {}), "latents", "[2, 2, 4, 4]", "[3, 2, 4, 4]"),
        (BlockOutput(good, frames[1:], {}), "frames", "[1, 8, 8, 3]", "[2, 8, 8, 3]"),
        (BlockOutput(good, frames + 3, {}), "frames", "3.0", "2.0"),
    ):
        reason = checker.refusal(fused, [output])
        assert all(text in reason for text in (f"{part} of block 0", value, expected)), reason
    for latents in (good * torch.nan, good[1:]):
        assert checker.largest_difference([BlockOutput(latents, frames, {})]) is None
    assert checker.refusal(fused, [BlockOutput(good, frames + 1, {})]) is None
    stream = fused.open()
    stream.session.manager.resources.executor.launcher.fallbacks.append("aten::x cannot be captured")
    assert "aten::x cannot be captured" in checker.refusal(fused, [BlockOutput(good, frames, {})])
    stream.close()


def test_the_clock_stops_while_the_next_block_is_made(monkeypatch):
    started, denoise, decode = [], BlockLoop.denoise, DecoderTrack.decode

    def counted(self, state, record):
        started.append(state)
        return denoise(self, state, record)

    def slow(*args):
        time.sleep(0.02)  # far longer than the host takes to start another block
        return decode(*args)

    monkeypatch.setattr(BlockLoop, "denoise", counted)
    monkeypatch.setattr(DecoderTrack, "decode", slow)
    engine = open_engine(SMALL)
    stream = EngineStream(engine, random_prompt(engine, 0), 0, (32, 32))
    outputs, intervals = stream.run(2)
    stream.close()
    assert (len(outputs), len(intervals)) == (3, 2) and len(started) > 3


def test_weights_joined_by_a_closed_engine_get_their_own_memory_again():
    engine = open_engine(SMALL)
    fused = executor_candidate(engine, "fused", random_prompt(engine, 0), SMALL)
    outputs = outputs_of(fused.open(), [True])
    weights = list(engine.parts.transformer.parameters())
    assert not all(map(owns_storage, weights))
    fused.drop()
    inspection.unshare_weights(engine)
    assert all(map(owns_storage, weights))
    assert torch.equal(outputs_of(fused.open(), [True])[0].latents, outputs[0].latents)


def test_intervals_are_only_of_presets_whose_window_stays_full():
    causvid = Subject("wan-tiny", "causvid", size=(16, 16), device="cpu", overrides={"segment_frames": 9})
    result = run(Options(causvid, 1, 2, ("eager",), ("none",)), lambda message: None)
    assert len(result.of("eager")["block"].samples) == 2 and "interval" not in result.of("eager")
    steady = ("self-forcing", "longlive", "krea", "causvid")
    assert [stays_full(PRESETS[name]) for name in steady] == [True, True, True, False]


@pytest.mark.parametrize(
    "subject",
    [FP8, pytest.param(replace(ALL_STEPS, overrides=FEWER_BITS), marks=pytest.mark.slow)],
    ids=["one step", "all steps"],
)
def test_low_precision_candidates_may_differ_as_much_as_low_precision_itself(subject, monkeypatch):
    options = Options(subject, rounds=1, blocks=1, baselines=("plain",))
    result = run(options, lambda message: None)
    facts, bits = result.facts["candidates"], result.facts["bits_off"]
    assert facts["eager"]["difference"] == 0 and facts["plain"]["difference"] < 1e-5  # full precision
    assert facts["eager"]["allowed"] == facts["plain"]["allowed"] == result.facts["tolerance"] < bits
    assert facts["fused"]["difference"] == pytest.approx(bits, rel=0.1)
    assert facts["fused"]["allowed"] == pytest.approx(1.1 * bits)
    assert not any(one["refused"] for one in facts.values())
    families = facts["fused"]["profile"]["families"]
    assert families["packed matmul"]["flops"] > 10 * families.get("matmul", {"flops": 0})["flops"]
    assert result.ceilings["packed_flops"].best > 0
    assert facts["fused"]["memory"]["cache"] < facts["eager"]["memory"]["cache"]
    config = result.settings["config"]
    assert (config["lowp"], config["kv_dtype"]) == ("fp8", "fp8")
    full = next(islice(scheduled_blocks(open_engine(subject).preset), 1, None))
    more = sum(pass_work(MODELS["wan-tiny"], scheduled.run, (32, 32), "float32").nbytes for scheduled in full.passes)
    work = result.facts["work"]
    assert work["transformer"]["nbytes"] == more > work["fewer_bits"]["transformer"]["nbytes"] / 0.6
    assert len(work["fewer_bits"]["passes"]) == len(work["passes"])
    assert {name for name, one in facts.items() if one["fewer_bits"]} == {"fused"}
    text = page({"a.json": result}, "results", "page.md", {})
    assert "float32, fp8 linears, fp8 pages (CPU" in text
    assert f"{bits:.1e}" in text

    plant(monkeypatch, {"fused": NoCommit}, fewer_bits=True)
    fused = run(options, lambda message: None).facts["candidates"]["fused"]
    assert "latents of block 1 " in fused["refused"] and f"{fused['allowed']:.1e}" in fused["refused"]


def test_settings_are_of_the_engine_or_of_the_preset():
    overrides = {"lowp": "int8", "lowp_keep": "blocks.0.*", "sink_size": 3}
    subject = replace(SMALL, executor="fused", frames_in_window=9, overrides=overrides)
    engine = open_engine(subject)
    assert (engine.config.lowp, engine.config.lowp_keep, engine.config.kv_dtype) == ("int8", ("blocks.0.*",), None)
    assert (engine.preset.context.sink_size, engine.preset.context.local_attn_size) == (3, 9)
    oracle = full_precision_engine(engine)
    assert (oracle.config.executor, oracle.config.lowp, oracle.config.lowp_keep) == ("eager", None, ())
    assert oracle.parts is engine.parts
    with pytest.raises(UsageError, match="'fp4'"):
        open_engine(replace(SMALL, overrides={"lowp": "fp4"}))
    for key, expected in (("lora", "'lora'"), ("lowpp", "'lowp'")):
        with pytest.raises(UsageError, match=expected):
            open_engine(replace(SMALL, overrides={key: "x"}))


@pytest.mark.parametrize("preset", ["self-forcing-framewise", "longlive", "causvid", "krea"])
def test_the_plain_loop_equals_the_engine(preset):
    settings = {"segment_frames": 6} if preset == "causvid" else {}
    settings |= {"local_attn_size": 6, "sink_size": 2} if preset in ("longlive", "self-forcing-framewise") else {}
    settings |= {"noise_scale": 1.2} if preset == "longlive" else {}
    engine = load("wan-tiny", preset=preset, device="cpu", dtype="float32", **settings)
    rows = random_prompt(engine, 0)
    loop = PlainLoop(engine, rows, 1, (16, 16), run_layer)
    with engine.open(prompt_embeds=rows, seed=1, size=(16, 16)) as session:
        for block in session.stream(blocks_until_full(engine.preset) + 2):
            ours = loop.step()
            assert relative_difference(ours.latents, block.latents) < 1e-5
            assert abs(ours.frames.astype(int) - block.frames).max() <= 1


def test_all_layers_of_the_plain_loop_run_compiled_at_the_full_window(monkeypatch):
    """The compiler by a fake, which shows what is compiled, how often it runs, and that outputs are the same."""
    options, passes = [], []

    def compiler(run, **given):
        options.append(given)
        return lambda *arguments: passes.append(len(arguments[1])) or run(*arguments)

    monkeypatch.setattr(torch, "compile", compiler)
    baseline.compiled_layers.cache_clear()
    engine = load("wan-tiny", preset="self-forcing", device="cpu", dtype="float32", local_attn_size=6)
    rows = random_prompt(engine, 0)
    plain = PlainLoop(engine, rows, 1, (16, 16), run_layer)
    loop = PlainLoop(engine, rows, 1, (16, 16), run_layer, baseline.compiled_layers())
    baseline.compiled_layers.cache_clear()
    for _ in range(3):
        assert torch.equal(loop.step().latents, plain.step().latents)
    assert options == [{"dynamic": False, "mode": "reduce-overhead"}]
    assert passes == [engine.spec.num_layers] * 2 * 5  # the blocks at a full window, five passes each


@pytest.mark.slow
def test_all_layers_of_the_plain_loop_are_traced_as_one_graph():
    """torch.compile's tracing, without its code generation: one graph, and the same outputs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    engine = load("wan-tiny", preset="self-forcing", device="cpu", dtype="float32", local_attn_size=6)
    rows = random_prompt(engine, 0)
    plain = PlainLoop(engine, rows, 1, (16, 16), run_layer)
    loop = PlainLoop(engine, rows, 1, (16, 16), run_layer, torch.compile(run_layers, dynamic=False, backend=counter))
    for _ in range(4):
        assert relative_difference(loop.step().latents, plain.step().latents) < 1e-5
    assert counter.frame_count == 1


def test_the_plain_loop_gives_a_reason_for_presets_that_it_cannot_run():
    assert "several noise levels" in unsupported_reason(PRESETS["rolling-forcing"])
    assert "positions move" in unsupported_reason(PRESETS["longlive-infinity"])
    assert "guidance" in unsupported_reason(PRESETS["causal-diffusion"])
    assert "rest" in unsupported_reason(make_preset("tinyworld", positions="absolute"))
    assert unsupported_reason(make_preset("tinyworld", positions="absolute", rest_sink=0)) is None


def test_full_windows_and_their_work():
    blocks = {name: blocks_until_full(PRESETS[name]) for name in ("self-forcing", "longlive", "krea", "causvid")}
    assert blocks == {"self-forcing": 6, "longlive": 3, "krea": 1, "causvid": 6}
    spec = MODELS["wan-1.3b"]
    plan = next(islice(scheduled_blocks(PRESETS["self-forcing"]), 6, None))
    work = [pass_work(spec, scheduled.run, spec.default_size, "bfloat16") for scheduled in plan.passes]
    assert sum(one.flops for one in work) == pytest.approx(202e12, rel=0.01)
    decoder = decoder_work(WAN21_VAE, spec.latent_size(spec.default_size), 3, "bfloat16")
    assert decoder.flops == pytest.approx(40.7e12, rel=0.01)
    with pytest.raises(UsageError, match="frames_in_window"):
        blocks_until_full(make_preset("self-forcing", local_attn_size=-1))


def test_random_weights_are_drawn_in_place():
    with torch.device("meta"):
        module = WanTransformer(MODELS["wan-tiny"])
    ours = draw_weights(module, 3, torch.bfloat16, "cpu")
    again = open_engine(replace(SMALL, dtype="bfloat16", seed=3)).parts.transformer
    for name, weight in ours.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.isfinite(weight).all()
        assert torch.equal(weight, again.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "wan-1.3"}, r"'wan-1\.3'.*'wan-1\.3b'"),
        ({"model": "some.pt", "random_weights": True}, "random_weights.*'some.pt'"),
        ({"preset": "krea"}, "frames_in_window is 6.*krea"),
        ({"overrides": {"local_attn_size": 9}}, "frames_in_window is 6.*local_attn_size is 9"),
        ({"vae": "vae.pth"}, "vae is 'vae.pth'"),
        ({"frames_in_window": 0}, "local_attn_size is 0"),
    ],
)
def test_subjects_that_cannot_be_measured(change, expected):
    with pytest.raises(UsageError, match=expected):
        open_engine(replace(SMALL, **change))


def test_names_and_numbers_of_the_command(tmp_path):
    for change, expected in (({"rounds": 0}, "rounds is 0"), ({"blocks": 0}, "blocks is 0")):
        with pytest.raises(UsageError, match=expected):
            Options(SMALL, **change)
    base = ["bench", "block", "--size", "32x32", "--frames-in-window", "6", "--device", "cpu", "--rounds", "1"]
    runner = CliRunner()
    for option, name, expected in (
        ("--executor", "fussed", "'fused'"), ("--executor", "captured", "GPU"), ("--baseline", "eager", "plain")
    ):
        failed = runner.invoke(app, [*base, option, name])
        assert failed.exit_code == 2 and f"{option[2:]} {name!r}" in failed.stderr and expected in failed.stderr
    out = tmp_path / "block.json"
    done = runner.invoke(app, [*base, "--blocks", "1", "--executor", "eager", "--baseline", "none",
                                "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(out.read_text())
    assert read_result(out).facts["candidates"].keys() == {"eager"}
    assert "GPU" in done.stderr and "random" in done.stderr


def test_launches_are_calls_that_hand_over_work():
    names = ["cudaLaunchKernel", "aten::mm", "cudaGraphLaunch", "cudaMemcpyAsync", "cuLaunchKernelEx_v11060"]
    assert count_launches(names) == {"graphs": 1, "kernels": 2}


def test_the_graph_check_of_a_preset_on_a_cpu(monkeypatch):
    for subject in (SMALL, FP8):
        facts, wrong = check_graph(subject)
        assert wrong == [] and facts["fused off by"] <= facts["fused allowed"]
        assert (facts["bits_off"] is None) == (subject is SMALL)
    monkeypatch.setattr("inferix.bench.gpu_check.candidates.TOLERANCE", {torch.float32: -1.0})
    (fault,) = check_graph(SMALL)[1]
    assert fault.startswith("fused: ") and "latents of block 0 " in fault
