"""The passes that a stream runs, held against a recording: frames, timesteps, contexts, positions and writes.

`recorded_passes.json` has a hash of every block's passes, and the passes themselves of some blocks. It holds host
integers and timesteps, so it is the same on every machine. To record again, after a change of a scheme that is meant:

    INFERIX_RECORD_PASSES=1 pytest tests/runtime/test_recorded_passes.py
"""

import dataclasses
import hashlib
import json
import os
from itertools import groupby
from pathlib import Path

import pytest
from oracles import ROWS, WAN_PRESETS, make_engine

from inferix.models.registry import PRESETS, make_preset
from inferix.runtime.kv import paged_cache
from inferix.runtime.sampler import Sampler
from inferix.schemes.block_schedule import next_block, recache_pass
from inferix.schemes.timeline import Timeline

FILE = Path(__file__).with_name("recorded_passes.json")
RECORD = bool(os.environ.get("INFERIX_RECORD_PASSES"))
BLOCKS, PROMPT_AT, CUT_AT = 16, 12, 14  # a new prompt and a scene cut come before these blocks
ONE_FRAME = ("self-forcing-framewise", "causal-forcing-2step", "sgf-plus-framewise")
LONGER = dict.fromkeys(ONE_FRAME, 24)  # until a window of 21 has rolled
READABLE = (0, 1, 4, 8, PROMPT_AT, CUT_AT, CUT_AT + 1)
SIZE = (16, 16)
OTHER = ROWS.float().flip(0)
NEGATIVE = {"causal-diffusion": {"negative_embeds": OTHER}}
STEPS = {"causal-diffusion": {"num_steps": 2}, "self-forcing": {"denoising_step_list": (1000, 750, 500, 250)}}


def ranges(numbers):
    """(0, 1, 2, 6) as `0-2,6`."""
    offsets = groupby(enumerate(numbers), key=lambda numbered: numbered[1] - numbered[0])
    runs = [[number for _, number in run] for _, run in offsets]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def line(run):
    """A pass as text, group by group."""
    return " + ".join(
        f"{ranges(group.frames)} @{group.timestep:.3f} sees {ranges(group.context)} at {ranges(group.positions)}"
        f"{' writes' if group.write else ''}"
        for group in run.groups
    )


def passes_of(name, monkeypatch, **overrides):
    """Passes of each block, where they meet their pages; one that several branches run counts once."""
    passes, place = [], paged_cache.layout_pass

    def note(run, *args):
        if not passes or passes[-1] != dataclasses.replace(run, weights=passes[-1].weights):
            passes.append(run)
        return place(run, *args)

    monkeypatch.setattr(paged_cache, "layout_pass", note)
    engine, blocks = make_engine(name, "float32", **STEPS.get(name, {}) | overrides), []
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, **NEGATIVE.get(name, {})) as session:
        for index in range(LONGER.get(name, BLOCKS)):
            if index == PROMPT_AT:
                session.prompt(embeds=OTHER)
            if index == CUT_AT:
                session.current.timeline.cut_shot()
            list(session.stream(1, decode=False))
            blocks.append([line(run) for run in passes])
            passes.clear()
    return blocks


def digests(blocks):
    return [hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] for lines in blocks]


def write_recording(name, blocks):
    recording = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    recording[name] = {"sha256": digests(blocks), "blocks": {str(index): blocks[index] for index in READABLE}}
    FILE.write_text(json.dumps({key: recording[key] for key in PRESETS if key in recording}, indent=1) + "\n", "utf-8")


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_a_stream_runs_the_recorded_passes(name, monkeypatch):
    blocks = passes_of(name, monkeypatch)
    if RECORD:
        write_recording(name, blocks)
    recorded = json.loads(FILE.read_text("utf-8"))[name]
    assert {index: blocks[int(index)] for index in recorded["blocks"]} == recorded["blocks"]
    assert digests(blocks) == recorded["sha256"]


def scheduled_passes(name):
    """Passes of each block by the block schedule only."""
    preset = make_preset(name, **STEPS.get(name, {}))
    timeline, sampler = Timeline(preset), Sampler(preset.sampler)
    flight, blocks = [], []
    for index in range(LONGER.get(name, BLOCKS)):
        recache = recache_pass(timeline) if index == PROMPT_AT else None
        if index == CUT_AT:
            timeline.cut_shot()
        passes = next_block(timeline, flight, sampler.of_block(index).timesteps).passes
        blocks.append([line(scheduled.run) for scheduled in (recache, *passes) if scheduled is not None])
    return blocks


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_the_block_schedule_lists_the_recorded_passes(name):
    assert digests(scheduled_passes(name)) == json.loads(FILE.read_text("utf-8"))[name]["sha256"]


def test_the_recording_rejects_a_sink_that_is_left_out(monkeypatch):
    recorded = json.loads(FILE.read_text("utf-8"))["longlive"]["sha256"]
    actual = digests(passes_of("longlive", monkeypatch, sink_size=0))
    rolls = PRESETS["longlive"].context.local_attn_size // PRESETS["longlive"].num_frame_per_block
    assert actual[:rolls] == recorded[:rolls]
    assert all(one != other for one, other in zip(actual[rolls:], recorded[rolls:], strict=True))
