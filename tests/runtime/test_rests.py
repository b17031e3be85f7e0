"""Streams that rest, walk and follow new prompts: going back, forks and saved sessions change nothing."""

import dataclasses
import random

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine

from inferix.runtime.sessions.session import Session

BLOCKS, REWIND = 30, 3
SPEC = dataclasses.replace(TINY, num_layers=1, actions=("stay", "left"))


def walk_of(rng):
    """Actions with rests that are shorter and longer than the window."""
    actions = []
    while len(actions) < BLOCKS:
        actions += ["left"] * rng.randint(1, 4) + ["stay"] * rng.randint(1, 12)
    return actions[:BLOCKS]


def play(session, blocks, prompts, made):
    for index in blocks:
        if index in prompts:
            session.prompt(embeds=prompts[index])
        (block,) = session.stream(1, decode=False)
        made[index] = block.latents


@pytest.mark.parametrize(("rest_sink", "switch", "executor"), [(4, "recache", "eager"), (2, "cut", "fused")])
def test_a_stream_that_rests_goes_back_forks_and_is_saved(rest_sink, switch, executor, tmp_path):
    rng = random.Random(rest_sink)
    settings = {"rest_sink": rest_sink, "prompt_switch": switch, "rewind_blocks": REWIND, "num_steps": 1}
    engine = make_engine("tinyworld", spec=SPEC, executor=executor, **settings)
    opened = {"prompt_embeds": ROWS, "size": SIZE, "actions": walk_of(rng)}
    prompts = {10: ROWS.flip(0), 21: ROWS * 1.5}
    whole, parts, moved = {}, {}, set()
    with engine.open(**opened) as session:
        play(session, range(BLOCKS), prompts, whole)
    session = engine.open(**opened)
    while session.next_block < BLOCKS:
        at = session.next_block
        play(session, range(at, min(BLOCKS, at + rng.randint(3, 6))), prompts, parts)
        at, turn = session.next_block, rng.choice(("rewind", "fork", "save"))
        moved.add(turn)
        if turn == "rewind" and not prompts.keys() & set(range(at - REWIND, at)):
            session.rewind(at - 2)
        elif turn == "fork":
            session, left = session.fork(), session
            left.close()
        elif turn == "save":
            session.save(tmp_path / f"{at}.safetensors")
            session.close()
            session = Session.restore(engine, tmp_path / f"{at}.safetensors")
    session.close()
    assert moved == {"rewind", "fork", "save"} and parts.keys() == whole.keys()
    assert max((parts[index] - whole[index]).abs().max() for index in whole) <= 1e-9
    assert not torch.equal(whole[BLOCKS - 1], whole[BLOCKS - 2])
