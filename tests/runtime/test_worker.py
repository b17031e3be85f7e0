"""A worker in another process makes the stream of the one in this process, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracles import ROWS, SIZE, make_engine
from process_worker import ProcessWorker, WorkerProcess
from torch import Tensor

from inferix.runtime.engine import Engine
from inferix.runtime.plans import AverageSink, Offload, Onload, PassPlan, Release
from inferix.runtime.sessions.session import Session

OTHER = ROWS.float().flip(0) * 1.5
STREAMS = {  # overrides that put as much as can be into few blocks
    "fused, whole blocks": ("self-forcing", {"executor": "fused", "local_attn_size": 6}),
    "averaged sink, int8": ("longlive", {"kv_dtype": "int8", "sink_decay": 0.9, "local_attn_size": 6, "sink_size": 1}),
    "staggered": ("rolling-forcing", {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]}),
    "actions": ("tinyworld", {"num_steps": 2}),
}


@torch.no_grad()
def stream(engine: Engine, path) -> Tensor:
    """Blocks with a new prompt, a fork under another one, a rest in host memory, and a restored session."""
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, seed=11) as session:
        made = [block.latents for block in session.stream(3, decode=False)]
        session.prompt(embeds=OTHER)
        made += [block.latents for block in session.stream(2, decode=False)]
        with session.fork() as other:
            other.prompt(embeds=ROWS.float() * 0.5)
            made += [block.latents for block in other.stream(1, decode=False)]
        cache = session.current.branches[0].cache
        cache.offload()
        cache.onload()
        session.save(path)
        made += [block.latents for block in session.stream(1, decode=False)]
        with Session.restore(engine, path) as again:
            made += [block.latents for block in again.stream(1, decode=False)]
    engine.check_integrity()
    return torch.cat(made)


@pytest.fixture(scope="module")
def process() -> Iterator[WorkerProcess]:
    process = WorkerProcess()
    yield process
    assert process.close() == 0


@pytest.mark.parametrize("name", STREAMS)
def test_a_worker_in_another_process_gives_the_same_bits(name: str, process: WorkerProcess, tmp_path) -> None:
    preset, overrides = STREAMS[name]
    overrides = {"dtype": "float32"} | overrides
    here = make_engine(preset, **overrides)
    expected = stream(here, tmp_path / "here.safetensors")
    worker = ProcessWorker(process, preset, **overrides)
    plain = make_engine(preset, **overrides)
    engine = Engine(plain.config, plain.preset, plain.parts, plain.manager.limits, worker=worker)
    found = stream(engine, tmp_path / "there.safetensors")
    assert torch.equal(found, expected)
    kinds = {type(plan) for plan in worker.plans}
    assert {PassPlan, Offload, Onload, Release} <= kinds
    assert (AverageSink in kinds) == ("sink_decay" in overrides)
    assert any(plan.whole for plan in worker.plans if isinstance(plan, PassPlan)) == (preset == "self-forcing")


def test_what_no_session_refers_to_is_freed() -> None:
    engine = make_engine("longlive", dtype="float32", sink_decay=0.9, local_attn_size=6, sink_size=1)
    worker = engine.resources.worker
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(3, decode=False))
        with session.fork() as other:
            other.prompt(embeds=OTHER)
            list(other.stream(1, decode=False))
            assert len(worker.prompts) == 2 and len(worker.sinks) == 2
        cache = session.current.branches[0].cache
        cache.offload()
        assert len(worker.hosts) == 1
        cache.onload()
        engine.resources.client.release()
        assert (len(worker.prompts), len(worker.sinks), len(worker.hosts)) == (1, 1, 0)
    assert not worker.prompts and not worker.sinks and not worker.hosts
