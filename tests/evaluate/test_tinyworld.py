"""Evaluation of the small world: the simulator passes every bar, and faulty pictures fail."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from oracles import write_untrained_world

import inferix
from inferix.errors import UsageError
from inferix.evaluate import tinyworld as evaluation
from inferix.evaluate import tinyworld_judge as judge
from inferix.evaluate import tinyworld_sheets
from inferix.evaluate.tinyworld import random_walks, shift_between, signals
from inferix.evaluate.tinyworld_walks import Progress
from inferix.models.tinyworld.world import FRAMES, STEP, scenes


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = write_untrained_world(tmp_path_factory.mktemp("world") / "weights")
    return inferix.load(model, preset="tinyworld", device="cpu", denoising_step_list=[1000])


def true_pictures(engine, walk, given, seed):
    return walk.pictures[(given - 1) * FRAMES + 1 :]


def frozen_pictures(engine, walk, given, seed):
    still = walk.pictures[(given - 1) * FRAMES]
    return np.repeat(still[None], (len(walk.actions) + 1 - given) * FRAMES, 0)


def test_the_camera_move_is_read_from_pictures():
    right = total = 0
    for walk in random_walks(20, 8, seed=9):
        for step, ((x, y), (to_x, to_y)) in enumerate(zip(walk.places, walk.places[1:], strict=False)):
            moved = ((to_x - x) // STEP, (to_y - y) // STEP)
            right += shift_between(walk.ends[step], walk.ends[step + 1]) == moved
            total += 1
    assert right / total >= 0.97


def test_the_simulator_itself_reaches_every_bar(engine, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", true_pictures)
    assert evaluation.actions_right(engine, 4, Progress()).mean >= 0.95
    assert evaluation.first_two_seconds(engine, 2, Progress()).mean > 60
    assert evaluation.landmark_return(engine, 4, Progress()).mean == 1.0


def test_a_frozen_picture_reaches_none(engine, monkeypatch):
    monkeypatch.setattr(evaluation, "generate", frozen_pictures)
    assert evaluation.actions_right(engine, 6, Progress()).mean < 0.7
    assert evaluation.first_two_seconds(engine, 6, Progress()).mean < 22


def test_landmarks_that_are_gone_are_missed(engine, monkeypatch):
    def emptied(engine, walk, given, seed):
        pictures = true_pictures(engine, walk, given, seed).copy()
        for mark in evaluation.landmarks_near(walk.world.seed, *walk.places[-1], 40):
            where = evaluation.around(mark, walk.places[-1])
            pictures[-1][where] = walk.world.picture_without(mark)[where]
        return pictures

    monkeypatch.setattr(evaluation, "generate", emptied)
    assert evaluation.landmark_return(engine, 4, Progress()).mean <= 0.3


def test_signals_differ_for_dark_grey_and_flat_pictures():
    pictures = next(random_walks(1, 2, seed=3)).ends
    bright, contrast, saturation, sharp = signals(pictures)
    dark = signals(pictures // 2)
    assert dark[0] == pytest.approx(bright / 2, rel=0.02)
    grey = signals(np.repeat(pictures.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1))
    assert grey[2] < 0.01 * saturation
    flat = signals(np.broadcast_to(pictures.mean((1, 2), keepdims=True), pictures.shape).astype(np.uint8))
    assert flat[1] < 0.01 * contrast
    assert flat[3] < 0.01 * sharp


def test_the_hero_is_recognised_by_its_colour():
    right = wrong = 0
    for index, scene in enumerate(scenes()[::8]):
        actions = evaluation.random_walk(random.Random(index), 3)
        other = replace(scene, colour="white" if scene.colour == "red" else "red")
        facing = evaluation.facing_after(actions)
        right += evaluation.hero_is(scene, actions[-1], facing, evaluation.simulate(scene, index, actions).ends[-1])
        wrong += evaluation.hero_is(scene, actions[-1], facing, evaluation.simulate(other, index, actions).ends[-1])
    total = len(scenes()[::8])
    assert right / total >= 0.95
    assert wrong / total <= 0.05


def test_drift_is_the_largest_change_from_the_first_tenth():
    walk = next(random_walks(1, 59, seed=3)).ends
    assert evaluation.drift(np.repeat(evaluation.tenth_statistics(walk)[:1], 10, 0)) == dict.fromkeys(
        (*evaluation.SIGNALS, "frozen feature"), 0.0
    )
    darker = np.concatenate((walk[:54], walk[:6] // 2))
    assert evaluation.drift(evaluation.tenth_statistics(darker))["brightness"] == pytest.approx(0.5, abs=0.02)
    assert evaluation.drift(evaluation.tenth_statistics(darker))["frozen feature"] > 0.1


def test_the_mask_of_land_seen_before():
    walk = evaluation.simulate(next(random_walks(1, 1, seed=1)).scene, 4, ["stay"] * 3)
    assert evaluation.seen_before(walk, 1, 3).all()
    walk.places[3] = (walk.places[0][0] + 16, walk.places[0][1])
    seen = evaluation.seen_before(walk, 1, 3)
    assert seen[:, :48].all()
    assert not seen[:, 48:].any()


def test_every_bar_is_judged_for_a_model_and_from_the_file_of_a_stopped_run(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "STREAM_SECONDS", 5)
    monkeypatch.setattr(judge, "RESTS", {"rest_10s_changed": 1, "rest_60s_changed": 3})
    for name, value in (("LONG_REST", 4), ("CIRCLES", 2), ("STRAIGHT", 4)):
        monkeypatch.setattr(judge, name, value)
    file = tmp_path / "walks.json"
    figures = evaluation.evaluate(engine, 1, 1, 0.15, Progress(file=file))
    assert set(figures["passed"]) == set(evaluation.BARS)
    assert set(figures["drift"]) == set(figures["simulator_drift"]) == {*evaluation.SIGNALS, "frozen feature"}
    assert figures["hero_right"] < 0.5 and figures["hero_identity"] < 0.5
    assert figures["rest_60s_changed"] > 0.5 and figures["intervals"]["rest_60s_changed"]["videos"] == 1
    assert not figures["passed"]["reconstruction_db"]  # nothing was trained
    assert not figures["passed"]["first_2s_db"]
    assert set(figures["intervals"]) >= set(evaluation.BARS) - {"hero_identity", "collapsed"}

    stopped = json.loads(file.read_text("utf-8"))
    del stopped["measured"]["actions 0"]
    file.write_text(json.dumps(stopped), "utf-8")
    progress = Progress(file=file)
    assert set(progress.measured) == set(stopped["measured"])
    assert evaluation.evaluate(engine, 1, 1, 0.15, progress) == figures


def test_a_seed_reaches_the_network(engine):
    def last(prompt="a red robot in a snowy forest by day", actions=("right",) * 2, seed=0):
        with engine.open(prompt=prompt, seed=seed, actions=list(actions)) as session:
            return [block.latents for block in session.stream(3, decode=False)][-1]

    base = last()
    assert (base == last()).all()
    assert (base != last(seed=1)).any()


def test_window_and_sink_hold_over_a_long_walk(engine):
    policy = engine.preset.context
    with engine.open(prompt="a white wizard in an autumn wood at sunset", actions=["up"] * 39) as session:
        for block in session.stream(40, decode=False):
            cached = session.current.branches[0].cache.frames
            assert len(cached) == min(block.index + 1, policy.local_attn_size)
            assert (cached[0], cached[-1]) == (0, block.index)


def test_measurements_of_other_weights_are_refused(tmp_path):
    file = tmp_path / "walks.json"
    kept = Progress(file=file, about={"model": "one", "size": (1, 2)})
    assert kept.once("a walk", pow, 2, 3) == 8
    assert Progress(file=file, about={"model": "one", "size": (1, 2)}).once("a walk", pow, 2, 5) == 8
    with pytest.raises(UsageError):
        Progress(file=file, about={"model": "other", "size": (1, 2)})
    for content in ('{"about": {"model"', '{"about": {}}', '{"about": {}, "measured": []}', "3"):
        file.write_text(content, "utf-8")
        with pytest.raises(UsageError, match="walks"):
            Progress(file=file)


def test_contact_sheets_have_a_row_for_each_prompt_and_return_to_one_place(engine, monkeypatch):
    monkeypatch.setattr(tinyworld_sheets, "EVERY", 1)
    monkeypatch.setattr(tinyworld_sheets, "PREFIX", 1)
    drawn = tinyworld_sheets.sheets(engine, seconds=1, farthest=1)
    assert tuple(drawn) == tinyworld_sheets.NAMES
    for rows in drawn.values():
        assert [len(row) for row in rows] == [2] * 4
        assert all(tile.picture.shape == (64, 64, 3) and tile.picture.max() > 0 for row in rows for tile in row)
    assert [row[1].label for row in drawn["rest"]] == ["1 s, stay"] * 4
    monkeypatch.undo()
    walk = tinyworld_sheets.way_and_back(random.Random(1), tinyworld_sheets.SCENES[0], 3)
    assert [walk.places[frame] == walk.places[0] for frame in (5, 6, 7, 11, 17)] == [True, False, True, True, True]
    assert len(walk.actions) == 17
