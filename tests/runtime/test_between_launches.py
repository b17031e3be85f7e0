"""Nothing between two launches of a stream waits for a GPU or takes memory on it; planted faults are noticed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from fake_card import Graphs, Watch, fake_card
from oracles import SMALL_VAE, TINY, tiny_vae
from torch import Tensor

from inferix.errors import InferixError
from inferix.graphs.lowered import Lowered
from inferix.models.registry import family_of, make_preset
from inferix.runtime.config import EngineConfig
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.execution.loading import Components
from inferix.runtime.kv.table_slots import TableSlots
from inferix.runtime.limits import Limits
from inferix.runtime.programs.graph_builder import GraphKey, lowered_graph
from inferix.runtime.programs.warmup import graph_keys
from inferix.runtime.sessions.lifecycle import State
from inferix.runtime.sessions.session import Session
from inferix.runtime.streams import to_device
from inferix.schemes.page_needs import least_pages

SPEC = replace(TINY, num_heads=1, kv_heads=1)  # of a head size that kernels have
SIZE = (64, 64)
BEGUN = 9  # launches after which every window is full and every table has its place


@cache
def programs() -> dict[GraphKey, Lowered]:
    """Programs of whole blocks, traced before there is a stand-in: it has fake tensors of its own."""
    engine = engine_on("cpu")
    preset, executor = engine.preset, engine.executor
    assert isinstance(executor, GraphExecutor)
    keys = [key for key in graph_keys(SPEC, preset, SIZE) if key.whole]
    assert all(key.pages == least_pages(preset) for key in keys)
    return {key: lowered_graph(executor.graph_of, key) for key in keys}


def engine_on(device: str, watch: Watch | None = None) -> Engine:
    preset = make_preset("self-forcing", denoising_step_list=[1000, 500])
    config = EngineConfig.of("test", "self-forcing", device=device, dtype="bfloat16", executor="fused")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = family_of(SPEC).build(SPEC, config.precision).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    parts = Components(transformer, tiny_vae(SMALL_VAE, torch.bfloat16), None, "test", "random", lambda: None)
    backend = None if watch is None else Graphs(watch)
    return Engine(config, preset, parts, Limits(), GraphExecutor(config, preset, parts, backend))


@contextmanager
def stand_in(largest: Callable[[int], float] = lambda launches: 0.0) -> Iterator[tuple[Watch, Engine, Session]]:
    """A session on the stand-in. largest: entry of the latents, by the number of launches so far."""
    made = programs()
    height, width = SPEC.latent_size(SIZE)
    watch = Watch(results=3 * SPEC.out_channels * height * width * 2, begun=BEGUN)
    with warnings.catch_warnings(), fake_card(watch, lambda: largest(watch.launches)):
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # of a fake tensor
        engine = engine_on("cuda:0", watch)
        executor = engine.executor
        assert isinstance(executor, GraphExecutor)
        executor.programs |= made
        session = engine.open(prompt_embeds=torch.zeros(SPEC.text_len, SPEC.text_dim), size=SIZE)
        yield watch, engine, session
        assert not executor.fallbacks()
        session.close()


def test_nothing_between_two_launches_waits_or_takes_memory() -> None:
    with stand_in() as (watch, _, session):
        blocks = list(session.stream(BEGUN + 3, decode=False))
    assert len(blocks) == watch.launches == BEGUN + 3
    assert watch.faults == []


FAULTS: dict[str, Callable[[Tensor], object]] = {  # what is planted, by what is noticed
    "a value is read on the host": lambda latents: latents.flatten()[0].item(),
    "waits: it is not non_blocking": lambda latents: latents.cpu(),
    "waits: the host's memory is not pinned": lambda latents: latents.copy_(
        torch.zeros(latents.shape, dtype=latents.dtype), non_blocking=True
    ),
    "bytes on the card": lambda latents: latents.new_empty(4),
    "_to_copy waits": lambda latents: torch.tensor([1.0], device=latents.device),
    "the host waits for the card": lambda latents: torch.cuda.synchronize(),
    "the host waits for a stream": lambda latents: torch.cuda.current_stream().synchronize(),
}


def test_planted_faults_are_noticed() -> None:
    """One fault after each launch; then a check that is read at once, and tables in memory of their own."""
    with stand_in() as (watch, engine, session):
        begin, put = engine.loop.finite.begin, TableSlots.put
        last = BEGUN + len(FAULTS)

        def planted(block: int, latents: Tensor) -> Callable[[], None]:
            if 0 <= watch.launches - BEGUN < len(FAULTS):
                list(FAULTS.values())[watch.launches - BEGUN](latents)
            check = begin(block, latents)
            if watch.launches == last:
                check()
                return lambda: None
            return check

        def apart(slots: TableSlots, tensors: Sequence[Tensor]) -> list[Tensor]:
            own = watch.launches > last
            return [to_device(tensor, slots.device) for tensor in tensors] if own else put(slots, tensors)

        engine.loop.finite.begin = planted
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TableSlots, "put", apart)
            list(session.stream(last + 2, decode=False))
    expected = [*FAULTS, "an event behind the last launch", "bytes on the card"]
    for launch, message in enumerate(expected, start=BEGUN):
        assert any(message in fault for fault in watch.faults if f"launch {launch}:" in fault), (message, watch.faults)


def test_a_block_that_is_not_finite_fails_its_session_and_is_not_handed_out() -> None:
    with stand_in(lambda launches: math.nan if launches == 3 else 1.0) as (_, engine, session):
        stream, blocks = session.stream(6, decode=False), []
        with pytest.raises(InferixError, match="block 2 is not finite"):
            blocks += iter(lambda: next(stream), None)
        assert len(blocks) <= 2
        assert session.state is State.FAILED and session.id not in engine.manager.sessions
