"""The commit of a block in the next one's first pass: what it computes is what a pass of its own does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine
from recording import FakeGraphs

from inferix.errors import UsageError
from inferix.models.registry import PRESETS, make_preset
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.programs.warmup import graph_keys
from inferix.runtime.sessions.batch_profile import BatchProfile
from inferix.runtime.sessions.session import Demand, Session

OTHER = ROWS.flip(0) * 1.5
EXACT = 1e-10
FASTER = BatchProfile({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5, 8: 4.0})
SMALL: dict[str, Any] = {"denoising_step_list": [1000, 500], "spec": replace(TINY, num_layers=2)}
IN_GRAPHS = pytest.param("fused", marks=pytest.mark.slow)
PRESET_SETTINGS: dict[str, dict[str, Any]] = {
    "self-forcing": {"local_attn_size": 6},
    "self-forcing-framewise": {"local_attn_size": 3},
    "sgf": {"local_attn_size": 9},  # a sink whose queries are rotated
    "causal-forcing": {"local_attn_size": 6, "independent_first_frame": True},
}


def engines(preset: str = "self-forcing", **more: Any) -> tuple[Engine, Engine]:
    """One that commits after each block in `eager`, and one in the next pass."""
    settings = SMALL | PRESET_SETTINGS[preset]
    together = make_engine(preset, commit_in_next=True, **settings, **more)
    return make_engine(preset, **settings, **{key: value for key, value in more.items() if key != "executor"}), together


def latents(session: Any, blocks: int) -> list[torch.Tensor]:
    return [block.latents for block in session.stream(blocks, decode=False)]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    assert len(one) == len(other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def switched(engine: Engine) -> list[torch.Tensor]:
    """Blocks of a stream whose prompt changes twice, once at a block that is given ahead."""
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
        made = latents(session, 3)
        session.prompt(embeds=OTHER)
        made += latents(session, 2)
        session.prompt(embeds=ROWS)
        return made + latents(session, 2)


@pytest.mark.parametrize("executor", ["eager", IN_GRAPHS])
@pytest.mark.parametrize("preset", PRESET_SETTINGS)
def test_blocks_are_those_of_separate_commits_also_where_the_prompt_changes(preset: str, executor: str) -> None:
    apart, together = engines(preset, executor=executor)
    assert difference(switched(apart), switched(together)) <= EXACT


def test_whole_blocks_are_one_launch_and_the_commit_has_none() -> None:
    """A first block, those that commit the one before, and the commit before a new prompt: three programs."""
    apart, together = engines(executor="fused")
    executor = together.executor
    assert isinstance(executor, GraphExecutor)
    executor.launcher.backend = backend = FakeGraphs()
    with together.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
        made = latents(session, 5)
        assert (backend.captures, backend.replays) == (2, 5)
        keys = list(executor.loaded)
        assert [key.commits_before for key in keys] == [False, True]
        assert set(keys) <= set(graph_keys(together.spec, together.preset, SIZE))
        names = [section.name for section in executor.loaded[keys[1]].lowered.body.program.sections]
        assert names == ["noise", "commit + denoise 0", "denoise 1"]
        session.prompt(embeds=OTHER)
        made += latents(session, 2)
        assert (backend.captures, backend.replays) == (3, 8)  # the commit by itself, once
        assert set(executor.loaded) <= set(graph_keys(together.spec, together.preset, SIZE))
    with apart.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
        expected = latents(session, 5)
        session.prompt(embeds=OTHER)
        expected += latents(session, 2)
    assert difference(expected, made) <= EXACT


def test_a_block_behind_a_new_prompt_is_made_ahead_also_where_no_other_is_like_it() -> None:
    """After a first frame by itself, only a block that follows a commit by itself commits none before."""
    preset = make_preset("causal-forcing", commit_in_next=True, **PRESET_SETTINGS["causal-forcing"])
    whole = [(key.latent[0], key.commits_before) for key in graph_keys(TINY, preset, SIZE) if key.whole]
    assert sorted(set(whole)) == [(1, False), (3, False), (3, True)]


def test_a_commit_under_the_new_prompt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, together = engines()
    monkeypatch.setattr(together.loop, "commits_apart", lambda state: False)
    assert difference(switched(apart), switched(together)) > 1e-6


@pytest.mark.parametrize("executor", ["eager", IN_GRAPHS])
def test_fork_rewind_and_save_between_blocks(executor: str, tmp_path: Path) -> None:
    results = []
    for engine in engines(executor=executor):
        with engine.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
            made = latents(session, 3)
            with session.fork() as fork:
                fork.prompt(embeds=OTHER)
                made += latents(fork, 2) + latents(session, 1)
            session.save(tmp_path / "session")
            made += latents(session, 2)
        with Session.restore(engine, tmp_path / "session") as restored:
            made += latents(restored, 2)
        results.append(made)
    assert difference(*results) <= EXACT
    rewound = []
    for engine in engines(executor=executor):
        again = make_engine(
            "self-forcing", executor=executor, rewind_blocks=2,
            commit_in_next=engine.preset.context.commit_in_next, **SMALL, **PRESET_SETTINGS["self-forcing"],
        )  # fmt: skip
        with again.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
            made = latents(session, 5)
            session.rewind(3)
            session.prompt(embeds=OTHER)
            rewound.append(made + latents(session, 3))
    assert difference(*rewound) <= EXACT


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_block_whose_later_pass_fails_is_made_again(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit is taken back with the first pass, and sees again what the later passes do not."""
    engine = make_engine(
        "self-forcing", commit_in_next=True, **SMALL | {"denoising_step_list": [1000, 750, 500]}, local_attn_size=6
    )
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
        expected = latents(session, 6)
    forward, passes = engine.loop.forward, 0

    def once(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        result = forward(*args)
        if passes == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=3) as session:
        made = latents(session, 4)
        monkeypatch.setattr(engine.loop, "forward", once)
        with pytest.raises(torch.OutOfMemoryError):
            latents(session, 1)
        made += latents(session, 2)
    assert difference(expected, made) == 0


@pytest.mark.slow
def test_sessions_beside_each_other_share_launches() -> None:
    results = []
    for engine in engines(executor="fused", kv_memory=1 << 24):  # the first in eager, which has batches too
        engine.follow_times(SIZE, FASTER)
        sessions = [engine.open(prompt_embeds=ROWS, size=SIZE, seed=seed) for seed in (3, 4)]
        made = []
        for _ in range(4):
            for session in sessions:
                engine.manager.delivery.submit_demand(session, Demand(1, decode=False))
            while engine.step():
                pass
            made += [session.output.take() for session in sessions]
        results.append([block.latents for block in made])
        for session in sessions:
            session.close()
    assert {block.record.batch for block in made} == {2}
    assert difference(*results) <= EXACT


@pytest.mark.parametrize("preset", ["longlive", "krea", "causvid", "sgf-plus", "self-forcing-a14b"])
def test_presets_whose_commit_cannot_wait_are_refused(preset: str) -> None:
    with pytest.raises(UsageError, match="commit_in_next"):
        make_engine(preset, commit_in_next=True)
    assert not PRESETS[preset].context.commit_in_next
