"""Walks of the small world in its simulator, and what a model makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models.tinyworld.data import HELD_OUT, random_walk
from ..models.tinyworld.world import FRAMES, SIZE, Scene, World, scenes
from ..runtime.engine import Engine

Picture = NDArray[np.uint8]
Log = Callable[[str], None]

PREFIX = 6  # latent frames of the simulator that a walk continues
HERO = slice(SIZE // 2 - 11, SIZE // 2 + 8)  # rows and columns of the middle that the hero covers


@dataclass(frozen=True)
class Walk:
    """Walk in the simulator: pictures, and the camera position at the start and after each action."""

    scene: Scene
    actions: list[str]
    pictures: Picture  # [1 + FRAMES * actions, SIZE, SIZE, 3]
    places: list[tuple[int, int]]
    world: World  # at the end

    @property
    def ends(self) -> Picture:
        """The last picture of each latent frame."""
        return self.pictures[::FRAMES]


def simulate(scene: Scene, seed: int, actions: list[str], before: list[str] | None = None) -> Walk:
    """Simulate `actions` after the actions `before`, which are not in the pictures."""
    world = World(HELD_OUT + seed, scene)
    world.walk(before or [])
    pictures, places = [world.first()], [(world.x, world.y)]
    for action in actions:
        pictures.append(world.step(action))
        places.append((world.x, world.y))
    return Walk(scene, actions, np.concatenate(pictures), places, world)


def random_walks(count: int, length: int, seed: int) -> Iterator[Walk]:
    rng = random.Random(seed)
    for _ in range(count):
        yield simulate(
            rng.choice(scenes()), rng.randrange(1 << 19), random_walk(rng, length), random_walk(rng, rng.randint(0, 40))
        )


def generate(engine: Engine, walk: Walk, given: int, seed: int) -> Picture:
    """Continue a walk with the model after `given` latent frames of the simulator; return the new pictures."""
    prefix = walk.pictures[: (given - 1) * FRAMES + 1]
    with engine.open(prompt=walk.scene.prompt, seed=seed, video=prefix, actions=walk.actions) as session:
        blocks = list(session.stream(blocks=len(walk.actions) + 1 - given))
    return np.concatenate([block.frames for block in blocks if block.frames is not None])


def last_pictures(engine: Engine, scene: Scene, actions: Sequence[str], seed: int, count: int) -> Picture:
    """Stream from a prompt alone: the last pictures of each latent frame [1 + actions, count, SIZE, SIZE, 3].

    The first latent frame has one picture, which is repeated.
    """
    with engine.open(prompt=scene.prompt, seed=seed, actions=list(actions)) as session:
        frames = [block.frames for block in session.stream(len(actions) + 1) if block.frames is not None]
    return np.stack([np.repeat(part, count, 0) if len(part) == 1 else part[-count:] for part in frames])


def smooth(values: NDArray[np.float64], reach: int = 3) -> NDArray[np.float64]:
    """The mean over a square of 2 * reach + 1, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(values, [(reach + 1, reach) if index == axis else (0, 0) for index in (0, 1)], mode="edge")
        total = np.cumsum(padded, axis=axis)
        size = 2 * reach + 1
        values = (np.take(total, range(size, total.shape[axis]), axis) - np.take(total, range(SIZE), axis)) / size
    return values
