"""Figures of the small world as a viewer judges it: rests, circles and long straight walks; the hero and the land.

At rest the land must stay as it is, a circle must lead back to the same place, and new land must have things in it. The
simulator is the truth for rests and circles, which begin with its pictures; classifiers read the rest
(`tinyworld_classifiers.py`). Figures have intervals over walks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..models.tinyworld.data import HELD_OUT, random_walk, straight
from ..models.tinyworld.world import ACTIONS, FRAMES, MOVES, STEP, Scene, World, scenes
from ..runtime.engine import Engine
from .bootstrap import Interval, bootstrap_mean, bootstrap_ratio
from .tinyworld_classifiers import accuracy, classifiers
from .tinyworld_walks import HERO, PREFIX, Picture, Progress, Walk, generate, last_pictures, simulate, smooth

RESTS = {"rest_10s_changed": 20, "rest_60s_changed": 120}  # latent frames without a key until the land is compared
LONG_REST = 480  # of rest_240s_changed
AWAY = 12  # steps of a straight walk before the rest of rest_away_60s_changed: the first frame's land is out of view
CIRCLE_STEPS = 1  # along each side: the window of six latent frames has seen the whole way
CIRCLES = 30  # rounds, 60 s
STRAIGHT = 120  # latent frames
# Levels of 255 by which the mean of 3 x 3 pixels differs where land has changed. The autoencoder alone changes up to
# 2 % of the pixels by that, a shift by four pixels 13 to 16 %.
CHANGED = 8.0
MOVES_BY_ITSELF = 4  # levels that a pixel of the simulator changes at rest where something moves
TURN = 24  # latent frames of one round of the butterflies

Mask = NDArray[np.bool_]
Counts = tuple[list[int], list[int]]  # landmarks in each picture of a stream, a model's and the simulator's


class Walked(TypedDict):
    """A random walk as judged: shares of frames, and `things`."""

    hero: float
    words: float
    response: float
    things: Counts


class Rested(TypedDict):
    """A rest as judged: share of the land that has changed by the rest's length, and of frames with the hero."""

    changed: dict[str, float]
    hero: float


def still_land(world: World) -> Mask:
    """Pixels [SIZE, SIZE] at a world's place where nothing moves by itself: no butterfly on its round, and no hero."""
    resting = copy.copy(world)
    pictures = np.concatenate([resting.step("stay") for _ in range(TURN)]).astype(np.int16)
    moving = (pictures.max(0) - pictures.min(0)).max(-1) > MOVES_BY_ITSELF
    for axis in (0, 1):
        moving = moving | np.roll(moving, 1, axis) | np.roll(moving, -1, axis)
    moving[HERO, HERO] = True
    return np.asarray(~moving)


def land_changed(picture: Picture, truth: Picture, still: Mask) -> float:
    """Share of still pixels whose surroundings differ from the truth by more than `CHANGED` in a channel."""
    wrong = picture.astype(np.float64) - truth
    means = [np.abs(smooth(wrong[..., channel], 1)) for channel in range(3)]
    return float((np.max(means, axis=0) > CHANGED)[still].mean())


def resting(engine: Engine, walks: int, progress: Progress) -> tuple[dict[str, Interval], list[float]]:
    """Share of the land that has changed after rests, and the share of each rest's frames with the prompted hero."""
    rests = []
    for index in range(walks):
        rest = progress.once(f"rest {index}", rest_from_start, engine, index)
        rests.append(rest)
        changed = ", ".join(f"{share:.1%}" for share in rest["changed"].values())
        progress.say(f"rest {index + 1}/{walks}: land changed {changed}, hero {rest['hero']:.1%}")
    changes = {name: bootstrap_mean([rest["changed"][name] for rest in rests]) for name in RESTS}
    return changes, [rest["hero"] for rest in rests]


def rest_from_start(engine: Engine, index: int) -> Rested:
    """Judge a rest that continues `PREFIX` latent frames of the simulator, in which nothing but butterflies moves."""
    rng = random.Random(300 + index)
    walk = simulate(
        rng.choice(scenes()), rng.randrange(1 << 19), ["stay"] * (PREFIX - 1 + max(RESTS.values())),
        random_walk(rng, rng.randint(0, 40)),
    )  # fmt: skip
    ends = generate(engine, walk, PREFIX, index)[FRAMES - 1 :: FRAMES]
    still = still_land(walk.world)
    changed = {name: land_changed(ends[rest - 1], walk.ends[0], still) for name, rest in RESTS.items()}
    return {"changed": changed, "hero": hero_share(walk.scene, ends)}


def long_resting(engine: Engine, seeds: int, progress: Progress) -> Interval:
    """Share of the land that has changed after `LONG_REST` latent frames without a key."""
    changed = []
    for seed in range(seeds):
        rng = random.Random(400 + seed)
        before = random_walk(rng, rng.randint(0, 40))
        walk = simulate(rng.choice(scenes()), rng.randrange(1 << 19), ["stay"] * (PREFIX - 1), before)
        changed.append(progress.once(f"long rest {seed}", changed_by_rest, engine, walk, LONG_REST, seed))
        progress.say(f"long rest {seed + 1}/{seeds}: land changed {changed[-1]:.1%}")
    return bootstrap_mean(changed)


def resting_away(engine: Engine, walks: int, progress: Progress) -> Interval:
    """Share of the land that has changed after a rest of 60 s, far from the land of the stream's first frame.

    The other rests begin a stream, whose first frame a model may see for ever, and so need no memory of their own.
    """
    changed = []
    for index in range(walks):
        rng = random.Random(700 + index)
        scene, seed = rng.choice(scenes()), rng.randrange(1 << 19)
        lead = straight(rng, AWAY, World(HELD_OUT + seed, scene)) + ["stay"] * (PREFIX - 1)
        walk, rest = simulate(scene, seed, lead), max(RESTS.values())
        changed.append(progress.once(f"rest after a walk {index}", changed_by_rest, engine, walk, rest, index))
        progress.say(f"rest after a walk {index + 1}/{walks}: land changed {changed[-1]:.1%}")
    return bootstrap_mean(changed)


def changed_by_rest(engine: Engine, walk: Walk, rest: int, seed: int) -> float:
    """Share of the land that has changed after a walk and a rest of `rest` latent frames; decodes only the last."""
    last = rested(engine, walk, rest, seed)
    return land_changed(last, walk.ends[-1], still_land(walk.world))


def rested(engine: Engine, walk: Walk, rest: int, seed: int) -> Picture:
    """Continue a walk with a rest of `rest` latent frames; return the last picture."""
    actions = [*walk.actions, *["stay"] * rest]
    with engine.open(prompt=walk.scene.prompt, seed=seed, video=walk.pictures, actions=actions) as session:
        for _ in session.stream(rest - 2, decode=False):
            pass
        session.current.decoder.clear()  # the frames before were not decoded
        return [block.frames[-1] for block in session.stream(2) if block.frames is not None][-1]


def circling(engine: Engine, walks: int, progress: Progress) -> Interval:
    """Share of the land that differs from the simulator's where a circle of 60 s ends, as it began."""
    changed = []
    for index in range(walks):
        changed.append(progress.once(f"circle {index}", changed_by_circle, engine, index))
        progress.say(f"circle {index + 1}/{walks}: land changed {changed[-1]:.1%}")
    return bootstrap_mean(changed)


def changed_by_circle(engine: Engine, index: int) -> float:
    walk = circle(random.Random(500 + index), CIRCLES)
    last = generate(engine, walk, 1 + 4 * CIRCLE_STEPS, index)[-1]
    return land_changed(last, walk.ends[-1], still_land(walk.world))


def circle(rng: random.Random, rounds: int) -> Walk:
    """Find a walk in circles that no obstacle blocks."""
    sides = [action for action in ("right", "down", "left", "up") for _ in range(CIRCLE_STEPS)]
    while True:
        scene, seed, before = rng.choice(scenes()), rng.randrange(1 << 19), random_walk(rng, rng.randint(0, 40))
        places = simulate(scene, seed, sides, before).places
        moved = [(x // STEP, y // STEP) for x, y in np.diff(places, axis=0).tolist()]
        if moved == [MOVES[action] for action in sides]:
            return simulate(scene, seed, sides * rounds, before)


def straight_walks(engine: Engine, walks: int, progress: Progress) -> tuple[list[float], list[Counts]]:
    """Streams of 60 s straight on, from a prompt alone: shares of frames with the hero, and `things`."""
    heroes, landmarks = [], []
    for index in range(walks):
        hero, counts = progress.once(f"straight {index}", straight_walk, engine, index)
        heroes.append(hero)
        landmarks.append(counts)
        progress.say(f"straight {index + 1}/{walks}: hero {hero:.1%}")
    return heroes, landmarks


def straight_walk(engine: Engine, index: int) -> tuple[float, Counts]:
    rng = random.Random(600 + index)
    scene, seed = rng.choice(scenes()), rng.randrange(1 << 19)
    actions = straight(rng, STRAIGHT - 1, World(HELD_OUT + seed, scene))
    ends = last_pictures(engine, scene, actions, index, 1)[:, -1]
    return hero_share(scene, ends[1:]), things(ends, simulate(scene, seed, actions).ends)


def hero_share(scene: Scene, pictures: Picture) -> float:
    """Share of pictures whose hero has the prompted shape and colour."""
    return float(np.mean([(shown.colour, shown.hero) == (scene.colour, scene.hero) for shown in
                          classifiers().named(pictures)]))  # fmt: skip


def words_share(scene: Scene, pictures: Picture) -> float:
    """Share of the prompt's words, hero and land, that pictures show."""
    kinds = ("colour", "hero", "biome", "light")
    return float(np.mean([getattr(shown, kind) == getattr(scene, kind) for shown in classifiers().named(pictures)
                          for kind in kinds]))  # fmt: skip


def things(ours: Picture, true: Picture) -> Counts:
    """Numbers of landmarks in each of a model's pictures, and in each of the simulator's."""
    return classifiers().things(ours).tolist(), classifiers().things(true).tolist()


def coverage(counts: Sequence[Counts]) -> Interval:
    """Share of frames with at least the simulator's median number of landmarks, as a share of the simulator's own.

    counts: `things` of each stream and of the simulator in the same scene and with the same actions.
    """
    level = max(1.0, float(np.median(np.concatenate([true for _, true in counts]))))
    ours, true = ([float((np.array(part) >= level).mean()) for part in side] for side in zip(*counts, strict=True))
    return bootstrap_ratio(ours, true)


def judge(engine: Engine, walks: int, seeds: int, walking: Sequence[Walked], progress: Progress) -> dict[str, Any]:
    """Measure all figures of this file.

    walking: random walks of 60 s. `hero_identity` is the least of its shares at rest, walking and straight on;
    `intervals` has the bounds of each figure over walks.
    """
    rests, rest_heroes = resting(engine, walks, progress)
    straight_heroes, straight_things = straight_walks(engine, walks, progress)
    heroes = {
        "rest": bootstrap_mean(rest_heroes),
        "walking": bootstrap_mean([walk["hero"] for walk in walking]),
        "straight": bootstrap_mean(straight_heroes),
    }
    figures = {
        **rests,
        "rest_240s_changed": long_resting(engine, seeds, progress),
        "rest_away_60s_changed": resting_away(engine, walks, progress),
        "circle_changed": circling(engine, walks, progress),
        "land_coverage": coverage([walk["things"] for walk in walking]),
        "straight_coverage": coverage(straight_things),
        **{f"hero_identity_{kind}": interval for kind, interval in heroes.items()},
        "words_right": bootstrap_mean([walk["words"] for walk in walking]),
        "action_response": bootstrap_mean([walk["response"] for walk in walking]),
    }
    return {
        **{name: interval.mean for name, interval in figures.items()},
        "hero_identity": min(interval.mean for interval in heroes.values()),
        "intervals": {name: asdict(interval) for name, interval in figures.items()},
        "judge_accuracy": accuracy(),
    }


def response(pictures: Picture, actions: Sequence[str]) -> float:
    """Share of latent frames after the first that show the given action; pictures [n, SEEN, SIZE, SIZE, 3]."""
    shown = classifiers().actions(pictures[1:]).argmax(-1)
    return float(np.mean(shown == [ACTIONS.index(action) for action in actions[: len(shown)]]))
