"""The block schedule against what the engine runs, against a plain loop over the timeline, and by hand."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from oracles import ROWS, SIZE, WAN_PRESETS, make_engine

from inferix.graphs.passes import Group, Pass
from inferix.graphs.types import Runs
from inferix.models.registry import make_preset
from inferix.runtime.block_loop import BlockLoop
from inferix.runtime.programs.block_plan import plan_block
from inferix.runtime.sampler import Sampler, scheduled_blocks
from inferix.schemes.block_schedule import (
    BlockProgress,
    ScheduledPass,
    commit_pass,
    next_block,
    rebuild_pass,
    recache_pass,
    stream_blocks,
    window_of,
)
from inferix.schemes.page_needs import window
from inferix.schemes.presets import Preset
from inferix.schemes.timeline import Timeline

NEGATIVE = {"causal-diffusion": {"negative_embeds": ROWS.float().flip(0)}}
FEW = {"causal-diffusion": {"num_steps": 3}}
VARIANTS = [
    *((name, FEW.get(name, {})) for name in WAN_PRESETS),
    ("self-forcing", {"local_attn_size": 9, "sink_size": 3, "independent_first_frame": True}),
    ("longlive", {"recache_sink": True}),
    ("causvid", {"segment_frames": 7, "rebuild_frames": 4}),
    ("krea", {"rebuild_frames": 6}),
    ("rolling-forcing", {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]}),
    ("rolling-forcing", {"independent_first_frame": True}),
]
IDS = [f"{name} {overrides}" if overrides else name for name, overrides in VARIANTS]


def record_passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """Passes of the first branch as the engine runs them; the network's velocity is zero."""
    ran: list[Pass] = []

    def forward(self, requests):
        ran.extend(request.run for request in requests)
        return [torch.zeros_like(request.latents) for request in requests]

    monkeypatch.setattr(BlockLoop, "forward", forward)
    return ran


@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=IDS)
def test_the_engine_runs_the_schedule(name: str, overrides: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks, with a new prompt before the seventh."""
    engine, ran = make_engine(name, dtype="float32", **overrides), record_passes(monkeypatch)
    rows = ROWS.float()
    with engine.open(prompt_embeds=rows, size=SIZE, **NEGATIVE.get(name, {})) as session:
        list(session.stream(6, decode=False))
        session.prompt(embeds=rows.flip(0))
        list(session.stream(4, decode=False))
    preset = engine.preset
    timeline, sampler = Timeline(preset), Sampler(preset.sampler)
    flight: list[BlockProgress] = []
    expected: list[Pass] = []
    for block in range(10):
        recache = recache_pass(timeline) if block == 6 else None
        if recache is not None:
            assert recache.clears_cache == preset.context.recache_sink
            expected.append(recache.run)
        assert (recache is not None) == (block == 6 and preset.context.prompt_switch == "recache")
        for scheduled in next_block(timeline, flight, sampler.of_block(block).timesteps).passes:
            expected += scheduled.branch_runs(preset.sampler.guide).values()
    assert ran == expected


@pytest.mark.parametrize("rebuilds", [False, True])
def test_passes_over_the_past_have_the_condition_of_a_commit(rebuilds: bool) -> None:
    """As the network of a distilled model asks for with each timestep."""
    alone = {"window_blocks": 1, "commit_in_next": False, "clean_text": "prompt", "local_attn_size": 12}
    ranges = {"noise2clean_kvrange": (), "clean_chunk_kvrange": 0}
    again = {"segment_frames": 12, "rebuild_frames": 6, "prompt_switch": "cut"}
    switch = again if rebuilds else {"prompt_switch": "recache"}
    preset = make_preset("magi-tiny-distill", **alone, **ranges, **switch)
    timeline = Timeline(preset)
    spans = [timeline.admit() for _ in range(2)]
    commit = commit_pass(timeline, spans[0])  # before a rebuild moves the frames
    scheduled = rebuild_pass(timeline) if rebuilds else recache_pass(timeline)
    assert scheduled is not None and scheduled.run.condition is not None
    assert scheduled.run.condition == commit.run.condition == preset.sampler.condition(0)


def test_frames_of_a_clamped_image_are_clean_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ran = make_engine("longlive2", dtype="float32"), record_passes(monkeypatch)
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, image=image) as session:
        list(session.stream(2, decode=False))
    timesteps = Sampler(engine.preset.sampler).timesteps
    blocks = list(islice(stream_blocks(engine.preset, timesteps, frozenset({0})), 2))
    assert ran == [scheduled.run for block in blocks for scheduled in block.passes]
    for scheduled, timestep in zip(blocks[0].passes, timesteps, strict=False):
        assert [group.frames for group in scheduled.run.groups] == [(0,), tuple(range(1, 8))]
        assert scheduled.run.timesteps == (0.0, *[timestep] * 7)


def test_a_prefix_is_committed_and_the_stream_goes_on_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ran = make_engine("self-forcing", dtype="float32", local_attn_size=9), record_passes(monkeypatch)
    video = np.zeros((21, SIZE[1], SIZE[0], 3), np.uint8)  # six latent frames
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, video=video) as session:
        list(session.stream(2, decode=False))
    timeline, timesteps = Timeline(engine.preset), Sampler(engine.preset.sampler).timesteps
    expected = [commit_pass(timeline, timeline.admit(given=True)) for _ in range(2)]
    blocks = [next_block(timeline, [], timesteps) for _ in range(2)]
    assert [block.span.index for block in blocks] == [0, 1] and not blocks[0].first
    expected += [scheduled for block in blocks for scheduled in block.passes]
    assert ran == [scheduled.run for scheduled in expected]


def plain_passes(preset: Preset, blocks: int) -> list[tuple[str, Pass]]:
    """The passes of a stream by a plain loop over the timeline, which knows no joining rule."""
    timeline, sampler = Timeline(preset), Sampler(preset.sampler)
    passes, flight = list[tuple[str, Pass]](), list[tuple[range, int]]()
    for index in range(blocks):
        timesteps = sampler.of_block(index).timesteps
        if timeline.rebuild_due():
            passes.append(("rebuild", timeline.rebuild_pass()))
        while not flight or flight[0][1] < len(timesteps):
            if len(flight) < preset.window_blocks:
                flight.append((timeline.admit().frames, 0))
            run = timeline.joint_pass([(frames, timesteps[step]) for frames, step in flight], frozenset())
            passes.append(("denoise", run))
            flight = [(frames, step + 1) for frames, step in flight]
        frames, _ = flight.pop(0)
        if preset.context.commit:
            passes.append(("commit", timeline.commit_pass(frames)))
    return passes


@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=IDS)
def test_the_schedule_is_a_plain_loop_over_the_timeline(name: str, overrides: dict) -> None:
    preset, count = make_preset(name, **overrides), 40
    blocks = list(islice(scheduled_blocks(preset), count))
    assert [block.span.index for block in blocks] == list(range(count))
    passes = [scheduled for block in blocks for scheduled in block.passes]
    assert [(scheduled.kind, scheduled.run) for scheduled in passes] == plain_passes(preset, count)
    for scheduled in passes:
        if scheduled.kind == "denoise":
            assert [frame for span in scheduled.blocks for frame in span.frames] == list(scheduled.run.frames)
            assert len(scheduled.steps) == len(scheduled.blocks)
        elif scheduled.kind == "commit":
            assert tuple(scheduled.blocks[0].frames) == scheduled.run.frames and not scheduled.steps
        assert scheduled.clears_cache == (scheduled.kind == "rebuild")
        group = scheduled.run.groups[-1]  # it sees all that earlier groups see
        assert window_of(scheduled.run) == (group.context if group.write else None)
        beside = preset.context.sink_beside_window if group.context[0] > 0 else 0
        assert scheduled.window == (tuple(sorted({*range(beside), *group.context})) if group.write else None)
    finished = [scheduled.blocks[0] for scheduled in passes if scheduled.kind == "commit"]
    assert finished in ([], [block.span for block in blocks])


def test_blocks_join_once_the_newest_has_taken_its_share_of_the_steps() -> None:
    """With two blocks in flight and four steps each, a block joins every second step."""
    preset = make_preset("self-forcing", window_blocks=2)
    first, second, third = islice(scheduled_blocks(preset), 3)

    def steps(passes: tuple[ScheduledPass, ...]) -> list[tuple[int, ...]]:
        return [scheduled.steps for scheduled in passes if scheduled.kind == "denoise"]

    assert steps(first.passes) == [(0,), (1,), (2, 0), (3, 1)]
    assert steps(second.passes) == steps(third.passes) == [(2, 0), (3, 1)]
    planned = [(one.name, one.tables, one.latents, one.steps) for one in plan_block(preset)]
    flight = ("latents.0", "latents.1")
    assert planned[:2] == [("denoise 0", "joint", flight, (2, 0)), ("denoise 1", "joint", flight, (3, 1))]
    assert [span.index for span in second.passes[0].blocks] == [1, 2]


def test_the_cache_holds_what_a_pass_sees_but_for_scratch() -> None:
    def group(frames: range, context: range, write: bool) -> Group:
        return Group(tuple(frames), 0.0, tuple(context), tuple(range(len(context))), write)

    clean, noisy = group(range(3, 6), range(6), True), group(range(6, 9), range(9), False)
    assert window_of(Pass((clean, noisy))) == tuple(range(6))
    assert window_of(Pass((noisy,))) is None
    assert window_of(Pass((clean,))) == tuple(range(6))


PLANNED = {  # passes of a block graph: names and when they run
    "longlive": [("recache", Runs.SWITCH), *((f"denoise {step}", Runs.BLOCK) for step in range(4))],
    "causvid": [("recompute", Runs.REBUILD), *((f"denoise {step}", Runs.BLOCK) for step in range(3))],
    "krea": [("recompute", Runs.BLOCK), *((f"denoise {step}", Runs.BLOCK) for step in range(4))],
    "rolling-forcing": [("denoise", Runs.BLOCK)],
}


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_a_block_graph_has_the_passes_of_a_full_window(name: str) -> None:
    preset = make_preset(name, **FEW.get(name, {}))
    passes = plan_block(preset)
    steps = preset.sampler.steps
    default = [(f"denoise {step}" if steps > 1 else "denoise", Runs.BLOCK) for step in range(steps)]
    if name in ("longlive-infinity", "tinyworld"):
        default = [("recache", Runs.SWITCH), *default]
    commit = [("commit", Runs.BLOCK)] if preset.context.commit else []
    assert [(planned.name, planned.runs) for planned in passes] == [*PLANNED.get(name, default), *commit]
    scheduled = [block.passes for block in islice(scheduled_blocks(preset), 30)]
    own = [planned.run for planned in passes if planned.name not in ("recache", "recompute")]
    assert own in [[one.run for one in block if one.kind != "rebuild"] for block in scheduled]
    assert max(len(run.groups[-1].context) for run in own) == window(preset)
