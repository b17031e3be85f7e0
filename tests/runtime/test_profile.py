"""A profile adds up: passes, kinds of work and calls are the same time; bytes and operations are those of the sizes."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import ROWS, SIZE, make_engine, remade
from programs import traced
from recording import FakeGraphs

from inferix.bench import profile_cost
from inferix.errors import UsageError
from inferix.graphs.cost import PACKED, call_cost, family
from inferix.kernels.block_attention import block_attention
from inferix.runtime import engine as engines
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.sinks import Pump
from inferix.runtime.telemetry.profile import OF_A_MODEL, OTHER, Ceilings, Profile, measure_ceilings

PASSES = ["noise", "denoise 0", "denoise 1", "commit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


def profiled(folder: Path, monkeypatch: pytest.MonkeyPatch, backend: FakeGraphs | None = None) -> Profile:
    """Two blocks, the graphs made once for all tests here."""
    monkeypatch.setattr(engines, "measure_ceilings", lambda device, dtype, lowp: Ceilings(1e9, 1e9))
    engine = make_engine(executor="fused", graphs=str(folder / "graphs"))
    engine = remade(engine, GraphExecutor(engine.config, engine.preset, engine.parts, backend))
    profile = engine.start_profile()
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(2, decode=False))
    return profile


def test_passes_kinds_of_work_and_calls_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = profiled(folder, monkeypatch)
    first, second = profile.blocks
    assert list(profile.passes(first)) == ["prompt", *PASSES]  # the prompt graph runs for the first block only
    assert list(profile.passes(second)) == PASSES
    for block in profile.blocks:
        total = sum(run.seconds for run in block.runs)
        assert sum(profile.passes(block).values()) == pytest.approx(total)
        assert sum(cost.seconds for cost in profile.families(block).values()) == pytest.approx(total)
        assert profile.gaps(block) >= 0
        assert set(block.memory) == {"weights", "pages", "decoder state", "constants", "scratch"}
        assert block.memory["pages"] > 0 and block.memory["scratch"] > 0
    seen = [profile.families(block)["attention"].flops for block in profile.blocks]
    assert seen[1] > seen[0]  # the second block sees twice as many pages
    paths = profile.write(folder / "report")
    assert [path.name for path in paths] == ["trace.json", "profile.txt"]
    text = paths[1].read_text()
    assert profile.clock.how in text
    assert "memory, MB: weights" in text and "denoise 1" in text
    events = json.loads(paths[0].read_text())["traceEvents"]
    calls = [event for event in events if event.get("tid") == 2 and event["ph"] == "X"]
    assert len(calls) == sum(len(run.program.calls) for block in profile.blocks for run in block.runs)
    outer = {event["name"]: event for event in events if event.get("tid") == 1 and event["ph"] == "X"}["commit"]
    inside = [call for call in calls if call["args"]["node"].startswith("commit/")][-1]
    assert outer["ts"] <= inside["ts"] and inside["ts"] + inside["dur"] <= outer["ts"] + outer["dur"] + 1e-3


def test_a_trace_shows_decoding_beside_the_next_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that goes on once the next block's passes have begun."""
    monkeypatch.setattr(engines, "measure_ceilings", lambda device, dtype, lowp: Ceilings(1e9, 1e9))
    engine = make_engine(executor="fused", graphs=str(folder / "graphs"))
    profile = engine.start_profile()
    launch, decode, begun, decoded = profile.launch, engine.parts.vae.decode, [threading.Event() for _ in range(3)], []

    def note_and_launch(*arguments):
        begun[len(profile.blocks)].set()
        launch(*arguments)

    def slow(latents, state):
        decoded.append(len(decoded))
        assert decoded[-1] == 2 or begun[decoded[-1] + 1].wait(60)
        return decode(latents, state)

    monkeypatch.setattr(profile, "launch", note_and_launch)
    monkeypatch.setattr(engine.parts.vae, "decode", slow)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(3))
    shown = {event["name"]: event for event in profile.trace()["traceEvents"] if event["ph"] == "X"}
    for block in range(2):
        decoding, following = shown[f"decode {block}"], shown[f"block {block + 1}"]
        assert decoding["ts"] < following["ts"] + following["dur"]
        assert following["ts"] < decoding["ts"] + decoding["dur"]
        assert decoding["ts"] >= shown[f"block {block}"]["ts"]


def test_a_captured_graph_has_events_at_its_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fake: times of passes come from events, kinds of work from one run of the same calls, and it says so."""
    profile, plain = profiled(folder, monkeypatch, FakeGraphs()), profiled(folder, monkeypatch)
    block = profile.blocks[1]
    (run,) = block.runs
    assert not run.by_call
    assert list(profile.passes(block)) == PASSES
    assert sum(profile.passes(block).values()) == pytest.approx(run.seconds)
    seen = [profile.families(block)["attention"].flops for block in profile.blocks]
    assert seen == [profile.families(block)["attention"].flops for block in plain.blocks] and seen[0] < seen[1]
    assert len(profile.once) == 2 and profile.gaps(block) >= 0
    assert "event nodes between the passes of the captured graph" in profile.text()


def test_bytes_and_operations_of_calls() -> None:
    def run(x, weight, bias, kernel, kv, table, count):
        y = F.linear(x, weight, bias)
        q = y.unflatten(-1, (2, 64))
        seen = block_attention(q, kv, table, count)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2))
        return seen, out, torch.bmm(y, y.mT), F.conv3d(x[:, None, None], kernel)

    count = torch.tensor([3], dtype=torch.int32)
    table = torch.tensor([[0, 2, 1, 0]], dtype=torch.int32)
    program = traced(
        run, torch.zeros(1, 6, 32), torch.zeros(128, 32), torch.zeros(128), torch.zeros(5, 1, 1, 2, 2),
        torch.zeros(2, 8, 10, 2, 64), table, count,
    )  # fmt: skip
    costs = {call.op._schema.name: (family(call), call_cost(call, 3)) for call in program.calls}
    cost = {name: (kind, one.flops, one.nbytes) for name, (kind, one) in costs.items()}
    assert cost["aten::addmm"] == ("matmul", 2 * 6 * 32 * 128, 4 * (6 * 32 + 32 * 128 + 128 + 6 * 128))
    pages = 4 * 2 * 3 * 10 * 128
    assert cost["inferix::block_attention"] == ("attention", 4 * 6 * 128 * 30, 2 * 4 * 6 * 128 + pages + 4 * 4 + 4)
    assert cost["aten::scaled_dot_product_attention"][1] == 4 * 6 * 128 * 6
    assert cost["aten::bmm"][1] == 2 * 6 * 6 * 128
    assert cost["aten::convolution"][1] == 2 * (5 * 5 * 31) * 4


def test_eager_is_timed_by_the_calls_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass is a run of its own, and its outputs are those without a profile."""
    monkeypatch.setattr(engines, "measure_ceilings", lambda device, dtype, lowp: Ceilings(1e9, 1e9))
    engine = make_engine()
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=1) as session:
        (expected,) = session.stream(1, decode=False)
    profile = engine.start_profile()
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=1) as session:
        (block, _) = session.stream(2, decode=False)
    assert torch.equal(block.latents, expected.latents)
    first, second = profile.blocks
    passes = len(engine.preset.sampler.denoising_step_list) + 1
    names = [f"pass {index}" for index in range(passes)]
    assert list(profile.passes(first)) == list(profile.passes(second)) == names
    for each in profile.blocks:
        total = sum(run.seconds for run in each.runs)
        assert all(run.by_call for run in each.runs)
        assert sum(cost.seconds for cost in profile.families(each).values()) == pytest.approx(total)
        assert profile.gaps(each) >= 0
    read = [sum(sum(run.listed.values()) for run in block.runs) for block in profile.blocks]
    frames, layers = engine.preset.num_frame_per_block, engine.spec.num_layers
    assert read == [passes * layers * frames, passes * layers * 2 * frames]
    assert OTHER not in profile.families(second)
    assert OF_A_MODEL in profile.text()


def test_an_op_without_a_cost_is_timed_as_other(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile("a model", torch.device("cpu"), Ceilings(1e9, 1e9))
    profile.observe(lambda: torch.linalg.inv(torch.eye(3)) + 1)
    profile.end_block(0, {"denoise": 1.0}, dict)
    families = profile.families(profile.blocks[0])
    assert families[OTHER].seconds > 0 and families[OTHER].flops == families[OTHER].bytes == 0
    assert families["elementwise"].flops > 0


def test_a_trace_shows_when_sinks_take_frames() -> None:
    class Sink:
        when_full, full = "wait", False

        def __enter__(self):
            return self

        def add(self, frames):
            time.sleep(0.01)

        def __exit__(self, *error):
            return None

    profile = Profile("a model", torch.device("cpu"), Ceilings(1e9, 1e9))
    blocks = [SimpleNamespace(frames=torch.zeros(1).numpy()) for _ in range(2)]
    with Pump(blocks, Sink(), note=profile.note_feed) as pump:
        assert len(list(pump)) == 2
    shown = [event for event in profile.trace()["traceEvents"] if event.get("tid") == 4 and event["ph"] == "X"]
    assert [event["name"] for event in shown] == ["take frames"] * 2
    assert shown[0]["ts"] + shown[0]["dur"] <= shown[1]["ts"] and min(event["dur"] for event in shown) >= 0.009e6


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_packed_layers_have_a_ceiling_of_their_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "measure_ceilings", lambda device, dtype, lowp: Ceilings(1e9, 1e99, 2e9))
    engine = make_engine(executor="fused", dtype="float32", lowp=kind)
    profile = engine.start_profile()
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(1, decode=False))
    actual = profile.families(profile.blocks[0])
    assert actual[PACKED].flops > 0 and actual[PACKED].least == pytest.approx(actual[PACKED].flops / 2e9)
    assert actual["attention"].least == pytest.approx(actual["attention"].flops / 1e9)
    assert Ceilings(1e9, 1e9, 1e8).least(PACKED, 10**9, 0) == 1.0  # numbers can always be widened
    assert (measure_ceilings(torch.device("cpu"), torch.float32, kind).packed or 0) > 0
    assert "packed 2 GFLOP/s" in profile.text()


def test_the_cost_of_profiling_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(UsageError, match="pairs is 19"):
        profile_cost.main(19)
    monkeypatch.setattr(profile_cost, "GROUP", 1)
    monkeypatch.setattr(profile_cost, "WARM", 1)
    try:
        profile_cost.main(2)
    finally:
        torch.set_num_threads(threads)
    report = capsys.readouterr().out
    assert "without 2 blocks" in report and "2 groups of 1 pairs" in report
