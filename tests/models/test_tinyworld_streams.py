"""The small world's training: what its sheets continue is what it trains on, and a stopped run goes on."""

import random
from dataclasses import replace

import pytest
import tinyworld_streams as streams
import torch
import train_tinyworld as train
from torch import nn

from inferix.errors import UsageError
from inferix.models.tinyworld.spec import SPEC
from inferix.models.tinyworld.world import ACTIONS


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
    with pytest.raises(UsageError, match="own_steps"):
        train.keep_recipe(tmp_path, replace(train.SHORT, own_steps=5))
