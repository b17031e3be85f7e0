"""Every layout of several ranks makes the stream of one: prompts, forks, offload, saves, past the window's roll."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine
from thread_ranks import difference, pair, thread_engine
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from inferix import UsageError, load
from inferix.models.registry import MODELS
from inferix.runtime.capacity.costs import token_layers
from inferix.runtime.engine import Engine
from inferix.runtime.sessions.session import Session
from inferix.schemes.layouts import BRANCHES, HEADS, JOINT, LAYERS, TOKENS

LIMIT = 1e-10
OTHER = ROWS.flip(0) * 1.5
WALKING = dataclasses.replace(TINY, actions=("stay", "left", "right"), grid=(4, 6), default_size=SIZE)
STREAMS: dict[str, tuple[str, dict[str, object]]] = {
    "self-forcing": ("self-forcing", {"local_attn_size": 6}),
    "sink, prompt switch": ("longlive", {"local_attn_size": 6, "sink_size": 1}),
    "averaged sink": ("longlive", {"sink_decay": 0.9, "local_attn_size": 6, "sink_size": 1}),
    "rebuilt context": ("krea", {"rebuild_frames": 3, "denoising_step_list": [1000, 500]}),
    "staggered": ("rolling-forcing", {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]}),
    "guidance": ("causal-diffusion", {"num_steps": 2}),
    "actions, learned positions": ("tinyworld", {"num_steps": 2, "spec": WALKING}),
}
SHORT: dict[str, dict[str, object]] = {
    "self-forcing": {"local_attn_size": 6, "denoising_step_list": [1000, 500]},
    "longlive": {"local_attn_size": 6, "sink_size": 1, "denoising_step_list": [1000]},
    "causal-diffusion": {"num_steps": 2},
}
QUICK = {  # the others run with the slow tests
    ("averaged sink", "ulysses"), ("averaged sink", "pass-q"), ("guidance", "ulysses"), ("staggered", "ulysses"),
    ("actions, learned positions", "pass-q"), ("guidance", BRANCHES), ("sink, prompt switch", JOINT),
    ("rebuilt context", LAYERS),
}  # fmt: skip


@torch.no_grad()
def stream(engine: Engine, path: Path) -> Tensor:
    """Blocks with another prompt, a fork, a rest in host memory, a rewind and a restored session."""
    more: dict[str, object] = {"actions": ["left", "right"]} if engine.spec.actions else {}
    more |= {"negative_embeds": OTHER} if engine.preset.name == "causal-diffusion" else {}
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=11, **more) as session:
        made = [block.latents for block in session.stream(3, decode=False)]
        session.prompt(embeds=OTHER)
        made += [block.latents for block in session.stream(1, decode=False)]
        with session.fork() as other:
            other.prompt(embeds=ROWS * 0.5)
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


def cases() -> list[object]:
    two = [(name, layout, 2) for name in STREAMS for layout in (HEADS, TOKENS, LAYERS)]
    two.append(("guidance", BRANCHES, 2))
    four = [(name, JOINT, 4) for name in STREAMS]
    four += [("guidance", f"{BRANCHES}+{layout}", 4) for layout in (HEADS, TOKENS)]
    return [pytest.param(*one, marks=() if one[:2] in QUICK else pytest.mark.slow) for one in (*two, *four)]


@pytest.mark.parametrize(("name", "layout", "ranks"), cases())
def test_ranks_make_the_stream_of_one(name: str, layout: str, ranks: int, tmp_path: Path) -> None:
    preset, overrides = STREAMS[name]
    with pair(preset, layout, ranks, **overrides) as (alone, ranked):
        expected, found = stream(alone, tmp_path / "one"), stream(ranked, tmp_path / "two")
        assert any(group.traffic.sent > 0 for group in ranked.resources.worker.groups)
    assert difference(found, expected) <= LIMIT


@pytest.mark.parametrize(
    ("model", "ranks", "layout"),
    [
        ("wan-ranks-gqa", 2, "ulysses"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("wan-ranks", 4, "ulysses"), ("wan-ranks", 4, "pass-q"), ("wan-ranks", 4, JOINT),
                ("wan-ranks-6", 3, "ulysses"),
                ("wan-ranks-6", 6, "ulysses"), ("wan-ranks-6", 4, "pass-q"), ("wan-ranks-gqa", 4, "pass-q"),
                ("wan-ranks-6", 6, JOINT), ("wan-ranks-gqa", 4, JOINT),
            )
        ),
    ],
)  # fmt: skip
def test_other_heads_and_more_ranks_make_the_stream_of_one(model: str, ranks: int, layout: str) -> None:
    spec = MODELS[model]
    settings = {"local_attn_size": 6, "denoising_step_list": [1000, 500]}
    with pair("self-forcing", layout, ranks, spec=spec, **settings) as (alone, ranked):
        rows = torch.randn(3, spec.text_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        made, counts = [], []
        for engine in (alone, ranked):
            with engine.open(prompt_embeds=rows, size=spec.default_size, seed=1) as session:
                first = [block.latents for block in session.stream(3, decode=False)]
                with FlopCounterMode(display=False) if ranks > 2 else nullcontext() as counter:  # it is slow
                    made.append(torch.cat([*first, *(block.latents for block in session.stream(1, decode=False))]))
            counts.append(0 if counter is None else counter.get_total_flops())
        assert difference(*made) <= LIMIT
        assert counts[1] <= 1.01 * counts[0] / ranks  # of rank 0; time embeddings are computed on every rank
        form = ranked.kv_manager.form(spec.default_size)
        assert form.nbytes * ranks == form.whole.nbytes  # of pages, nothing is on two ranks


@pytest.mark.parametrize(
    ("preset", "layout", "ranks"),
    [
        ("magi-tiny", BRANCHES, 2),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("magi-tiny", LAYERS, 2), ("magi-tiny-distill", LAYERS, 2),
                ("magi-tiny", HEADS, 2), ("magi-tiny", TOKENS, 2), ("magi-tiny", JOINT, 4),
                ("magi-tiny", f"{BRANCHES}+{HEADS}", 4), ("magi-tiny", f"{BRANCHES}+{TOKENS}", 4),
                ("magi-tiny-distill", BRANCHES, 2), ("magi-tiny-distill", f"{BRANCHES}+{TOKENS}", 4),
            )
        ),
    ],
)  # fmt: skip
def test_chunks_in_flight_with_guidance_by_timestep_make_the_stream_of_one(
    preset: str, layout: str, ranks: int
) -> None:
    alone = load("magi-tiny", preset, device="cpu", dtype="float64", num_steps=8)
    rows = torch.randn(3, alone.spec.text_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = []
    with thread_engine(alone, ranks, layout) as ranked:
        for engine in (alone, ranked):
            with engine.open(prompt_embeds=rows, seed=1) as session:
                made.append(torch.cat([block.latents for block in session.stream(1, decode=False)]))
    assert difference(*made) <= LIMIT


@pytest.mark.parametrize(
    ("preset", "layout", "ranks", "executor"),
    [
        ("longlive", HEADS, 2, "eager"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("longlive", JOINT, 4, "eager"), ("causal-diffusion", f"{BRANCHES}+{TOKENS}", 4, "eager"),
                ("self-forcing", HEADS, 2, "fused"), ("longlive", TOKENS, 2, "fused"), ("longlive", JOINT, 4, "fused"),
            )
        ),
    ],
)  # fmt: skip
def test_divided_weights_make_the_stream_of_one(
    preset: str, layout: str, ranks: int, executor: str, tmp_path: Path
) -> None:
    settings = SHORT[preset]
    with pair(preset, layout, ranks, shard_weights=True, executor=executor, **settings) as (alone, ranked):
        worker = ranked.resources.worker
        assert difference(stream(ranked, tmp_path / "two"), stream(alone, tmp_path / "one")) <= LIMIT
        with Session.restore(alone, tmp_path / "two") as session:  # the weights are the same
            assert session.next_block == 4
        whole = sum(weight.numel() for weight in alone.parts.transformer.parameters())
        divided = {f"{name}.weight": inputs * outputs for name, inputs, outputs in token_layers(alone.spec)}
        tiles = worker.shard.ranks
        for local in worker.locals:
            own = sum(weight.numel() for weight in local.parts.transformer.parameters())
            rest = whole - sum(divided.values())  # embeddings, norms, biases, and what a prompt passes
            assert own == rest + sum(-(-count // tiles) for count in divided.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "ranks"), [
    ("self-forcing", HEADS, 2), ("rebuilt context", HEADS, 2), ("staggered", TOKENS, 2), ("guidance", BRANCHES, 2),
    ("actions, learned positions", JOINT, 4), ("sink, prompt switch", JOINT, 4), ("self-forcing", LAYERS, 2),
    ("staggered", LAYERS, 2),
])  # fmt: skip
def test_graphs_over_ranks_make_the_stream_of_one(name: str, layout: str, ranks: int, tmp_path: Path) -> None:
    preset, overrides = STREAMS[name]
    alone = make_engine(preset, **overrides)
    with pair(preset, layout, ranks, executor="fused", **overrides) as (_, ranked):
        assert difference(stream(ranked, tmp_path / "two"), stream(alone, tmp_path / "one")) <= LIMIT


def test_ranks_hold_consecutive_layers_and_their_pages() -> None:
    spec = dataclasses.replace(MODELS["wan-ranks"], num_layers=3)
    with pair("self-forcing", LAYERS, 2, spec=spec, denoising_step_list=[1000]) as (alone, ranked):
        whole = dict(alone.parts.transformer.named_parameters())
        rows = torch.ones(3, spec.text_dim, dtype=torch.float64)
        with ranked.open(prompt_embeds=rows) as session:
            list(session.stream(1, decode=False))
            for local, own in zip(ranked.resources.worker.locals, (range(2), range(2, 3)), strict=True):
                layers = [name for name in whole if name.startswith("blocks.") and int(name.split(".")[1]) in own]
                rest = [name for name in whole if not name.startswith("blocks.")]
                names = dict(local.parts.transformer.named_parameters())
                assert sum(map(torch.numel, names.values())) == sum(whole[name].numel() for name in (*layers, *rest))
                assert all(len(store.kv) == len(own) for store in local.stores.values())
        with pytest.raises(UsageError, match=r"use_lora.*layers"):
            ranked.use_lora("style.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [HEADS, TOKENS, JOINT, LAYERS])
def test_a_world_of_four_ranks_goes_on_with_one_and_with_two(layout: str, tmp_path: Path) -> None:
    spec, settings = MODELS["wan-ranks"], {"local_attn_size": 6, "sink_size": 1, "denoising_step_list": [1000]}
    rows = torch.randn(3, spec.text_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with pair("longlive", layout, 4, spec=spec, **settings) as (alone, four):
        with four.open(prompt_embeds=rows, seed=1) as session:
            list(session.stream(3, decode=False))
            session.save(tmp_path / "four")
            expected = torch.cat([block.latents for block in session.stream(2, decode=False)])
        with thread_engine(alone, 2, HEADS if layout == JOINT else layout) as two:
            for engine in (alone, two):
                with Session.restore(engine, tmp_path / "four") as session:
                    found = torch.cat([block.latents for block in session.stream(2, decode=False)])
                assert difference(found, expected) <= LIMIT


@pytest.mark.parametrize(
    ("layout", "seeds"),
    [(HEADS, ("0",)), *(pytest.param(layout, tuple("12345"), marks=pytest.mark.slow) for layout in (HEADS, TOKENS))],
)
def test_random_controls_forks_and_rewinds_make_the_same_streams(layout: str, seeds: tuple[str, ...]) -> None:
    settings = {"local_attn_size": 6, "sink_size": 1, "denoising_step_list": [1000], "rewind_blocks": 2}
    with pair("longlive", layout, **settings) as (alone, ranked):
        for seed in seeds:
            assert difference(walk(ranked, Random(seed)), walk(alone, Random(seed))) <= LIMIT


@torch.no_grad()
def walk(engine: Engine, random: Random, steps: int = 14) -> Tensor:
    """Blocks of up to three sessions under controls drawn from `random`."""
    sessions = [engine.open(prompt_embeds=ROWS, size=SIZE, seed=3)]
    made = []
    for _ in range(steps):
        session = random.choice(sessions)
        match random.choice(("block", "block", "prompt", "fork", "rewind", "offload")):
            case "block":
                made += [block.latents for block in session.stream(1, decode=False)]
            case "prompt":
                session.prompt(embeds=ROWS * random.uniform(0.5, 2))
            case "fork" if len(sessions) < 3:
                sessions.append(session.fork())
            case "rewind" if session.current.next_block > 1:
                session.rewind(session.current.next_block - 1)
            case "offload":
                cache = session.current.branches[0].cache
                cache.offload()
                cache.onload()
    for session in sessions:
        made += [block.latents for block in session.stream(1, decode=False)]
        session.close()
    engine.check_integrity()
    return torch.cat(made)
