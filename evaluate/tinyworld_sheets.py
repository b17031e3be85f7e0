"""Contact sheets of the small world for a viewer's eye: a minute at rest, walking, and returning to one place."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from ..models.tinyworld.data import BACK, random_walk
from ..models.tinyworld.world import FRAMES, MOVES, STEP, Scene
from ..runtime.engine import Engine
from .tinyworld_walks import PREFIX, Picture, Walk, generate, last_pictures, simulate

SECONDS = 60
EVERY = 6  # seconds from one picture to the next
FARTHEST = 10  # steps of the longest way from which a walk returns
NAMES = ("rest", "walk", "return", "tour")
SCENES = (
    Scene("red", "robot", "snowy forest", "by day"),
    Scene("blue", "fox", "green meadow", "by day"),
    Scene("yellow", "wizard", "sandy desert", "at sunset"),
    Scene("white", "ghost", "autumn wood", "at night"),
)


class Tile(NamedTuple):
    picture: Picture  # [SIZE, SIZE, 3]
    label: str


def sheets(engine: Engine, seconds: int = SECONDS, farthest: int = FARTHEST) -> dict[str, list[list[Tile]]]:
    """Rows of pictures by name of the sheet; `tour` has three of the walks and a return."""
    rests, walks, ways = [], [], []
    for index, scene in enumerate(SCENES):
        count = round(seconds * engine.fps / FRAMES)
        walk = random_walk(random.Random(800 + index), count)
        rests.append(stream(engine, scene, ["stay"] * count, index))
        walks.append(stream(engine, scene, walk, index))
        ways.append(returns(engine, scene, farthest, index))
    return dict(zip(NAMES, (rests, walks, ways, [*walks[:3], ways[0]]), strict=True))


def stream(engine: Engine, scene: Scene, actions: Sequence[str], seed: int) -> list[Tile]:
    """Pictures of a stream from a prompt alone, each with its second and the action that led to it."""
    pictures, rate = last_pictures(engine, scene, actions, seed, 1)[:, -1], engine.fps / FRAMES
    shown = range(0, len(pictures), round(EVERY * rate))
    return [
        Tile(pictures[frame], f"{frame / rate:g} s, {actions[frame - 1]}" if frame else scene.prompt) for frame in shown
    ]


def returns(engine: Engine, scene: Scene, farthest: int, seed: int) -> list[Tile]:
    """Pictures of one place: the simulator's, then a model's after each return from 1 to `farthest` steps away."""
    walk = way_and_back(random.Random(900 + seed), scene, farthest)
    ends, rate = generate(engine, walk, PREFIX, seed)[FRAMES - 1 :: FRAMES], engine.fps / FRAMES
    tiles, new = [Tile(walk.ends[0], scene.prompt)], walk.actions[PREFIX - 1 :]
    for steps in range(1, farthest + 1):
        frame = steps * (steps + 1)
        away, back = new[frame - steps - 1], new[frame - 1]
        tiles.append(Tile(ends[frame - 1], f"{frame / rate:g} s, {steps} {away}, {steps} {back}"))
    return tiles


def way_and_back(rng: random.Random, scene: Scene, farthest: int) -> Walk:
    """Find a walk that nothing blocks: after a rest, 1 step away and back, 2 steps away and back, and so on."""
    while True:
        away, seed = rng.choice(list(BACK)[:4]), rng.randrange(1 << 19)
        before = random_walk(rng, rng.randint(0, 40))
        places = simulate(scene, seed, [away] * farthest, before).places
        if [to - at for at, to in zip(places[0], places[-1], strict=True)] == [
            farthest * STEP * part for part in MOVES[away]
        ]:
            legs = [leg for steps in range(1, farthest + 1) for leg in ([away] * steps, [BACK[away]] * steps)]
            return simulate(scene, seed, [*["stay"] * (PREFIX - 1), *chain.from_iterable(legs)], before)
