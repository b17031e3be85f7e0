"""Engines whose passes have groups that see other frames, at other noise levels, and follow other texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from oracles import make_engine

import inferix
from inferix.runtime.engine import Engine

PRESETS = ("magi-tiny", "magi-tiny-distill")
TEXTS = ("a hill", "a lake", "fog")
DAMPING = 0.7  # of the random weights; with larger ones the guidance of a base model enlarges any error block by block


@cache
def magi(preset: str, **settings: Any) -> Engine:
    """A random model. Its blocks are of three latent frames, which the decoder takes at once."""
    engine = inferix.load("magi-tiny", preset, device="cpu", dtype="float32", executor="eager", num_steps=8, **settings)
    for name, parameter in engine.parts.transformer.named_parameters():
        if parameter.ndim > 1 and not name.startswith("y_embedder"):
            parameter.data.mul_(DAMPING)
    return engine


@cache
def rows_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Rows of captions of different lengths; what stands behind them is not seen."""
    spec, generator = engine.spec, torch.Generator().manual_seed(1)
    captions = [torch.randn(count, spec.text_dim, generator=generator) for count, _ in enumerate(TEXTS, 3)]
    empty = torch.zeros(spec.text_len, spec.text_dim)
    return {text: torch.cat((rows, empty[len(rows) :])) for text, rows in zip(TEXTS, captions, strict=True)}


def small(**settings: Any) -> Engine:
    return make_engine("self-forcing", dtype="float32", local_attn_size=9, **settings)


def ranged(**settings: Any) -> Engine:
    ranges = {"noise2clean_kvrange": (3, 1), "clean_chunk_kvrange": 1}
    return small(prompt_switch="cut", **ranges, **settings)


def plain(preset: str) -> Engine:
    """A model with masked texts under a scheme whose passes have one group."""
    one = {"window_blocks": 1, "commit_in_next": False, "clean_text": "prompt", "noise2clean_kvrange": ()}
    return magi(preset, clean_chunk_kvrange=0, prompt_switch="recache", local_attn_size=12, **one)


def rolling(**settings: Any) -> Engine:
    """Blocks in flight of which each keeps its prompt, also in its commit."""
    sizes = {"num_frame_per_block": 1, "local_attn_size": 8, "sink_size": 2}
    return make_engine("rolling-forcing", dtype="float32", prompt_switch="join", **sizes, **settings)


CASES: dict[str, tuple[Callable[[], Engine], int]] = {
    "three branches": (partial(magi, "magi-tiny"), 8),
    "conditions of steps": (partial(magi, "magi-tiny-distill"), 8),
    "one block in flight, a commit in the next": (partial(small, commit_in_next=True, prompt_switch="blend"), 6),
    "one block in flight, ranges of keys": (ranged, 6),
    "ranges of keys, and a commit in the next": (partial(ranged, commit_in_next=True), 6),
    "a prompt for each block in flight": (rolling, 8),
    "the same with guidance": (partial(rolling, guidance_scale=3.0), 8),
    "no groups, masked texts": (partial(plain, "magi-tiny-distill"), 6),
}
