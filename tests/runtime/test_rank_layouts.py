"""Every layout of several ranks makes the stream of one: prompts, forks, offload, saves, past the window's roll."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from oracles import ROWS, SIZE, TINY
from thread_ranks import difference, pair
from torch import Tensor

from inferix.models.wan.vae_spec import TINY_VAE
from inferix.runtime.engine import Engine
from inferix.runtime.sessions.session import Session
from inferix.schemes.layouts import LAYOUTS

LIMIT = 1e-10
OTHER = ROWS.flip(0) * 1.5
WALKING = dataclasses.replace(TINY, actions=("stay", "left", "right"), grid=(4, 6))
SMALL_VAE = dataclasses.replace(TINY_VAE, base_channels=4, decoder_channels=4)
STREAMS: dict[str, tuple[str, dict[str, object]]] = {
    "self-forcing": ("self-forcing", {"local_attn_size": 6}),
    "sink, prompt switch": ("longlive", {"local_attn_size": 6, "sink_size": 1}),
    "averaged sink": ("longlive", {"sink_decay": 0.9, "local_attn_size": 6, "sink_size": 1}),
    "rebuilt context": ("krea", {"rebuild_frames": 3, "denoising_step_list": [1000, 500]}),
    "staggered": ("rolling-forcing", {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]}),
    "guidance": ("causal-diffusion", {"num_steps": 2}),
    "actions, learned positions": ("tinyworld", {"num_steps": 2, "spec": WALKING}),
}
QUICK = {  # the others run with the slow tests
    ("averaged sink", "ulysses"), ("averaged sink", "pass-q"), ("guidance", "ulysses"), ("staggered", "ulysses"),
    ("actions, learned positions", "pass-q"),
}  # fmt: skip


@torch.no_grad()
def stream(engine: Engine, path: Path, size: tuple[int, int] = SIZE) -> Tensor:
    """Blocks with another prompt, a fork, a rest in host memory, a rewind and a restored session."""
    more: dict[str, object] = {"actions": ["left", "right"]} if engine.spec.actions else {}
    more |= {"negative_embeds": OTHER} if engine.preset.name == "causal-diffusion" else {}
    with engine.open(prompt_embeds=ROWS, size=size, seed=11, **more) as session:
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
    pairs = [(name, layout) for name in STREAMS for layout in LAYOUTS]
    return [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in pairs]


@pytest.mark.parametrize(("name", "layout"), cases())
def test_two_ranks_make_the_stream_of_one(name: str, layout: str, tmp_path: Path) -> None:
    preset, overrides = STREAMS[name]
    alone, ranked = pair(preset, layout, vae_spec=SMALL_VAE, **overrides)
    expected, found = stream(alone, tmp_path / "one"), stream(ranked, tmp_path / "two")
    assert difference(found, expected) <= LIMIT
    assert ranked.resources.worker.group.sent > 0
