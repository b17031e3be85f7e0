"""The judge of the small world: classifiers on held-out worlds, and faults a viewer would see that figures must see."""

import random
from dataclasses import replace

import numpy as np
import pytest
import train_tinyworld_classifiers as training

from inferix.errors import UsageError
from inferix.evaluate import tinyworld_judge as judge
from inferix.evaluate.metrics import WORLD, chosen_scorers
from inferix.evaluate.scorers import View
from inferix.evaluate.tinyworld_classifiers import (
    FILE,
    WORDS,
    WORLD_SCORERS,
    accuracy,
    action_response,
    action_scorer,
    classifiers,
)
from inferix.evaluate.tinyworld_walks import PREFIX, Progress, random_walks, simulate
from inferix.evaluate.video_drift import drift
from inferix.models.files import read_tensors
from inferix.models.tinyworld.data import random_walk
from inferix.models.tinyworld.world import FRAMES, SIZE, STEP, Scene, World

SCENE = Scene("red", "robot", "green meadow", "by day")


@pytest.fixture(scope="module")
def walk():
    rng = random.Random(3)
    return simulate(SCENE, 11, random_walk(rng, 30))


def test_the_stated_accuracy_is_what_is_measured_again():
    measured = training.held_out_accuracy(classifiers(), 80, seed=7)
    for name, share in accuracy().items():
        chance = 3 * (share * (1 - share) / 20) ** 0.5 + 0.02
        assert measured[name] == pytest.approx(share, abs=chance), name
        assert share >= 0.85, name


@pytest.mark.slow
def test_training_runs_from_nothing_and_writes_the_files_layout(tmp_path):
    path = tmp_path / "c.safetensors"
    training.main(path, short=True)
    trained, shipped = read_tensors(path), read_tensors(FILE)
    assert {name: part.shape for name, part in trained.items()} == {name: part.shape for name, part in shipped.items()}


def test_every_hero_is_told_from_the_others():
    scenes = [
        replace(SCENE, colour=colour, hero=hero) for colour in WORDS["colour"][:-1] for hero in WORDS["hero"][:-1]
    ]
    ends = np.stack([simulate(scene, 5, ["down"]).ends[-1] for scene in scenes])
    shown = classifiers().named(ends)
    assert np.mean([(a.colour, a.hero) == (b.colour, b.hero) for a, b in zip(shown, scenes, strict=True)]) >= 0.95


def test_the_action_response_sees_which_action_was_given(walk):
    assert action_response(walk.pictures, walk.actions).mean() >= 0.9
    others = ["left" if action == "right" else "right" for action in walk.actions]
    assert action_response(walk.pictures, others).mean() <= 0.1
    scorer = action_scorer(walk.actions)
    video = drift(iter(walk.pictures), 8, [scorer])
    assert np.isfinite(video.metrics[scorer.name].curve).sum() == len(walk.actions)
    assert min(video.metrics[scorer.name].scores) > 0.6
    with pytest.raises(UsageError, match="'jump'"):
        action_scorer(["jump"])


def test_scorers_of_the_small_world_by_name(walk):
    scorers = chosen_scorers(WORLD)
    assert tuple(WORLD_SCORERS) == WORLD and all(len(scorer.weights) == 64 for scorer in scorers)
    other = simulate(replace(SCENE, biome="sandy desert", light="at night"), 11, walk.actions).pictures
    metrics = drift([*walk.pictures[:60], *other[:60]], 8, scorers, segments=4).metrics
    assert metrics["tinyworld_words"].scores[0] > 0.9 and metrics["tinyworld_words"].scores[-1] < 0.6
    large = np.repeat(np.repeat(walk.pictures[0], 2, 0), 2, 1)
    views = [View(picture, 0, 8.0) for picture in (walk.pictures[0], large)]
    assert scorers[1].score(views[:1]) == scorers[1].score(views[1:])


def test_at_rest_only_butterflies_and_the_hero_move():
    for index in range(3):
        rest = simulate(SCENE, index, ["stay"] * 24)
        still = judge.still_land(rest.world)
        assert still.mean() > 0.5
        assert judge.land_changed(rest.ends[13], rest.ends[0], still) == 0
        moved = np.roll(rest.ends[0], 4, axis=1)
        assert judge.land_changed(moved, rest.ends[0], still) > 0.05


def dissolved(pictures):
    """Pictures whose details run until little but ground is left."""
    soft = pictures.astype(np.float64)
    for _ in range(80):
        soft = (soft + np.roll(soft, 1, 1) + np.roll(soft, -1, 1) + np.roll(soft, 1, 2) + np.roll(soft, -1, 2)) / 5
    return soft.astype(np.uint8)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(judge, "RESTS", {"rest_10s_changed": 2, "rest_60s_changed": 4})


@pytest.mark.parametrize("fails", [False, True])
def test_a_rest_that_dissolves_fails_and_the_simulators_does_not(short, monkeypatch, fails):
    def generated(engine, walk, given, seed):
        pictures = walk.pictures[(given - 1) * FRAMES + 1 :]
        return dissolved(pictures) if fails else pictures

    monkeypatch.setattr(judge, "generate", generated)
    figures, heroes = judge.resting(None, 4, Progress())
    assert (figures["rest_60s_changed"].mean > 0.05) == fails
    assert (np.mean(heroes) < 0.98) == fails


@pytest.mark.parametrize("fails", [False, True])
def test_a_rest_after_a_walk_is_far_from_the_first_frame(monkeypatch, fails):
    walks = []

    def generated(engine, walk, rest, seed):
        walks.append((walk, rest))
        return dissolved(walk.ends[-1:])[0] if fails else walk.ends[-1]

    monkeypatch.setattr(judge, "rested", generated)
    assert (judge.long_resting(None, 2, Progress()).mean > 0.05) == fails
    assert (judge.resting_away(None, 3, Progress()).mean > 0.05) == fails
    assert [rest for _, rest in walks] == [480] * 2 + [120] * 3
    for walk, _ in walks:
        assert set(walk.actions[1 - PREFIX :]) == {"stay"}
    for walk, _ in walks[2:]:
        assert np.abs(np.subtract(walk.places[-1], walk.places[0])).max() >= SIZE - STEP


def test_a_hero_that_loses_its_head_is_not_the_hero():
    rng = random.Random(0)
    scene = replace(SCENE, colour="blue")
    for kind in training.BROKEN:
        pictures = np.stack([training.draw_picture(rng, scene, 1 << 21, kind)[0] for _ in range(20)])
        assert judge.hero_share(scene, pictures) <= 0.25, kind
    whole = np.stack([training.draw_picture(rng, scene, (1 << 21) + index, None)[0] for index in range(20)])
    assert judge.hero_share(scene, whole) >= 0.9
    assert judge.words_share(scene, whole) >= 0.95


def test_bare_land_has_no_coverage():
    walks = list(random_walks(6, 20, seed=5))
    bare = np.stack([training.draw_picture(random.Random(1), SCENE, 1, None)[0]])
    bare = np.full_like(bare, bare.mean((1, 2), keepdims=True).astype(np.uint8)).repeat(21, 0)
    assert judge.coverage([judge.things(walk.ends, walk.ends) for walk in walks]).mean == 1
    assert judge.coverage([judge.things(bare, walk.ends) for walk in walks]).mean < 0.3


def test_circles_return_and_straight_walks_go_far():
    rng = random.Random(2)
    walk = judge.circle(rng, 2)
    assert walk.places[0] == walk.places[4] == walk.places[-1] and len(walk.actions) == 8
    world = World((1 << 20) + 4, SCENE)
    actions = judge.straight(rng, 40, world)
    walked = World((1 << 20) + 4, SCENE)
    walked.walk(actions)
    assert max(abs(walked.x), abs(walked.y)) > 3 * SIZE
