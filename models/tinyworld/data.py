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

from .world import ACTIONS, STEP, Scene, World, scenes

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
    """A walk: its scene, from action `change` on another one, and its pictures uint8 [1 + 4 * actions, H, W, 3].

    places: where the camera stands at first and after each action, in pixels.
    """

    before: Scene
    after: Scene
    change: int
    actions: list[str]
    pictures: np.ndarray
    places: list[tuple[int, int]]


def random_clip(rng: random.Random, length: int, first_seed: int = 0, change_share: float = 0.0) -> Clip:
    """`length` actions from somewhere in a random world; in a share of the clips the scene changes on the way."""
    scene, seed = rng.choice(scenes()), first_seed + rng.randrange(1 << 19)
    world = World(seed, scene)
    world.walk(random_walk(rng, rng.randint(0, 40)))
    actions = random_walk(rng, length)
    change = rng.randrange(1, length) if length > 1 and rng.random() < change_share else length
    after = rng.choice(scenes()) if change < length else scene
    pictures, places = [world.first()], [(world.x, world.y)]
    for index, action in enumerate(actions):
        if index == change:
            world.become(after)
        pictures.append(world.step(action))
        places.append((world.x, world.y))
    return Clip(scene, after, change, actions, np.concatenate(pictures), places)


class Clips(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """Endless clips, other ones for each worker: pixels float [3, 1 + 4 * length, H, W] in [-1, 1], how far each
    action moves the camera [length, 2] (right and down, in steps), and whether the scene stays the same [length]."""

    def __init__(self, length: int, seed: int, change_share: float) -> None:
        self.length, self.seed, self.change_share = length, seed, change_share

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        while True:
            clip = random_clip(rng, self.length, change_share=self.change_share)
            pixels = torch.from_numpy(clip.pictures).permute(3, 0, 1, 2).float() / 127.5 - 1
            same = torch.tensor([index != clip.change for index in range(self.length)])
            yield pixels, torch.tensor(clip.places).diff(dim=0) // STEP, same
