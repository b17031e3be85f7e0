"""Streams of the small world's training: what the model continues, and where the simulator is the truth."""

import random
from dataclasses import replace
from itertools import groupby

import pytest
import tinyworld_streams as streams
import torch
import train_tinyworld as train
from torch import nn

from inferix.errors import UsageError
from inferix.models.tinyworld.data import random_walk
from inferix.models.tinyworld.spec import SPEC
from inferix.models.tinyworld.world import ACTIONS, FRAMES, STEP, Scene, World

SCENE = Scene("red", "robot", "green meadow", "by day")
CROP = 5


def encode(pictures):
    """Stand-in for the autoencoder: the mean colour of each place of the last picture of a latent frame."""
    last = pictures[::FRAMES].float() / 255
    return last.unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean((2, 4)).permute(0, 3, 1, 2).repeat(1, 7, 1, 1)[:, :20]


def stream(places, first, actions=(), crop=3, channels=1):
    """A stream of a walk with these places, after `first` frames of the simulator, whose latents have their number."""
    count = len(places)
    latents = torch.arange(count)[:, None, None, None].expand(-1, channels, 8, 8).float()
    numbers = torch.tensor([ACTIONS.index(action) for action in actions] or [0] * count)
    truth = streams.Truth(
        latents, numbers, torch.tensor(places), torch.zeros(count, 8, 8, dtype=torch.bool), torch.zeros(8), False
    )
    land = streams.Land.around(truth.places, channels, reach=4)
    for frame in range(first):
        land.show(frame, truth.places[frame], latents[frame], own=False)
    return streams.Stream(truth, first, count, latents[:first][[0, *range(first - crop + 1, first)]], land)


def random_world(window):
    torch.manual_seed(3)
    world = train.TinyWorld(window)
    for weight in world.parameters():
        weight.data.normal_(std=0.05)
    return world


@torch.no_grad()
def test_a_stream_sees_what_training_sees_at_once():
    window, frames = 4, 7
    world = random_world(window).double()
    clean, noisy = (torch.randn(2, frames, SPEC.in_channels, 8, 8, dtype=torch.float64) for _ in range(2))
    sigmas = torch.randint(1, 5, (2, frames)).double() / 4
    actions = torch.eye(len(ACTIONS), dtype=torch.float64)[torch.randint(len(ACTIONS), (2, frames))]
    words = torch.tensor([[1, 5, 9, -1, -1, -1, -1, -1], [0, 2, -1, -1, -1, -1, -1, -1]])
    want = world(clean, noisy, sigmas, actions, words)
    context = world.transformer.embed_text(world.words(words))
    kv = streams.StreamAttention(window - 2)
    for frame in range(frames):
        part = slice(frame, frame + 1)
        kv.keeps = False
        got = world.transformer(noisy[:, part], sigmas[:, part] * 1000, context, kv, actions[:, part])
        assert (got[:, 0] - want[:, frame]).abs().max() <= 1e-10, frame
        kv.keeps = True
        world.transformer(clean[:, part], torch.zeros(2, 1, dtype=torch.float64), context, kv, actions[:, part])


def shown(places, first):
    """What the frames after the first ones should show: whose it is, told by the model's -1 and the simulator's number.
    """
    running = stream(places, first)
    made = -torch.ones(len(places) - first, 1, 8, 8)
    _, target, counts = streams.go_on(running, made)
    assert counts[1:].all() and not counts[0].any()
    return target[1:, 0]


def test_land_is_the_simulators_until_the_model_has_drawn_it():
    right = [(column, 0) for column in range(10)]
    for index, land in enumerate(shown(right, first=2)):
        frame, own = index + 2, index
        hero = torch.zeros(8, 8, dtype=torch.bool)
        hero[3:5, 3:5] = True
        drawn = torch.arange(8)[None].expand(8, -1)  # the model has drawn the columns right of the first view but one
        drawn = (drawn >= 8 - own - 1) & (drawn < 7) & ~hero
        assert (land == torch.where(drawn, -1.0, float(frame))).all(), frame


def test_land_that_was_out_of_view_for_too_long_is_forgotten():
    out = [(0, 0)] * 3 + [(2, 0)] + [(5, 0)] * 3 + [(2, 0)]  # three frames without columns 2 to 4
    land = shown(out, first=3)[-1]
    assert (land[0, :6] == 7).all() and (land[0, 6:] == -1).all()  # the simulator had shown columns up to 7
    long = [(0, 0)] * 3 + [(3, 0)] + [(0, 0)] * 3 + [(3, 0)]
    assert (shown(long, first=3)[-1][0] == torch.tensor([7.0] * 5 + [-1.0] * 3)).all()
    longer = [(0, 0)] * 3 + [(3, 0)] + [(0, 0)] * 4 + [(3, 0)]
    assert (shown(longer, first=3)[-1][0] == 8).all()


def test_what_moves_by_itself_in_the_models_land_has_no_target():
    running = stream([(0, 0)] * 3 + [(1, 0)] * 2, first=3)
    running.truth.moving[4, 0] = True
    _, _, counts = streams.go_on(running, -torch.ones(2, 1, 8, 8))
    assert counts[1].all() and counts[2, 0].tolist() == [True] * 7 + [False] and counts[2, 1:].all()


def test_a_stream_that_goes_elsewhere_has_no_targets_after_it():
    """The model stands still where the simulator walks: in land of the simulator's an error, in its own no target."""
    torch.manual_seed(1)
    land = torch.randn(4, 8, 16)
    view = lambda column: land[:, :, column : column + 8]  # noqa: E731
    columns, actions = [0, 0, 0, 1, 2, 3], ["stay"] * 3 + ["right"] * 3
    places = [(column, 0) for column in columns]

    def went(shows):
        running = stream(places, 3, actions, channels=4)
        running.past = torch.stack([view(0)] * 3)
        _, _, counts = streams.go_on(running, torch.stack([view(column) for column in shows]))
        return counts[1:].flatten(1).any(1).tolist(), running.end

    assert went([1, 2, 3]) == ([True] * 3, len(places))
    assert went([1, 1, 2]) == ([True, True, False], 0)
    own = stream(places, 3, actions, channels=4)
    own.past, own.land.own = torch.stack([view(0)] * 3), torch.ones_like(own.land.own)
    _, _, counts = streams.go_on(own, torch.stack([view(0)] * 3))
    assert not counts.any() and own.end == 0


def test_butterflies_cross_a_part_of_the_land():
    masks = torch.stack([streams.rounds(8 * column, 0) for column in range(8)])
    assert 0.2 < masks.float().mean() < 0.4
    assert (masks[1:, :, :-1] == masks[:-1, :, 1:]).all()  # a place of the land, wherever the camera is


def test_rests_are_the_simulators_for_ever():
    """Their last round equals what the simulator shows later."""
    before, rest = ["left", "up", "up"], ["stay"] * streams.ROUND
    actions = [*before, *["stay"] * streams.LEAD, *rest]
    truth = streams.encoded(encode, World(3, SCENE), actions, True)
    longer = streams.encoded(encode, World(3, SCENE), [*actions, *rest], False)
    frames = truth.index(range(len(longer.actions)))
    assert (longer.latents - truth.latents[frames]).abs().max() < 0.01
    assert (longer.places == truth.places[frames]).all() and (longer.actions == truth.actions[frames]).all()


def test_walks_rest_now_and_then():
    walk = streams.with_rests(random.Random(1), 400)
    rests = [len(run) for action, run in ((key, list(part)) for key, part in groupby(walk)) if action == "stay"]
    assert len(walk) == 400 and max(rests) >= 20 and 0.4 < sum(rests) / 400 < 0.9


def test_streams_go_on_in_turn_and_as_saved():
    world, made = random_world(4), []
    random.seed(5)
    running = streams.Streams(encode, 3, CROP, window=4, walk_share=0.4)
    for _ in range(2):
        running.advance(world, 2)
    for saved in (running.state(), None):
        if saved is not None:
            again = streams.Streams(encode, 3, CROP, window=4, walk_share=0.4)
            again.load_state(saved)
        torch.manual_seed(9)
        random.seed(9)
        made.append((again if saved is not None else running).advance(world, 2))
    assert all((one == other).all() for one, other in zip(*made, strict=True))
    past, target, actions, words, counts = made[0]
    assert past.shape == target.shape == (2, CROP, SPEC.in_channels, 8, 8)
    assert (past[:, 0] == target[:, 0]).all() and (past[:, 1:] != target[:, 1:]).any()
    assert actions.shape == (2, CROP, len(ACTIONS)) and words.shape == (2, SPEC.text_len)
    assert counts.shape == (2, CROP, 8, 8) and counts.dtype == torch.bool


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    def trained(folder, stop):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        adam = [torch.optim.AdamW(model.parameters(), 1e-2)]
        run = train.Run(tmp_path / folder / "stage", model, adam, 50, save_every=0.0)

        def loss():
            if run.step == stop:
                raise InterruptedError
            return (model(torch.randn(8, 4)) - random.random()).square().mean(), {}

        run.go(loss, lambda: "")
        return run

    whole = trained("whole", None)
    with pytest.raises(InterruptedError):
        trained("part", 33)
    part = trained("part", None)
    assert [loss["step"] for loss in part.losses] == [20, 40, 50] and part.losses == whole.losses
    assert train.weights_hash(part.average) == train.weights_hash(whole.average)
    assert train.weights_hash(part.average) != train.weights_hash(part.model)


def test_a_folder_keeps_to_one_recipe(tmp_path):
    for _ in range(2):
        train.keep_recipe(tmp_path, train.SHORT)
    with pytest.raises(UsageError, match="stay_steps"):
        train.keep_recipe(tmp_path, replace(train.SHORT, stay_steps=4))


def test_the_last_stage_trains_only_the_action_it_names():
    world = random_world(3)
    before = world.transformer.action_embedding.linear_1.weight.detach().clone()
    adam = train.action_optimiser(world, "stay", 0.1)
    weight = world.transformer.action_embedding.linear_1.weight
    frames = torch.randn(2, 3, SPEC.in_channels, 8, 8)
    actions = torch.eye(len(ACTIONS))[torch.tensor([[0, 1, 0], [0, 2, 3]])]
    words = torch.zeros(2, SPEC.text_len, dtype=torch.long)
    world(frames, frames, torch.ones(2, 3), actions, words).square().mean().backward()
    adam.step()
    assert (weight != before).any(0).tolist() == [action == "stay" for action in ACTIONS]
    assert [name for name, part in world.named_parameters() if part.requires_grad] == [
        "transformer.action_embedding.linear_1.weight"
    ]


def test_a_walk_from_the_simulator_is_encoded_with_its_places():
    rng = random.Random(2)
    walk = random_walk(rng, 6)
    truth = streams.encoded(encode, World(4, SCENE), walk, False)
    world = World(4, SCENE)
    world.walk(walk)
    assert truth.places[-1].tolist() == [world.x // STEP, world.y // STEP]
    assert len(truth.latents) == len(truth.actions) == len(truth.places) == 7
