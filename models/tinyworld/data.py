"""Clips of the world to train on and to compare with: random scenes, walks that turn now and then.

In some clips the scene changes on the way, while the land keeps its shape: that is what a new prompt means.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .world import ACTIONS, Scene, World, scenes

HELD_OUT = 1 << 20  # seeds from here on are never trained on


def random_walk(rng: random.Random, length: int) -> list[str]:
    """Actions that mostly go on, sometimes turn back the way they came, sometimes stop."""
    back = {"up": "down", "down": "up", "left": "right", "right": "left", "stay": "stay"}
    walk: list[str] = []
    while len(walk) < length:
        action = back[walk[-1]] if walk and rng.random() < 0.25 else rng.choice(ACTIONS)
        walk += [action] * rng.randint(1, 4)
    return walk[:length]


@dataclass(frozen=True)
class Clip:
    """A walk: its scene, from action `change` on another one, and its pictures uint8 [1 + 4 * actions, H, W, 3]."""

    before: Scene
    after: Scene
    change: int
    actions: list[str]
    pictures: np.ndarray


def random_clip(rng: random.Random, length: int, first_seed: int = 0, change_share: float = 0.0) -> Clip:
    """`length` actions from somewhere in a random world; in a share of the clips the scene changes on the way."""
    scene, seed = rng.choice(scenes()), first_seed + rng.randrange(1 << 19)
    world = World(seed, scene)
    world.walk(random_walk(rng, rng.randint(0, 40)))
    actions = random_walk(rng, length)
    change = rng.randrange(1, length) if rng.random() < change_share else length
    pictures = [world.rollout(actions[:change])]
    after = scene
    if change < length:
        after = rng.choice(scenes())
        world.become(after)
        pictures += [world.step(action) for action in actions[change:]]
    return Clip(scene, after, change, actions, np.concatenate(pictures))


class Clips(IterableDataset[Tensor]):
    """Endless clips float [3, 1 + 4 * length, H, W] in [-1, 1], other ones for each worker."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        while True:
            yield torch.from_numpy(random_clip(rng, self.length).pictures).permute(3, 0, 1, 2).float() / 127.5 - 1
