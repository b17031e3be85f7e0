"""A family registered from outside runs in every form as its dense form says, with no file of the package changed."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from toy_family import PRESET, SPEC, DenseFrames, Toy

import inferix
from inferix.models.cross_attention import TextByFrames
from inferix.models.registry import register, unregister
from inferix.runtime.engine import Engine
from inferix.runtime.noise import PhiloxNoise
from inferix.runtime.sampler import Sampler

SIZE, GRID, BLOCKS = (32, 32), (2, 2), 4
ROWS = torch.randn(4, SPEC.text_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NULL = ROWS.flip(0) * 0.5


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    family = Toy()
    register(family)
    yield
    unregister(family)


def load(executor: str, **more: object) -> Engine:
    return inferix.load("toy-tiny", device="cpu", dtype="float64", executor=executor, **more)


@torch.no_grad()
def velocities(engine: Engine, chunks: list[Tensor], levels: list[float]) -> list[Tensor]:
    """Velocity of each block, from one dense call for each branch; a clean block is at the context's noise level."""
    model, clean = engine.parts.transformer, PRESET.sampler.context_noise
    prompt, null = (model.embed_text(engine.inputs.prompt_rows(None, rows)[None]) for rows in (ROWS, NULL))
    timesteps = torch.tensor([[level for level in levels for _ in range(2)]])
    groups = []
    for index, level in enumerate(levels):
        blocks = 1 if level == clean else 3 if level > 500 else 2
        own = range(2 * index, 2 * index + 2)
        groups.append((own, range(max(0, own.stop - 2 * blocks), own.stop), own))
    alone = [(own, own, range(2)) for own, _, _ in groups]
    texts = TextByFrames([(2, null if level == clean else prompt) for level in levels])
    text, past, none = (
        model(torch.cat(chunks)[None], timesteps, context, DenseFrames(model.rope, seen, GRID))[0].split(2)
        for context, seen in ((texts, groups), (null, groups), (null, alone))
    )
    found = []
    for index, level in enumerate(levels):
        full, pre, free = text[index], past[index], none[index]
        found.append(-0.5 * free - 0.5 * pre + 2.0 * full if level >= 300 else pre)
    return found


def dense_stream(engine: Engine) -> Tensor:
    """The stream as a plain loop over stages of two steps, in which the newest block is two steps behind."""
    sampler, noise, clean = Sampler(PRESET.sampler), PhiloxNoise(3), PRESET.sampler.context_noise
    draws = [noise.draw(block, range(2 * block, 2 * block + 2), 0, (16, 4, 4)).double() for block in range(BLOCKS + 1)]
    chunks: list[Tensor] = []
    for stage in range(BLOCKS + 1):
        chunks.append(draws[stage])
        for inner in range(2):
            steps = {block: 2 * (stage - block) + inner for block in range(max(0, stage - 1), stage + 1)}
            levels = [sampler.timesteps[steps[block]] if block in steps else clean for block in range(stage + 1)]
            found = velocities(engine, chunks, levels)
            for block, step in steps.items():
                after = (*sampler.sigmas, 0.0)[step + 1]
                chunks[block] = chunks[block] + (after - sampler.sigmas[step]) * found[block]
    return torch.cat(chunks[:BLOCKS])


@pytest.mark.parametrize("executor", ["eager", "fused"])
def test_the_stream_is_the_dense_form(executor: str) -> None:
    engine = load(executor)
    with engine.open(prompt_embeds=ROWS, negative_embeds=NULL, seed=3, size=SIZE) as session:
        blocks = list(session.stream(BLOCKS))
        engine.check_integrity()
        caches = [branch.cache.frames for branch in session.current.branches]
    made = torch.cat([block.latents for block in blocks])
    assert (made - dense_stream(engine)).abs().max() < 1e-10
    assert made.abs().max() > 0.1 and [block.frames.shape[1:] for block in blocks] == [(32, 32, 3)] * BLOCKS
    assert caches[0] == caches[1] != () == caches[2]


def test_it_forks_saves_and_restores(tmp_path) -> None:
    engine = load("eager", rewind_blocks=1)
    with engine.open(prompt_embeds=ROWS, negative_embeds=NULL, seed=3, size=SIZE) as session:
        list(session.stream(2, decode=False))
        session.save(tmp_path / "toy.safetensors")
        with session.fork() as other:
            forked = [block.latents for block in other.stream(2, decode=False)]
        wanted = [block.latents for block in session.stream(2, decode=False)]
        session.rewind(3)
        again = [block.latents for block in session.stream(1, decode=False)]
    with inferix.Session.restore(load("eager", rewind_blocks=1), tmp_path / "toy.safetensors") as session:
        restored = [block.latents for block in session.stream(2, decode=False)]
    assert torch.equal(torch.cat(forked), torch.cat(wanted)) and torch.equal(torch.cat(restored), torch.cat(wanted))
    assert torch.equal(again[0], wanted[1])


def test_pages_have_the_heads_of_keys_and_values() -> None:
    form = load("eager").kv_manager.store(SIZE).form
    assert form.shape == (4, 2, 16) and form.nbytes == 2 * SPEC.num_layers * 4 * 32 * 8
