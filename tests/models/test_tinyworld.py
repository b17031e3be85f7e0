"""The small world: the simulator keeps its promises, words are understood, and training learns what runs."""

import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import train_tinyworld as train

from inferix.errors import UsageError
from inferix.kernels.rope import rope_angles, rotate
from inferix.models.registry import MODELS, make_preset
from inferix.models.tinyworld.data import Clips, along_things, errands, random_clip, random_walk
from inferix.models.tinyworld.words import WordEncoder, known_words
from inferix.models.tinyworld.world import ACTIONS, MOVES, STEP, Scene, World, draw_number, mix, scenes
from inferix.models.wan.vae import CausalVae
from inferix.runtime.config import EngineConfig
from inferix.runtime.engine import Engine
from inferix.runtime.execution.loading import Components

SCENE = Scene("red", "robot", "snowy forest", "by day")
SPEC = MODELS["tinyworld"]


def free_walk(action: str, steps: int) -> World:
    """A world in which the way is free."""
    for seed in range(100):
        world = World(seed, SCENE)
        world.walk([action] * steps)
        if (world.x, world.y) == tuple(steps * STEP * part for part in MOVES[action]):
            return World(seed, SCENE)
    raise AssertionError("no free way in 100 worlds")


def test_the_same_seed_and_actions_give_the_same_pictures_and_others_do_not():
    walk = random_walk(random.Random(1), 6)
    pictures = World(3, SCENE).rollout(walk)
    assert pictures.shape == (25, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert (pictures == World(3, SCENE).rollout(walk)).all()
    assert (pictures != World(4, SCENE).rollout(walk)).any()


def test_walking_away_and_back_shows_the_same_land():
    world = free_walk("right", 4)
    before = world.first()[0].astype(int)
    world.rollout(["right"] * 4)
    after = world.rollout(["left"] * 4)[-1].astype(int)
    ground = np.ones((64, 64), dtype=bool)
    ground[18:44, 20:44] = False  # the hero has turned
    same = np.abs(before - after).max(-1) <= 1
    assert same[ground].mean() > 0.85  # all but the butterflies
    assert np.abs(before - world.step("up")[-1].astype(int)).max(-1)[ground].mean() > 3


def test_obstacles_block_and_the_land_moves_one_latent_pixel_an_action():
    world = free_walk("right", 1)
    first, after = world.first()[0], world.step("right")[-1]
    assert (first[:16, STEP:] == after[:16, :-STEP]).mean() > 0.8  # butterflies fly on
    blocked = 0
    for seed in range(20):
        world = World(seed, SCENE)
        world.walk(["down"] * 12)
        blocked += world.y < 12 * STEP
    assert 3 < blocked < 20


def test_a_scene_can_change_while_the_land_keeps_its_shape():
    world, other = World(5, SCENE), Scene("blue", "ghost", "sandy desert", "at night")
    before = world.first()
    world.become(other)
    assert (world.first() == World(5, other).first()).all()
    assert (world.first() != before).any()


def test_every_sentence_of_the_grammar_is_understood_and_its_own():
    sentences = {scene.prompt for scene in scenes()}
    assert len(sentences) == len(scenes()) >= 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({tuple(known_words(sentence)) for sentence in sentences}) == len(sentences)
    assert all(sentence.startswith(("a ", "an ")) for sentence in sentences)


def test_the_two_ways_to_draw_a_number_agree():
    places = [(x, y) for x in (-5, 0, 3, 10**6) for y in (-7, 0, 2)]
    for x, y in places:
        assert draw_number(12345, x, y, 21) == mix(12345, np.array([x]), np.array([y]), 21)[0]


def test_unknown_words_are_taken_for_near_ones_or_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"'robots'.*'robot'"):
        assert known_words("red robots") == ["red", "robot"]
    with pytest.warns(UserWarning, match="'xylophone'"):
        assert known_words("a xylophone at night") == ["night"]
    with pytest.raises(UsageError, match="'qqq'"):
        known_words("qqq")


def test_words_become_rows_and_the_rest_is_zero():
    encoder = WordEncoder(8, 5)
    rows = encoder.encode("a red robot at night")
    assert rows.shape == (5, 8)
    assert (rows[:3] != 0).all()
    assert (rows[3:] == 0).all()
    assert (rows[0] != encoder.encode("a blue robot at night")[0]).any()


def test_clips_have_other_worlds_for_other_seeds_and_scenes_that_change():
    first, again = (next(iter(Clips(2, 4, 0.0))) for _ in range(2))
    assert first[0].shape == (3, 9, 64, 64)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != next(iter(Clips(2, 5, 0.0)))[0]).any()
    assert first[2].tolist() == [True, True]
    assert next(iter(Clips(2, 4, 1.0)))[2].tolist() == [True, False]
    clip = random_clip(random.Random(2), 4, change_share=1.0)
    assert clip.pictures.shape == (17, 64, 64, 3)
    assert 1 <= clip.change < 4


def test_errands_come_back_and_walks_along_things_run_into_them():
    rng, back, blocked, total = random.Random(3), 0, {random_walk: 0, along_things: 0}, 0
    for seed in range(40):
        x, y, places = 0, 0, [(0, 0)]
        for action in errands(rng, 24):
            x, y = x + MOVES[action][0], y + MOVES[action][1]
            places.append((x, y))
        back += sum(place in places[max(0, at - 6) : at - 1] for at, place in enumerate(places))
        for walk in blocked:
            world = World(seed, scenes()[0])
            for action in walk(rng, 24, *([world] if walk is along_things else [])):
                before = world.x, world.y
                world.walk([action])
                blocked[walk] += action != "stay" and before == (world.x, world.y)
        total += 24
    assert back / total > 0.4
    assert blocked[along_things] > 1.5 * blocked[random_walk] > 0
    clip = random_clip(random.Random(2), 6, errand_share=1.0)
    assert len(clip.actions) == 6 and clip.actions == random_clip(random.Random(2), 6, errand_share=1.0).actions
    assert random_clip(random.Random(2), 6, along_share=1.0).actions != clip.actions


def test_the_land_loss_is_0_only_for_latents_that_move_with_the_camera():
    torch.manual_seed(0)
    land = torch.randn(2, 5, 20, 20)
    path = [(6, 6), (7, 6), (7, 5), (7, 5)]  # right, up, stay: the camera's corner in the land
    frames = torch.stack([land[:, :, y : y + 8, x : x + 8] for x, y in path], dim=2)
    moves = torch.tensor([[[1, 0], [0, -1], [0, 0]]] * 2)
    same = torch.ones(2, 3, dtype=torch.bool)
    assert train.land_error(frames, moves, same) == 0
    assert train.land_error(frames, -moves, same) > 0.4
    assert 0.8 < train.land_error(torch.randn(2, 5, 4, 8, 8), moves, same) < 1.2
    frames[:, :, :2] += 3  # another scene, from the third frame on
    assert train.land_error(frames, moves, same) > 0.1
    same[:, 1] = False
    assert train.land_error(frames, moves, same) == 0
    frames[:, :, :, 3:6, 3:6] = torch.randn(2, 5, 4, 3, 3)  # the hero
    assert train.land_error(frames, moves, same) == 0


@torch.no_grad()
def test_before_training_heads_look_beside_where_they_are():
    torch.manual_seed(0)
    world = train.TinyWorld(4)
    angles = rope_angles(range(3), 8, 8, SPEC.head_dim)
    for layer, places in enumerate(train.NEAR):
        attention = world.transformer.blocks[layer].self_attn
        x = torch.randn(1, 3 * 64, SPEC.dim)
        q, k = (
            rotate(part.unflatten(-1, (SPEC.num_heads, -1)), angles)[0].transpose(0, 1)
            for part in (attention.norm_q(attention.q(x)), attention.norm_k(attention.k(x)))
        )
        seen = (q @ k.transpose(1, 2) / SPEC.head_dim**0.5).softmax(-1).unflatten(2, (3, 8, 8)).unflatten(1, (3, 8, 8))
        for head, (frame, row, column) in enumerate(places):
            there = [
                float(seen[head, 2, y, x, 2 + frame, y + row, x + column]) for y in range(1, 7) for x in range(1, 7)
            ]
            assert sum(there) / len(there) > 0.2, (layer, head)  # of 192 tokens


@torch.no_grad()
def test_training_sees_what_a_cache_with_window_and_sink_sees():
    """Each noisy frame beside the clean ones before it, at once, equals the block loop frame by frame."""
    torch.manual_seed(3)
    window, frames = 4, 7
    world = train.TinyWorld(window).double()
    for weight in world.parameters():
        weight.normal_(std=0.05)
    clean = torch.randn(1, frames, train.VAE.z_dim, 4, 4, dtype=torch.float64)
    noisy = torch.randn(1, 2 * frames, train.VAE.z_dim, 4, 4, dtype=torch.float64)
    sigmas = torch.randint(1, 5, (1, 2 * frames)).double() / 4
    actions = [random.Random(1).choice(ACTIONS) for _ in range(frames - 1)]
    hot = torch.eye(len(ACTIONS), dtype=torch.float64)[[0, *(ACTIONS.index(action) for action in actions)]]
    words = torch.tensor([[1, 5, 9, -1, -1, -1, -1, -1]])
    want = world(clean, noisy, sigmas, hot[None], words)[0]

    config = EngineConfig.of("test", "tinyworld", device="cpu", dtype="float64")
    parts = Components(world.transformer, CausalVae(train.VAE), None, "test", "random", lambda: None)
    engine = Engine(config, make_preset("tinyworld", local_attn_size=window), parts)
    with engine.open(prompt_embeds=world.words(words)[0], size=(32, 32), actions=actions) as session:
        for frame in range(frames):
            span = session.current.timeline.admit()
            for copy in (frame, frames + frame):
                run = session.current.timeline.joint_pass([(span.frames, float(sigmas[0, copy]) * 1000)], frozenset())
                engine.loop.roll_caches(session.current, run)
                velocity = engine.loop.velocity(session.current, run, noisy[0, copy : copy + 1])
                assert (velocity[0] - want[copy]).abs().max() <= 1e-10, copy
            engine.loop.run_alone(engine.loop.commit(session.current, span, clean[0, frame : frame + 1]))


@pytest.mark.slow
def test_a_short_training_learns_resumes_and_writes_a_model_that_loads(tmp_path, capsys):
    torch.manual_seed(0)
    recipe = replace(train.SHORT, stills_steps=40, batch=1, crop=4, steps=24)
    vae = train.train_vae(tmp_path, recipe)
    bank = train.load_bank(tmp_path, vae, recipe)
    world = train.train_transformer(tmp_path, bank, vae, recipe)
    pixels = next(iter(Clips(1, 9, 0.0)))[0][None]
    batch, firsts = train.random_batch(bank, recipe), train.random_firsts(bank, 8)
    with torch.no_grad():
        untrained = train.new_vae()
        errors = [
            (train.decode_clips(model, train.encode_clips(model, pixels).chunk(2, dim=1)[0]) - pixels).abs().mean()
            for model in (untrained, vae)
        ]
        losses = []
        for model in (train.TinyWorld(recipe.window), world):
            torch.manual_seed(5)
            losses.append(train.world_loss(model, batch, firsts, recipe, own=False)[0])
    assert errors[1] < 0.8 * errors[0]
    assert losses[1] < 0.95 * losses[0]
    sheets = {path.stem for path in tmp_path.glob("*.png")}
    assert sheets == {"stills", "vae", "world", "own"}
    capsys.readouterr()
    encoder = [weight.clone() for weight in vae.encoder.parameters()]
    decoder = [weight.clone() for weight in vae.decoder.parameters()]
    again, vae = train.train_transformer(tmp_path, bank, vae, recipe), train.train_decoder(tmp_path, vae, recipe)
    assert all((a == b).all() for a, b in zip(encoder, vae.encoder.parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(decoder, vae.decoder.parameters(), strict=True))
    assert "world " not in capsys.readouterr().out  # nothing was left to do
    assert all((a == b).all() for a, b in zip(again.parameters(), world.parameters(), strict=True))

    train.export(tmp_path / "weights", vae, world, bank)
    from inferix import load

    engine = load(tmp_path / "weights", preset="tinyworld", device="cpu")
    assert engine.spec == MODELS["tinyworld"]
    assert engine.parts.vae.spec.std == bank.std
    with engine.open(prompt="a red fox", actions=["up"]) as session:
        blocks = list(session.stream(2))
    assert [len(block.frames) for block in blocks] == [1, 4]
