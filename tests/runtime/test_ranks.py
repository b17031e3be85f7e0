"""Several processes for one world: the stream of one, saves across, and faults that name their rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from thread_ranks import difference, pair
from torch import Tensor

from inferix import RankFailed, UsageError, load
from inferix.runtime.engine import Engine
from inferix.runtime.plans import Offload, PassPlan
from inferix.runtime.sessions.session import Session

SETTINGS = {"preset": "longlive", "dtype": "float64", "local_attn_size": 6, "sink_size": 1}
ROWS = torch.randn(3, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LIMIT = 1e-10


@pytest.fixture(scope="module")
def alone() -> Engine:
    return load("wan-ranks", device="cpu", **SETTINGS)


@pytest.fixture(scope="module")
def ranked() -> Iterator[Engine]:
    engine = load("wan-ranks", device="cpu", gpus=2, rank_timeout=30, **SETTINGS)
    yield engine
    engine.resources.worker.end()


def blocks(session: Session, count: int) -> Tensor:
    return torch.cat([block.latents for block in session.stream(count, decode=False)])


def stream(engine: Engine, path: Path) -> tuple[Tensor, Tensor]:
    """Three blocks, of which the session after two is saved, and one more under another prompt."""
    with engine.open(prompt_embeds=ROWS, seed=4) as session:
        first = blocks(session, 2)
        session.save(path)
        session.prompt(embeds=ROWS * 0.5)
        return first, blocks(session, 2)


def resumed(engine: Engine, path: Path) -> Tensor:
    with Session.restore(engine, path) as session:
        session.prompt(embeds=ROWS * 0.5)
        return blocks(session, 2)


def test_two_processes_make_the_stream_of_one_and_go_on_with_each_others_saves(
    alone: Engine, ranked: Engine, tmp_path: Path
) -> None:
    first, rest = stream(alone, tmp_path / "one")
    found, more = stream(ranked, tmp_path / "two")
    assert max(difference(found, first), difference(more, rest)) <= LIMIT
    assert difference(resumed(ranked, tmp_path / "one"), rest) <= LIMIT
    assert difference(resumed(alone, tmp_path / "two"), rest) <= LIMIT
    ranked.check_integrity()


def test_settings_that_ranks_cannot_divide_are_refused_with_the_nearest_that_work(ranked: Engine) -> None:
    for gpus, parallel, nearest in ((3, "ulysses", "gpus=2"), (5, "auto", "gpus=4"), (2, "uliss", "ulysses")):
        with pytest.raises(UsageError, match=str(gpus) if parallel != "uliss" else parallel) as error:
            load("wan-ranks", device="cpu", gpus=gpus, parallel=parallel)
        assert nearest in str(error.value)
    with pytest.raises(UsageError, match=r"gpus"):
        load("wan-ranks", device="cpu", gpus=0)
    with pytest.raises(UsageError, match=r"size|tokens"):
        ranked.open(prompt_embeds=ROWS, size=(80, 80))
    with pytest.raises(UsageError, match=r"use_lora"):
        ranked.use_lora("style.safetensors")


def test_an_error_of_all_ranks_is_one_error_and_the_ranks_live_on(ranked: Engine) -> None:
    worker = ranked.resources.worker
    with pytest.raises(KeyError):
        worker.execute(Offload((1, 1), 99, (0,)))
    with ranked.open(prompt_embeds=ROWS) as session:
        assert len(blocks(session, 1)) == 3


def test_a_killed_rank_is_named_and_all_processes_end(ranked: Engine) -> None:
    (peer,) = ranked.resources.worker.peers.peers
    with ranked.open(prompt_embeds=ROWS) as session:
        blocks(session, 1)
        os.kill(peer.pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(RankFailed, match=rf"rank 1 \(process {peer.pid} .*SIGKILL"):
            blocks(session, 3)
        assert time.monotonic() - begun < 20  # seconds; no measure of speed: without the fault it would wait for 30
    assert peer.process is not None and peer.process.poll() == -signal.SIGKILL
    with pytest.raises(RankFailed, match=r"rank 1"):
        ranked.open(prompt_embeds=ROWS)


def test_an_error_of_one_rank_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from inferix.runtime.parallel import rank_process

    _, engine = pair("self-forcing", "ulysses")
    with engine.open(prompt_embeds=ROWS[:, :16], size=(32, 32)) as session:
        blocks(session, 1)

        def fails(worker, inbox, message) -> None:
            raise ValueError("out of luck")

        monkeypatch.setattr(rank_process, "run", fails)
        with pytest.raises(RankFailed, match=r"rank 1 .*out of luck"):
            blocks(session, 1)


def test_a_rank_that_hangs_is_named_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    from inferix.runtime.parallel import rank_process

    _, engine = pair("self-forcing", "ulysses")
    run = rank_process.run
    with engine.open(prompt_embeds=ROWS[:, :16], size=(32, 32)) as session:
        blocks(session, 1)

        def hangs(worker, inbox, message) -> None:
            if message.plan.find(PassPlan.__name__.encode()) < 0:
                run(worker, inbox, message)

        engine.resources.worker.peers.timeout = 0.5
        monkeypatch.setattr(rank_process, "run", hangs)
        with pytest.raises(RankFailed, match=r"rank 1 .*0.5 s: it hangs"):
            blocks(session, 1)
