"""Ranks that decode some columns of each picture make the pictures of one rank, and go on with each other's saves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracles import ROWS, SIZE, SMALL_VAE, randomise
from thread_ranks import difference, groups_of, pair
from torch import Tensor

from inferix import UsageError, load
from inferix.graphs.tiles import shares
from inferix.models.column_decoder import divided_columns
from inferix.models.decoder import Decoder, StreamState
from inferix.models.tinyworld.spec import VAE
from inferix.models.wan.family import WAN
from inferix.models.wan.taehv import TinyDecoder
from inferix.models.wan.vae import CausalVae
from inferix.models.wan.vae_cpu import use_cpu_layers
from inferix.models.wan.vae_spec import TAEW21, TINY_VAE22
from inferix.runtime.capacity import rank_planner
from inferix.runtime.capacity.planner import Workload, steady_blocks
from inferix.runtime.engine import Engine
from inferix.runtime.sessions.session import Session
from inferix.schemes.layouts import BRANCHES, HEADS, TOKENS, RankGrid
from inferix.schemes.page_needs import needs_negative

LIMIT = 1e-10
DECODERS: dict[str, Callable[[], Decoder]] = {
    "wan 2.1": lambda: CausalVae(SMALL_VAE),
    "wan 2.1, layers of a CPU": lambda: use_cpu_layers(CausalVae(SMALL_VAE).double()),
    "wan 2.2": lambda: CausalVae(replace(TINY_VAE22, base_channels=4, decoder_channels=4)),
    "small world": lambda: CausalVae(VAE),
    "taehv": lambda: TinyDecoder(replace(TAEW21, widths=(8, 8, 4, 4))),
}


QUICK = {("small world", 3), ("wan 2.2", 2), ("taehv", 2), ("wan 2.1, layers of a CPU", 3)}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=() if (name, ranks) in QUICK else pytest.mark.slow)
        for name in DECODERS for ranks in (2, 3)
    ],
)  # fmt: skip
@torch.no_grad()
def test_columns_of_all_ranks_are_the_picture_of_one(name: str, ranks: int) -> None:
    decoder = randomise(DECODERS[name]().double(), 1, 0.05)
    assert isinstance(decoder, Decoder)
    latents = torch.randn(3, decoder.spec.z_dim, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    state = StreamState()
    expected = torch.cat([decoder.decode(part, state) for part in latents.split([2, 1])])
    groups = groups_of(RankGrid(heads=ranks), shard_decoder=True)
    before = {key: tensor.clone() for key, tensor in decoder.state_dict().items()}

    def run(shard) -> tuple[Tensor | None, StreamState]:
        own, mine = WAN.column_decoder(decoder, shard.columns), StreamState()
        assert all(one is other for one, other in zip(decoder.parameters(), own.inner.parameters(), strict=True))
        with torch.no_grad():
            parts = [own.decode(part, mine) for part in latents.split([2, 1])]
        return (None if parts[0] is None else torch.cat(parts)), mine

    with ThreadPoolExecutor(ranks) as pool:
        made = list(pool.map(run, [shard for _, shard in groups]))
    assert made[0][0] is not None and difference(made[0][0], expected) <= LIMIT
    assert all(pixels is None for pixels, _ in made[1:])
    for rank, (_, mine) in enumerate(made):
        assert mine.history.keys() == state.history.keys() and mine.frames == state.frames
        for slot, whole in state.history.items():
            assert difference(mine.history[slot], divided_columns(whole, 4, ranks)[rank]) <= LIMIT
    for place, (group, _) in enumerate(groups):
        sides = (place > 0) + (place < ranks - 1)
        widths, item, rows = shares(4, ranks), 8, latents.shape[2]
        edges = [decoder.spec.edge_entries(first=frame == 0) for frame in range(3)]
        sent = sides * rows * sum(entries for entries, _ in edges) * item
        sent += (ranks - 1) * decoder.spec.attended_entries * rows * max(widths) * item * 3
        pictures = len(expected) * 3 * expected.shape[2] * decoder.spec.spatial_stride * widths[place]
        assert group.traffic.sent == sent + (pictures * item if place else 0)
    assert all(torch.equal(before[key], tensor) for key, tensor in decoder.state_dict().items())


@torch.no_grad()
def stream(engine: Engine, path: Path) -> tuple[NDArray[np.uint8], Tensor]:
    """Frames of blocks with a fork, a rewind and a save, and the latents of the last one."""
    more = {"negative_embeds": ROWS.flip(0)} if needs_negative(engine.preset) else {}
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=11, **more) as session:
        made = [block.frames for block in session.stream(2)]
        session.save(path)
        with session.fork() as other:
            other.prompt(embeds=ROWS * 0.5)
            made += [block.frames for block in other.stream(1)]
        session.rewind(session.next_block - 1)
        last = list(session.stream(1))
        assert session.current.decoder.nbytes > 0
    engine.check_integrity()
    return np.concatenate([*made, *(block.frames for block in last)]), last[-1].latents


@torch.no_grad()
def resumed(engine: Engine, path: Path) -> NDArray[np.uint8]:
    with Session.restore(engine, path) as session:
        return np.concatenate([block.frames for block in session.stream(1)])


def apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize(
    ("preset", "layout", "ranks"),
    [
        ("self-forcing", HEADS, 2),
        pytest.param("krea", TOKENS, 2, marks=pytest.mark.slow),  # which encodes a picture again
        pytest.param("causal-diffusion", BRANCHES, 2, marks=pytest.mark.slow),
    ],
)
def test_sessions_of_ranks_that_decode_together_are_those_of_one(
    preset: str, layout: str, ranks: int, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"local_attn_size": 6} if preset != "causal-diffusion" else {"num_steps": 2}
    settings |= {"denoising_step_list": [1000], "num_frame_per_block": 1} if preset == "self-forcing" else {}
    with pair(preset, layout, ranks, shard_decoder=True, rewind_blocks=2, **settings) as (alone, ranked):
        expected, latents = stream(alone, tmp_path / "one")
        found, own = stream(ranked, tmp_path / "two")
        assert apart(found, expected) <= 1 and difference(own, latents) <= LIMIT  # a rounded number may differ by one
        assert apart(resumed(alone, tmp_path / "two"), resumed(ranked, tmp_path / "one")) <= 1
        worker = ranked.resources.worker
        worker.peers.wait_for(lambda peer: peer.done >= worker.peers.ran)
        for local in worker.locals:
            assert len(local.decodings) <= 1  # states are freed with the sessions that had them


def test_bytes_of_a_decoded_block_equal_the_formula() -> None:
    settings: dict[str, object] = {"local_attn_size": 2, "denoising_step_list": [1000], "num_frame_per_block": 1}
    with pair("self-forcing", HEADS, shard_decoder=True, **settings) as (_, engine):
        decoder, spec = engine.parts.vae.spec, engine.spec
        of_model = Workload(spec, engine.preset, decoder, 0, SIZE, "float64", "float64")
        worker = engine.resources.worker
        traffic = [group.traffic for group in worker.groups]
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            list(session.stream(3))
            worker.peers.wait_for(lambda peer: peer.done >= worker.peers.ran)
            before = [(one.sent, one.calls) for one in traffic]
            list(session.stream(1))
            worker.peers.wait_for(lambda peer: peer.done >= worker.peers.ran)
        (block,) = steady_blocks(engine.preset)
        grid = RankGrid(heads=2)
        passes = rank_planner.block_bytes(of_model, block, grid), rank_planner.block_collectives(of_model, block, grid)
        for rank, (one, (sent, calls)) in enumerate(zip(traffic, before, strict=True)):
            decoding = rank_planner.decoding_sent(of_model, block, 2, rank)
            assert (one.sent - sent, one.calls - calls) == (passes[0] + decoding[0], passes[1] + decoding[1])


def test_models_whose_decoder_cannot_be_divided_are_refused_before_weights_are_read() -> None:
    with pytest.raises(UsageError, match=r"shard_decoder.*magi"):
        load("magi-tiny", device="cpu", gpus=2, shard_decoder=True)
    with pytest.raises(UsageError, match="shard_decoder"):
        load("wan-ranks", device="cpu", shard_decoder=True)
    with pytest.raises(UsageError, match=r"shard_decoder.*2 columns"):
        load("wan-ranks", device="cpu", gpus=4, shard_decoder=True, parallel="pass-q", size=(16, 64))
