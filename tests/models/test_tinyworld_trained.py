"""The weights in the package: they follow prompts and actions, repeat themselves for a seed, and go on and on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import inferix
from inferix.errors import InferixError
from inferix.evaluate.tinyworld import facing_after, hero_is, shift_between
from inferix.models.registry import FAMILIES
from inferix.models.tinyworld.world import FRAMES, MOVES, Scene

SCENE = Scene("red", "robot", "green meadow", "by day")
WALK = ["right"] * 3 + ["down"] * 3


@pytest.fixture(scope="module")
def engine():
    return inferix.load("tinyworld", device="cpu")


def pictures(engine, scene=SCENE, actions=WALK, seed=0):
    """The last picture of each latent frame."""
    with engine.open(prompt=scene.prompt, seed=seed, actions=actions) as session:
        return np.stack([block.frames[-1] for block in session.stream(len(actions) + 1)])


def test_it_is_what_is_loaded_without_a_name(engine):
    checkpoint = inferix.load(device="cpu").describe()["checkpoint"]
    assert checkpoint == engine.describe()["checkpoint"]
    assert checkpoint["source"] == "tinyworld"  # and not where it lies


def test_the_same_seed_makes_the_same_video_and_another_seed_another_land(engine):
    video = pictures(engine)
    assert (video == pictures(engine)).all()
    assert np.abs(video.astype(int) - pictures(engine, seed=1)).mean() > 1


def test_the_prompt_says_who_walks_and_where(engine):
    meadow = pictures(engine)
    for colour in ("blue", "white"):
        scene = Scene(colour, "robot", "green meadow", "by day")
        assert hero_is(scene, WALK[-1], facing_after(WALK), pictures(engine, scene)[-1])
    assert hero_is(SCENE, WALK[-1], facing_after(WALK), meadow[-1])
    green = meadow[-1].mean((0, 1))
    white = pictures(engine, Scene("red", "robot", "snowy forest", "by day"))[-1].mean((0, 1))
    night = pictures(engine, Scene("red", "robot", "green meadow", "at night"))[-1].mean((0, 1))
    assert green[1] > green[2] + 30
    assert white[2] > green[2] + 40
    assert night.mean() < 0.6 * green.mean()


def test_a_new_prompt_changes_the_picture_on_the_way(engine):
    with engine.open(prompt=SCENE.prompt, actions=["right"] * 8) as session:
        before = [block.frames[-1] for block in session.stream(4)][-1]
        session.prompt("a red robot in a snowy forest by day")
        after = [block.frames[-1] for block in session.stream(4)][-1]
    assert after.mean((0, 1))[2] > before.mean((0, 1))[2] + 40


def test_the_camera_goes_where_the_action_says(engine):
    right = total = 0
    for seed, action in enumerate(("right", "left", "up", "down")):
        ends = pictures(engine, actions=[action] * 6, seed=seed)
        for before, after in pairwise(ends[1:]):
            right += shift_between(before, after) == MOVES[action]
            total += 1
    assert right / total >= 0.6  # a landmark may stand in the way


@pytest.mark.parametrize("blocks", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_window_and_sink_hold_over_a_long_walk(engine, blocks):
    policy = engine.preset.context
    with engine.open(prompt=SCENE.prompt, actions=(["right"] * 4 + ["up"] * 4) * 38) as session:
        for block in session.stream(blocks - 1, decode=False):
            frames = session.current.branches[0].cache.frames
            assert len(frames) == min(block.index + 1, policy.local_attn_size)
            assert (frames[0], frames[-1]) == (0, block.index)
        session.decoder = engine.parts.vae.new_state()
        last = next(session.stream(1)).frames
    assert last.shape == (1, 64, 64, 3) or last.shape == (FRAMES, 64, 64, 3)
    assert last.std() > 5  # not a flat picture


def test_the_sink_of_a_rest_is_kept_in_the_cache(engine):
    walk = [*["right"] * 2, *["stay"] * 8, *["right"] * 4]
    with engine.open(prompt=SCENE.prompt, actions=walk) as session:
        kept = []
        for block in session.stream(11, decode=False):
            kept.append(session.current.branches[0].cache.frames)
            assert np.isfinite(block.latents.numpy()).all()
        assert session.current.timeline.sink == (2, 3, 4, 5)
        with session.fork() as fork:
            next(fork.stream(1, decode=False))
            assert fork.current.timeline.sink == (2, 3, 4, 5)
        for _ in session.stream(4, decode=False):
            kept.append(session.current.branches[0].cache.frames)
    assert kept[6:9] == [(0, 2, 3, 4, 5, 6), (2, 3, 4, 5, 6, 7), (2, 3, 4, 5, 7, 8)]
    assert kept[11] == (2, 3, 4, 5, 10, 11)
    assert kept[12:] == [(2, 3, 4, 10, 11, 12), (2, 3, 10, 11, 12, 13), (2, 10, 11, 12, 13, 14)]


def test_missing_weights_ask_for_a_new_installation(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES["tinyworld"].shipped, "tinyworld", tmp_path / "gone")
    with pytest.raises(InferixError, match=r"tinyworld.*gone'.*reinstall"):
        inferix.load(device="cpu")


@pytest.mark.slow
def test_the_rewritten_graph_makes_the_same_video(engine):
    """In pictures; test_tiny.py compares the latents."""
    fused = inferix.load("tinyworld", device="cpu", executor="fused")
    difference = pictures(fused).astype(int) - pictures(engine)
    assert np.abs(difference).max() <= 1
