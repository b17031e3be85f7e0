"""The whole engine on the small world, in seconds: run first, by `make quick`.

One stream with a prompt switch and actions, compared with a second executor, a fork, a rewind and a restored file.
The tests of each package show the cause of a failure here.
"""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import inferix

PROMPT = "a red robot in a snowy forest by day"
NEXT_PROMPT = "a red robot in a desert at night"


@pytest.fixture(scope="module")
def engine() -> inferix.Engine:
    return inferix.load(device="cpu", rewind_blocks=2)


def stream(engine: inferix.Engine) -> list[inferix.Block]:
    """Eight blocks, past the window of six: right, a new prompt after three, then down."""
    with engine.open(prompt=PROMPT, seed=7, actions=["right"]) as session:
        blocks = list(session.stream(3))
        session.prompt(NEXT_PROMPT)
        session.act("down")
        return blocks + list(session.stream(5))


@pytest.fixture(scope="module")
def blocks(engine: inferix.Engine) -> list[inferix.Block]:
    return stream(engine)


def test_blocks_come_in_order_with_pictures_and_times(engine: inferix.Engine, blocks: list[inferix.Block]) -> None:
    width, height = engine.default_size
    assert [block.index for block in blocks] == list(range(8))
    assert all(block.frames.shape[1:] == (height, width, 3) for block in blocks)
    assert sum(len(block.frames) for block in blocks) == 7 * 4 + 1
    assert all(block.timings["denoise"] > 0 for block in blocks)
    assert {ack.kind for block in blocks for ack in block.acks} == {"prompt", "act"}


def test_the_same_seed_gives_the_same_pictures(engine: inferix.Engine, blocks: list[inferix.Block]) -> None:
    again = stream(engine)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(blocks, again, strict=True))


def test_fused_equals_eager(blocks: list[inferix.Block]) -> None:
    fused = stream(inferix.load(device="cpu", executor="fused", rewind_blocks=2))
    for a, b in zip(blocks, fused, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-3, atol=1e-3)


def test_fork_rewind_and_restore_go_on_as_if_never_interrupted(engine: inferix.Engine, tmp_path: Path) -> None:
    with engine.open(prompt=PROMPT, seed=3) as session:
        list(session.stream(4))
        session.save(tmp_path / "world")
        straight = list(session.stream(2))
        session.rewind(4)
        rewound = list(session.stream(2))
    with inferix.Session.restore(engine, tmp_path / "world") as restored, restored.fork() as fork:
        others = [list(restored.stream(2)), list(fork.stream(2)), rewound]
    for one, other in zip(straight * 3, chain(*others), strict=True):
        assert torch.equal(one.latents, other.latents) and np.array_equal(one.frames, other.frames)
    assert engine.metrics()["gauges"]["pages_in_use"] == 0


def test_bad_input_is_refused_by_kind(engine: inferix.Engine) -> None:
    with pytest.raises(inferix.UsageError, match="local_attn_sise"):
        inferix.load(local_attn_sise=3)
    with pytest.raises(inferix.UsageError, match="jump"):
        engine.open(prompt=PROMPT, actions=["jump"])
