"""Walks of the small world in its simulator, and what a model makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, quoted
from ..models.tinyworld.data import HELD_OUT, random_walk
from ..models.tinyworld.world import FRAMES, SIZE, Scene, World, scenes
from ..runtime.engine import Engine
from ..runtime.files import write_atomically
from ..user_files import read_json

Picture = NDArray[np.uint8]
Given = ParamSpec("Given")
Plain = TypeVar("Plain")  # what JSON can hold

PREFIX = 6  # latent frames of the simulator that a walk continues
HERO = slice(SIZE // 2 - 11, SIZE // 2 + 8)  # rows and columns of the middle that the hero covers


class Progress:
    """Measurements of walks by name, kept in a file, so that a stopped evaluation loses at most one of them.

    say: takes a line about each walk. about: what the measurements depend on, plain values.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda line: None, file: Path | None = None, about: Mapping[str, Any] = {}
    ) -> None:
        self.say, self.file = say, file
        self.about = json.loads(json.dumps(about))
        self.measured: dict[str, Any] = {}
        if file is not None and file.exists():
            saved = read_json(file, "finished walks")
            if not isinstance(saved, dict) or not isinstance(saved.get("measured"), dict):
                raise UsageError(f"{quoted(str(file))} holds no finished walks; remove it")
            if saved.get("about") != self.about:
                raise UsageError(
                    f"{quoted(str(file))} is of an evaluation of other weights or settings that was stopped; expected "
                    f"{quoted(self.about)}; choose another folder or remove it"
                )
            self.measured = saved["measured"]

    def once(
        self, name: str, measure: Callable[Given, Plain], *arguments: Given.args, **options: Given.kwargs
    ) -> Plain:
        """What `measure` returns, or returned before the evaluation was stopped."""
        if name not in self.measured:
            self.measured[name] = measure(*arguments, **options)
            if self.file is not None:
                text = json.dumps({"about": self.about, "measured": self.measured})
                write_atomically(self.file, lambda part: part.write_text(text, "utf-8"))
        value: Plain = self.measured[name]
        return value


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
