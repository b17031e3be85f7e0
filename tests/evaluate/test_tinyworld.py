"""The judge of the small world: right for the simulator itself, wrong for what is wrong, and the shipped weights."""

import random

import numpy as np
import pytest

import inferix
from inferix.evaluate import tinyworld as judge
from inferix.evaluate.tinyworld import random_walks, shift_between, signals
from inferix.models.tinyworld.world import FRAMES, STEP

QUIET = lambda said: None  # noqa: E731


@pytest.fixture(scope="module")
def engine():
    return inferix.load("tinyworld", device="cpu")


def true_pictures(engine, walk, given, seed):
    return walk.pictures[(given - 1) * FRAMES + 1 :]


def frozen_pictures(engine, walk, given, seed):
    still = walk.pictures[(given - 1) * FRAMES]
    return np.repeat(still[None], (len(walk.actions) + 1 - given) * FRAMES, 0)


def test_the_camera_is_read_off_pictures():
    right = total = 0
    for walk in random_walks(20, 8, seed=9):
        for step, ((x, y), (to_x, to_y)) in enumerate(zip(walk.places, walk.places[1:], strict=False)):
            moved = ((to_x - x) // STEP, (to_y - y) // STEP)
            right += shift_between(walk.ends[step], walk.ends[step + 1]) == moved
            total += 1
    assert right / total >= 0.97


def test_the_simulator_itself_reaches_every_bar(engine, monkeypatch):
    monkeypatch.setattr(judge, "made", true_pictures)
    assert judge.actions_right(engine, 4, QUIET) >= 0.95
    assert judge.first_two_seconds(engine, 2, QUIET) > 60
    assert judge.landmark_return(engine, 4, QUIET) == 1.0


def test_a_frozen_picture_reaches_none(engine, monkeypatch):
    monkeypatch.setattr(judge, "made", frozen_pictures)
    assert judge.actions_right(engine, 6, QUIET) < 0.7
    assert judge.first_two_seconds(engine, 6, QUIET) < 22


def test_landmarks_that_are_gone_are_missed(engine, monkeypatch):
    def emptied(engine, walk, given, seed):
        pictures = true_pictures(engine, walk, given, seed).copy()
        for mark in judge.landmarks_near(walk.world.seed, *walk.places[-1], 40):
            where = judge.around(mark, walk.places[-1])
            pictures[-1][where] = walk.world.picture_without(mark)[where]
        return pictures

    monkeypatch.setattr(judge, "made", emptied)
    assert judge.landmark_return(engine, 4, QUIET) <= 0.3


def test_signals_tell_dark_flat_and_blurred_apart():
    pictures = next(random_walks(1, 2, seed=3)).ends
    bright, contrast, saturation, sharp = signals(pictures)
    dark = signals(pictures // 2)
    assert dark[0] == pytest.approx(bright / 2, rel=0.02)
    grey = signals(np.repeat(pictures.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1))
    assert grey[2] < 0.01 * saturation
    flat = signals(np.broadcast_to(pictures.mean((1, 2), keepdims=True), pictures.shape).astype(np.uint8))
    assert flat[1] < 0.01 * contrast
    assert flat[3] < 0.01 * sharp


def test_land_that_was_seen_is_known():
    walk = judge.simulate(next(random_walks(1, 1, seed=1)).scene, 4, ["stay"] * 3)
    assert judge.seen_before(walk, 1, 3).all()
    walk.places[3] = (walk.places[0][0] + 16, walk.places[0][1])
    seen = judge.seen_before(walk, 1, 3)
    assert seen[:, :48].all()
    assert not seen[:, 48:].any()


def test_a_prompt_an_action_and_a_seed_each_change_the_picture_and_nothing_else_does(engine):
    def last(prompt="a red robot in a snowy forest by day", actions=("right",) * 4, seed=0):
        with engine.open(prompt=prompt, seed=seed, actions=list(actions)) as session:
            return np.concatenate([block.frames for block in session.stream(5)])

    base = last()
    assert base.shape == (17, 64, 64, 3)
    assert (base == last()).all()
    for other in (last(prompt="a blue ghost in a sandy desert at night"), last(actions=("left",) * 4), last(seed=1)):
        assert np.abs(base[-1].astype(int) - other[-1]).mean() > 2


def test_the_prompt_is_in_the_picture(engine):
    """Night is darker than day, snow is brighter than autumn."""

    def brightness(prompt):
        with engine.open(prompt=prompt) as session:
            return np.mean([block.frames.mean() for block in session.stream(3)])

    assert brightness("a red fox in a green meadow by day") > 1.3 * brightness("a red fox in a green meadow at night")
    assert brightness("a red fox in a snowy forest by day") > 1.3 * brightness("a red fox in an autumn wood by day")


def test_window_and_sink_hold_over_300_blocks(engine):
    rng = random.Random(1)
    actions = [rng.choice(engine.spec.actions) for _ in range(299)]
    policy = engine.preset.context
    with engine.open(prompt="a white wizard in an autumn wood at sunset", actions=actions) as session:
        for block in session.stream(300, decode=False):
            held = session.branches[0].cache.frames
            assert len(held) == min(block.index + 1, policy.local_attn_size)
            assert held[0] == 0
            assert held[-1] == block.index
            assert block.latents.abs().max() < 20
        (shown,) = session.stream(1)
    assert shown.frames.std() > 5


def test_the_first_bars_hold_loosely_for_the_shipped_weights(engine):
    """A smoke test on few walks; `inferix eval tinyworld` has the figures of the model card."""
    found = judge.evaluate(engine, walks=2, seeds=1, minutes=1.0)
    assert set(found["passed"]) == set(judge.BARS)
    assert found["reconstruction_db"] > 22
    assert found["first_2s_db"] > 10
    assert set(found["drift"]) == set(judge.SIGNALS)
