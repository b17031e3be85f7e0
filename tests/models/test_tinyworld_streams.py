"""Streams of the small world's training: what the model continues, and where the simulator is the truth."""

import random

import numpy as np
import pytest
import tinyworld_streams as streams
import torch
import train_tinyworld as train
from torch import nn

from inferix.models.tinyworld.data import random_walk
from inferix.models.tinyworld.spec import SPEC
from inferix.models.tinyworld.world import ACTIONS, FRAMES, MOVES, STEP, Scene, World

SCENE = Scene("red", "robot", "green meadow", "by day")
CROP = 5


def encode(pictures):
    """Stand-in for the autoencoder: the mean colour of each place of the last picture of a latent frame."""
    last = pictures[::FRAMES].float() / 255
    return last.unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean((2, 4)).permute(0, 3, 1, 2).repeat(1, 7, 1, 1)[:, :20]


def stream(places, first, repeats=False):
    count = len(places)
    truth = streams.Truth(
        torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.long), torch.tensor(places), torch.zeros(8), repeats
    )
    return streams.Stream(truth, first, count, count, truth.latents)


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


def test_land_is_known_until_it_was_out_of_view_for_too_long():
    right = [(column, 0) for column in range(12)]
    known = streams.known_land(stream(right, first=1), reach=4)
    assert known[0].all()
    for frame in range(1, 8):  # a column of new land each
        assert known[frame, 0].tolist() == [True] * (8 - frame) + [False] * frame
    assert known[9].sum() == 4  # the hero in the middle
    out, back = [(0, 0)] * 2 + [(3, 0)] * 3 + [(0, 0)], [(0, 0)] * 2 + [(3, 0)] * 5 + [(0, 0)]
    assert streams.known_land(stream(out, first=2), reach=4)[-1].all()
    assert not streams.known_land(stream(back, first=2), reach=4)[-1, 0, :3].any()
    assert streams.known_land(stream(back, first=2), reach=4)[-1, 0, 3:].all()


def test_walks_that_repeat_are_the_simulators_for_ever():
    """Their last round equals what the simulator shows later."""
    rng, rests = random.Random(1), 0
    for seed in range(5):
        world = World(seed, SCENE)
        actions = streams.loop_walk(rng, world, 3, 0.7)
        assert len(actions) == 3 + streams.LEAD + streams.ROUND
        loop = actions[3 + streams.LEAD :]
        rests += loop == ["stay"] * streams.ROUND
        truth = streams.encoded(encode, World(seed, SCENE), actions, True)
        longer = streams.encoded(encode, World(seed, SCENE), [*actions, *loop], False)
        frames = range(len(longer.actions))
        assert (longer.latents - truth.latents[truth.index(frames)]).abs().max() < 0.01
        assert (longer.places == truth.places[truth.index(frames)]).all()
        assert (longer.actions == truth.actions[truth.index(frames)]).all()
    assert 0 < rests < 5
    for loop in streams.LOOPS:
        assert streams.ROUND % len(loop) == 0
        assert not np.sum([MOVES[action] for action in loop], axis=0).any()


def test_streams_go_on_in_turn_and_as_saved():
    world, made = random_world(4), []
    random.seed(5)
    running = streams.Streams(encode, 3, CROP, window=4, walk_share=0.4, loop_share=0.3)
    for _ in range(2):
        running.advance(world, 2)
    for saved in (running.state(), None):
        if saved is not None:
            again = streams.Streams(encode, 3, CROP, window=4, walk_share=0.4, loop_share=0.3)
            again.load_state(saved)
        torch.manual_seed(9)
        random.seed(9)
        made.append((again if saved is not None else running).advance(world, 2))
    assert all((one == other).all() for one, other in zip(*made, strict=True))
    past, true, actions, words, known = made[0]
    assert past.shape == true.shape == (2, CROP, SPEC.in_channels, 8, 8)
    assert (past[:, 0] == true[:, 0]).all() and (past[:, 1:] != true[:, 1:]).any()
    assert actions.shape == (2, CROP, len(ACTIONS)) and words.shape == (2, SPEC.text_len)
    assert known.shape == (2, CROP, 8, 8) and known.dtype == torch.bool


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


def test_the_first_stage_in_streams_trains_only_the_action_it_names():
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
