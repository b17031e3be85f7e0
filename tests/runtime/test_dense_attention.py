"""Attention over one run of pages: where the host knows the run, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine
from preset_lists import every_list
from recording import FakeGraphs

from inferix.errors import UsageError
from inferix.graphs.program import Program
from inferix.kernels.block_attention import block_attention
from inferix.kernels.dense_attention import dense_attention, rule
from inferix.kernels.dense_attention.run import run_of
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.kv import page_store

SETTINGS = {"local_attn_size": 6, "denoising_step_list": [1000, 500], "spec": replace(TINY, num_layers=1)}
ASKED = {"kernels": {"dense_attention": "sdpa"}}  # torch's own stands in for cuDNN on a CPU
TOLERANCE = 1e-9


def executor_of(engine: Engine) -> GraphExecutor:
    assert isinstance(engine.executor, GraphExecutor)
    return engine.executor


def runs_of(engine: Engine) -> list[tuple[int, ...]]:
    return sorted(key.run for key in executor_of(engine).loaded)


def calls_of(program: Program) -> set[str]:
    names = {call.op.name().removeprefix("inferix::") for call in program.calls}
    return {name for name in names if "attention" in name}


def latents(session, blocks: int) -> torch.Tensor:
    return torch.cat([block.latents for block in session.stream(blocks, decode=False)])


def test_every_list_of_the_presets_that_is_one_run_gives_the_attention_of_the_reference():
    runs = 0
    for listed, _ in every_list():
        pages = [page - min(listed) for page in listed]
        generator = torch.Generator().manual_seed(len(pages))
        kv = torch.full((2, max(pages) + 2, 6, 1, 16), float("nan"), dtype=torch.float64)
        kv[:, pages] = torch.randn(2, len(pages), 6, 1, 16, generator=generator, dtype=torch.float64)
        q = torch.randn(1, 5, 2, 16, generator=generator, dtype=torch.float64)
        if run_of(pages) is None:
            with pytest.raises(UsageError, match="pages"):
                dense_attention(q, kv, pages)
            continue
        runs += 1
        table, count = torch.tensor([pages], dtype=torch.int32), torch.tensor([len(pages)], dtype=torch.int32)
        assert (dense_attention(q, kv, pages) - block_attention(q, kv, table, count)).abs().max() <= 1e-12
    assert runs >= 10


@pytest.mark.parametrize("pages", [(0, 1, 3), (2, 1, 1), (), (5, 3)])
def test_a_list_with_a_hole_is_rejected(pages):
    assert run_of(pages) is None
    with pytest.raises(UsageError, match="pages"):
        dense_attention(torch.ones(1, 4, 1, 16), torch.ones(2, 6, 8, 1, 16), pages)


def test_a_run_beyond_the_store_is_rejected():
    with pytest.raises(UsageError, match="first"):
        dense_attention(torch.ones(1, 4, 1, 16), torch.ones(2, 6, 8, 1, 16), (4, 5, 6))


@pytest.mark.parametrize("preset", ["self-forcing", pytest.param("longlive", marks=pytest.mark.slow)])
def test_a_full_window_runs_dense_and_equals_eager(preset):
    """While the window grows, and where a fork's first write leaves a hole, the paged form runs."""
    settings = SETTINGS | ({"sink_size": 3, "local_attn_size": 9} if preset == "longlive" else {})
    eager, backend = make_engine(preset, **settings), FakeGraphs()
    engine = make_engine(preset, executor="fused", **settings, **ASKED)
    executor_of(engine).launcher.backend = backend
    window = settings["local_attn_size"]
    found = []
    for each in (eager, engine):
        with each.open(prompt_embeds=ROWS, size=SIZE, seed=2) as session:
            parts = [latents(session, 5)]
            if each is engine:
                assert runs_of(engine) == [(), (0, window)]
            with session.fork() as fork:
                parts += [latents(fork, 2), latents(session, 2)]
            found.append(torch.cat(parts))
    assert (found[0] - found[1]).abs().max() <= TOLERANCE
    programs = {key.run: loaded.lowered.body.program for key, loaded in executor_of(engine).loaded.items() if key.whole}
    assert calls_of(programs[()]) == {"block_attention"}
    assert all(calls_of(program) == {"block_attention", "dense_attention"} for run, program in programs.items() if run)


def beside_another(engine: Engine) -> torch.Tensor:
    """Blocks of a session after a fork, whose next pages lie behind those of another session."""
    opened = [engine.open(prompt_embeds=ROWS, size=SIZE, seed=seed) for seed in (2, 3)]
    for session in opened:
        latents(session, 3)
    with opened[0].fork():
        made = latents(opened[0], 1)
    for session in opened:
        session.close()
    return made


def test_a_list_with_a_hole_runs_paged_and_one_that_is_taken_for_a_run_is_noticed(monkeypatch):
    asked = SETTINGS | {"executor": "fused", "kv_memory": 8 << 20}
    expected = beside_another(make_engine(**asked))
    assert (beside_another(make_engine(**asked, **ASKED)) - expected).abs().max() <= TOLERANCE
    monkeypatch.setattr(page_store, "run_of", lambda pages: (min(pages), len(pages)))
    assert (beside_another(make_engine(**asked, **ASKED)) - expected).abs().max() > 1e-6


def test_programs_of_runs_are_few_and_one_is_made_of_another():
    """Sessions beside each other have other runs, each with a program, from one trace; the fifth has none."""
    engine = make_engine(executor="fused", **SETTINGS, **ASKED, kv_memory=8 << 20)
    executor, seen = executor_of(engine), []
    sessions = [engine.open(prompt_embeds=ROWS, size=SIZE, seed=2) for _ in range(5)]
    for session in sessions:
        seen.append(latents(session, 3))
    assert all(torch.equal(seen[0], other) for other in seen[1:4])
    assert (seen[0] - seen[4]).abs().max() <= TOLERANCE
    runs = [run for run in runs_of(engine) if run]
    assert len(runs) == 4 and len({first for first, _ in runs}) == 4
    assert sum(bool(key.run) for key in executor.programs) == 1
    for session in sessions:
        session.close()


@pytest.mark.slow
def test_paged_forms_run_where_dense_is_not_asked_for_or_cannot_be():
    whole = {"spec": SETTINGS["spec"], "denoising_step_list": [1000]}
    for settings in (
        {"local_attn_size": 6},  # not asked for: no card is in the table
        {"local_attn_size": 6, "kv_dtype": "fp8", **ASKED},  # scales
        {"preset": "longlive-infinity", "local_attn_size": 9, **ASKED},  # queries rotated for a sink
    ):
        engine = make_engine(executor="fused", **whole | settings)
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            latents(session, 4)
        assert set(runs_of(engine)) == {()}
    assert rule.MEASURED == {}


@pytest.mark.parametrize("form", ["cudnn", "flash_attn"])
def test_a_library_that_is_not_there_is_refused_before_work_begins(form):
    with pytest.raises(UsageError, match=form):
        make_engine(executor="fused", kernels={"dense_attention": form}, **SETTINGS)


def test_cudnn_is_refused_for_heads_in_groups(monkeypatch):
    monkeypatch.setattr(rule, "installed", lambda device: ("cudnn", "sdpa"))
    grouped = replace(SETTINGS["spec"], kv_heads=1)
    assert grouped.num_heads > 1
    with pytest.raises(UsageError, match="cudnn"):
        make_engine(executor="fused", kernels={"dense_attention": "cudnn"}, **SETTINGS | {"spec": grouped})
    make_engine(executor="fused", kernels={"dense_attention": "sdpa"}, **SETTINGS | {"spec": grouped})


def test_the_table_chooses_by_card_and_shape(monkeypatch):
    shape, card = rule.Shape(4680, 12, 128, 32760), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(rule, "installed", lambda device: ("cudnn", "sdpa"))
    assert rule.form_for(card, shape) is None
    for form, expected in (("cudnn", "cudnn"), (rule.PAGED, None), ("flash_attn", None)):
        monkeypatch.setattr(rule, "MEASURED", {("a card", shape): form})
        assert rule.form_for(card, shape) == expected
        assert rule.form_for(card, shape._replace(tokens=1560)) is None
        assert rule.form_for(torch.device("cpu"), shape) is None
