"""Clips of the world to train on and to compare with: random scenes, walks that turn now and then.

In some clips the scene changes on the way, while the land keeps its shape: that is what a new prompt means. In some
the walk is one that asks for memory, or for an eye for what stands in the way; chance alone has few of these.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .world import ACTIONS, MOVES, STEP, Scene, World, scenes

HELD_OUT = 1 << 20  # seeds from here on are never trained on
BACK = {"up": "down", "down": "up", "left": "right", "right": "left", "stay": "stay"}


def random_walk(rng: random.Random, length: int) -> list[str]:
    """Actions that mostly go on, sometimes turn back the way they came, sometimes stop."""
    walk: list[str] = []
    while len(walk) < length:
        action = BACK[walk[-1]] if walk and rng.random() < 0.25 else rng.choice(ACTIONS)
        walk += [action] * rng.randint(1, 4)
    return walk[:length]


def errands(rng: random.Random, length: int) -> list[str]:
    """Actions that mostly lead a few steps away and back: what has left the picture comes into it again."""
    walk: list[str] = []
    while len(walk) < length:
        action, steps = rng.choice(ACTIONS), rng.randint(1, 3)
        walk += [action] * steps
        if rng.random() < 0.7:
            walk += [BACK[action]] * steps
    return walk[:length]


def along_things(rng: random.Random, length: int, world: World) -> list[str]:
    """Actions from where a world stands, along what blocks the way and into it again and again."""
    walk: list[str] = []
    x, y = world.x, world.y
    while len(walk) < length:
        ahead = {action: (x + dx * STEP, y + dy * STEP) for action, (dx, dy) in MOVES.items()}
        blocked = [action for action, place in ahead.items() if not world.free(*place)]
        if blocked and rng.random() < 0.4:
            action = rng.choice(blocked)
        elif walk and walk[-1] not in ("stay", *blocked) and rng.random() < 0.6:
            action = walk[-1]
        else:
            action = rng.choice(ACTIONS)
        walk.append(action)
        if action not in blocked:
            x, y = ahead[action]
    return walk


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


def random_clip(
    rng: random.Random, length: int, first_seed: int = 0, change_share: float = 0.0, errand_share: float = 0.0,
    along_share: float = 0.0,
) -> Clip:  # fmt: skip
    """`length` actions from somewhere in a random world; in a share of the clips the scene changes on the way.

    In shares of them the walk is of errands, or along things.
    """
    scene, seed = rng.choice(scenes()), first_seed + rng.randrange(1 << 19)
    world = World(seed, scene)
    world.walk(random_walk(rng, rng.randint(0, 40)))
    kind = rng.random()
    if kind < errand_share:
        actions = errands(rng, length)
    elif kind < errand_share + along_share:
        actions = along_things(rng, length, world)
    else:
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
