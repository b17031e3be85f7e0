"""Clips of the small world for training and evaluation: random scenes and random walks.

In some clips the scene changes on the way while the land keeps its shape, as after a new prompt. Some walks return to
places that have left the picture, or run into obstacles, which purely random walks seldom do.
"""

from __future__ import annotations

import copy
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
    """Draw actions in runs of 1 to 4; one run in four reverses the last one."""
    walk: list[str] = []
    while len(walk) < length:
        action = BACK[walk[-1]] if walk and rng.random() < 0.25 else rng.choice(ACTIONS)
        walk += [action] * rng.randint(1, 4)
    return walk[:length]


def errands(rng: random.Random, length: int) -> list[str]:
    """Draw actions that mostly lead a few steps away and back, so that land leaves the picture and returns."""
    walk: list[str] = []
    while len(walk) < length:
        action, steps = rng.choice(ACTIONS), rng.randint(1, 3)
        walk += [action] * steps
        if rng.random() < 0.7:
            walk += [BACK[action]] * steps
    return walk[:length]


def along_things(rng: random.Random, length: int, world: World) -> list[str]:
    """Draw actions from a world's current place that follow obstacles and often run into them."""
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


def straight(rng: random.Random, length: int, world: World) -> list[str]:
    """Draw actions that lead in one direction, and some steps to anywhere free where something stands in the way."""
    ahead, actions, walked = rng.choice(ACTIONS[1:]), list[str](), copy.copy(world)
    while len(actions) < length:
        free = [
            action for action, (dx, dy) in MOVES.items() if walked.free(walked.x + dx * STEP, walked.y + dy * STEP)
        ]
        action = ahead if ahead in free else rng.choice(free[1:] or ["stay"])  # the first is to stay
        steps = [action] if action == ahead else [action] * rng.randint(1, 3)
        walked.walk(steps)
        actions += steps
    return actions[:length]


@dataclass(frozen=True)
class Clip:
    """A walk with its pictures, uint8 [1 + 4 * actions, H, W, 3]; the scene changes at action `change`.

    places: position of the camera before the first and after each action, in pixels.
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
    """Draw a clip of `length` actions from a random place in a random world.

    change_share, errand_share, along_share: probability of a scene change, of `errands` and of `along_things`.
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
    """Endless clips, different for each worker.

    An item is pixels, float [3, 1 + 4 * length, H, W] in [-1, 1]; the camera's move by each action, [length, 2] (right
    and down, in steps); and a mask [length], False where the scene changes.
    """

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
