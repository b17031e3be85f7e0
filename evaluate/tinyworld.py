"""Evaluation of the small world against its simulator: obedience to actions, memory, and drift.

Every figure comes from pictures at the end of a latent frame, where the camera is at a whole step. The worlds have
seeds that are not in the training data. `BARS` are the targets.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..models.tinyworld.data import random_walk
from ..models.tinyworld.world import (
    BIOMES,
    COLOURS,
    FRAMES,
    MOVES,
    SIZE,
    STEP,
    Landmark,
    Scene,
    draw_hero,
    landmarks_near,
    lit,
    scenes,
    soft,
    stride_at,
)
from ..runtime.engine import Engine
from ..runtime.execution.decode_pipeline import to_frames
from .bootstrap import RESAMPLES, Interval, bootstrap_mean, bootstrap_ratio
from .tinyworld_classifiers import SEEN
from .tinyworld_judge import Walked, hero_share, judge, response, things, words_share
from .tinyworld_walks import (
    HERO,
    PREFIX,
    Picture,
    Progress,
    Walk,
    generate,
    last_pictures,
    random_walks,
    simulate,
    smooth,
)

STREAM_SECONDS = 60  # of the streams whose tenths are compared
EDGE = 6.0  # pixels a landmark's middle must be inside the picture to count as in view
BARS = {
    "actions_right": (">=", 0.95),
    "reconstruction_db": (">=", 30.0),
    "first_2s_db": (">=", 22.0),
    "landmark_return": (">=", 0.80),
    "drift_60s": ("<=", 0.05),
    "rest_60s_changed": ("<=", 0.05),
    "hero_identity": (">=", 0.98),
    "land_coverage": (">=", 0.70),
    "collapsed": ("<=", 0.0),
}


def judge_hash() -> str:
    """A hash of what measures: these modules and the weights of the classifiers."""
    files = sorted(Path(__file__).parent.glob("tinyworld*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def decibel(mean_square: float) -> float:
    """PSNR, dB, of uint8 pictures whose differences have this mean square."""
    return 20 * math.log10(255 / max(math.sqrt(mean_square), 1e-9))


def decibels(squares: Interval) -> Interval:
    """PSNR, dB, of mean squares."""
    low, high = (None if bound is None else decibel(bound) for bound in (squares.low, squares.high))
    return Interval(decibel(squares.mean), high, low, squares.videos)


def shift_between(before: Picture, after: Picture) -> tuple[int, int]:
    """The camera's move (dx, dy) in steps under which two pictures [SIZE, SIZE, 3] correlate best.

    Details are compared, not brightness, since night and fog move with the camera. The hero is left out.
    """
    then, now = details(before), details(after)
    match = {}
    for dx, dy in MOVES.values():
        x, y = dx * STEP, dy * STEP
        new = now[max(0, -y) : SIZE - max(0, y), max(0, -x) : SIZE - max(0, x)]
        old = then[max(0, y) : SIZE + min(0, y), max(0, x) : SIZE + min(0, x)]
        keep = np.ones(new.shape, dtype=bool)
        for row, column in ((max(0, -y), max(0, -x)), (max(0, y), max(0, x))):  # the hero of either picture
            top, left = HERO.start - row, HERO.start - column
            keep[max(0, top) : HERO.stop - row, max(0, left) : HERO.stop - column] = False
        match[dx, dy] = float((new * old)[keep].sum() / np.sqrt((new[keep] ** 2).sum() * (old[keep] ** 2).sum() + 1e-9))
    return max(match, key=lambda move: match[move])


def details(picture: Picture) -> NDArray[np.float64]:
    """Brightness without low frequencies, divided by its local standard deviation, [SIZE, SIZE]."""
    luma = np.log(picture.astype(np.float64).mean(-1) + 8)
    fine = luma - smooth(luma)
    return fine / np.sqrt(smooth(fine**2) + 1e-2)


def actions_right(engine: Engine, walks: int, progress: Progress) -> Interval:
    """Share of latent frames in which the camera moves as the simulator's does."""
    right, total = [], []
    for index, walk in enumerate(random_walks(walks, PREFIX + 8, 1)):
        followed = progress.once(f"actions {index}", moves_followed, engine, walk, index)
        right.append(sum(followed))
        total.append(len(followed))
        progress.say(f"actions {index + 1}/{walks}: {sum(right) / sum(total):.1%} right")
    return bootstrap_ratio(right, total)


def moves_followed(engine: Engine, walk: Walk, seed: int) -> list[bool]:
    new = generate(engine, walk, PREFIX, seed)[FRAMES - 1 :: FRAMES]
    ends = np.concatenate((walk.ends[PREFIX - 1 : PREFIX], new))
    moves = np.diff(walk.places[PREFIX - 1 :], axis=0) // STEP
    return [shift_between(*ends[step : step + 2]) == tuple(move) for step, move in enumerate(moves.tolist())]


def reconstruction(engine: Engine, walks: int, progress: Progress) -> Interval:
    """PSNR, dB, of walks encoded and decoded by the VAE."""
    wrong = []
    for index, walk in enumerate(random_walks(walks, 12, 2)):
        wrong.append(progress.once(f"reconstruction {index}", reconstruction_error, engine, walk))
        progress.say(f"reconstruction {index + 1}/{walks}: {decibel(wrong[-1]):.1f} dB")
    return decibels(bootstrap_mean(wrong))


@torch.no_grad()
def reconstruction_error(engine: Engine, walk: Walk) -> float:
    pixels = torch.from_numpy(walk.pictures).permute(0, 3, 1, 2).to(engine.device, engine.dtype) / 127.5 - 1
    vae = engine.parts.vae
    decoded = to_frames(vae.decode(vae.encode(pixels, vae.new_state()), vae.new_state()))
    return float(np.square(decoded.astype(np.float64) - walk.pictures).mean())


def seen_before(walk: Walk, given: int, frame: int) -> NDArray[np.bool_]:
    """Mask [SIZE, SIZE] of the pixels of a latent frame with land that the first `given` frames have shown."""
    x, y = walk.places[frame]
    seen = np.zeros((SIZE, SIZE), dtype=bool)
    for then_x, then_y in walk.places[:given]:
        left, top = then_x - x, then_y - y
        seen[max(0, top) : max(0, SIZE + top), max(0, left) : max(0, SIZE + left)] = True
    return seen


def first_two_seconds(engine: Engine, walks: int, progress: Progress) -> Interval:
    """PSNR, dB, of the first 2 s against the simulator, on land that the prefix has shown."""
    count = 2 * engine.fps // FRAMES
    squares, pixels = [], []
    for index, walk in enumerate(random_walks(walks, PREFIX - 1 + count, 3)):
        wrong, size = progress.once(f"first seconds {index}", first_error, engine, walk, index)
        squares.append(wrong)
        pixels.append(size)
        progress.say(f"first seconds {index + 1}/{walks}: {decibel(sum(squares) / sum(pixels)):.1f} dB")
    return decibels(bootstrap_ratio(squares, pixels))


def first_error(engine: Engine, walk: Walk, seed: int) -> tuple[float, int]:
    """Sum of the squared differences on land that the prefix has shown, and their number."""
    wrong = []
    for step, picture in enumerate(generate(engine, walk, PREFIX, seed)[FRAMES - 1 :: FRAMES]):
        mask = seen_before(walk, PREFIX, PREFIX + step)
        wrong.append((picture.astype(np.float64) - walk.ends[PREFIX + step])[mask].ravel())
    every = np.concatenate(wrong)
    return float(np.square(every).sum()), every.size


def landmark_return(engine: Engine, walks: int, progress: Progress) -> Interval:
    """Share of landmarks that reappear after walking away and back within the window."""
    there, total = [], []
    rng = random.Random(4)
    for index in range(walks):
        walk, marks = away_and_back(rng, (engine.preset.context.local_attn_size - 2) // 2)
        returned = progress.once(f"landmarks {index}", landmarks_returned, engine, walk, marks, index)
        there.append(sum(returned))
        total.append(len(returned))
        progress.say(f"landmarks {index + 1}/{walks}: {sum(there)}/{sum(total)} reappeared")
    return bootstrap_ratio(there, total)


def landmarks_returned(engine: Engine, walk: Walk, marks: Sequence[Landmark], seed: int) -> list[bool]:
    """Whether the picture around each landmark is nearer to the simulator's than to one without it."""
    given = 2
    last, true = (pictures[-1].astype(np.float64) for pictures in (generate(engine, walk, given, seed), walk.ends))
    returned = []
    for mark in marks:
        where, without = around(mark, walk.places[-1]), walk.world.picture_without(mark).astype(np.float64)
        returned.append(bool(np.square(last - true)[where].mean() < np.square(last - without)[where].mean()))
    return returned


def away_and_back(rng: random.Random, steps: int) -> tuple[Walk, list[Landmark]]:
    """Find a walk without obstacles that leaves landmarks behind and returns; return it and these landmarks."""
    while True:
        action, back = rng.choice([("up", "down"), ("down", "up"), ("left", "right"), ("right", "left")])
        actions = ["stay", *[action] * steps, *[back] * steps]
        walk = simulate(rng.choice(scenes()), rng.randrange(1 << 19), actions, random_walk(rng, rng.randint(0, 40)))
        (x, y), (dx, dy) = walk.places[0], MOVES[action]
        far = (x + dx * STEP * steps, y + dy * STEP * steps)
        if walk.places[steps + 1] != far or walk.places[-1] != walk.places[0]:
            continue  # something stood in the way
        marks = landmarks_near(walk.world.seed, x, y, SIZE / 2)
        left_behind = [mark for mark in marks if in_view(mark, walk.places[0], -EDGE) and not in_view(mark, far, EDGE)]
        if left_behind:
            return walk, left_behind


def in_view(mark: Landmark, camera: tuple[int, int], margin: float) -> bool:
    """Return True if a landmark's middle is in the picture extended by `margin` pixels."""
    reach = SIZE / 2 + margin
    return abs(mark.x - camera[0]) < reach and abs(mark.y - camera[1]) < reach


def around(mark: Landmark, camera: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the picture around a landmark."""
    x, y = round(mark.x) - camera[0] + SIZE // 2, round(mark.y) - camera[1] + SIZE // 2
    return slice(max(0, y - 9), y + 9), slice(max(0, x - 9), x + 9)


def hero_is(scene: Scene, action: str, facing: str, picture: Picture) -> bool:
    """Return True if the middle of a picture [SIZE, SIZE, 3] is nearest to the prompted hero.

    The alternatives are heroes of other colours and bare ground. facing: direction of the hero. action: the last one,
    which gives the hero's stride at the end of a latent frame.
    """
    biome = BIOMES[scene.biome]
    bare = np.broadcast_to(np.mean(biome.ground, axis=0), (SIZE, SIZE, 3)).astype(np.float32)
    stride = stride_at(action, FRAMES)
    drawn = {colour: bare.copy() for colour in COLOURS}
    for colour, canvas in drawn.items():
        draw_hero(canvas, replace(scene, colour=colour), facing, stride)
    body = (np.abs(drawn[scene.colour] - bare).max(-1) > 0.1) & (
        np.abs(drawn["red"] - drawn["blue"]).max(-1) > 0.1
    )  # pixels in the hero's colour
    seen = picture[body] / 255.0
    wrong = {
        name: float(np.square(np.clip(lit(soft(canvas), scene.light), 0, 1)[body] - seen).mean())
        for name, canvas in (*drawn.items(), ("none", bare))
    }
    return min(wrong, key=lambda name: wrong[name]) == scene.colour


def facing_after(actions: Sequence[str]) -> str:
    """Direction of the hero: that of the last move, `down` before any."""
    return next((action for action in reversed(actions) if action != "stay"), "down")


def signals(pictures: Picture) -> NDArray[np.float64]:
    """Brightness, contrast, saturation and sharpness of pictures [N, H, W, 3], averaged over them."""
    x = pictures.astype(np.float64) / 255
    luma = x.mean(-1)
    edges = np.abs(np.diff(luma, axis=1)).mean() + np.abs(np.diff(luma, axis=2)).mean()
    return np.array([luma.mean(), luma.std((1, 2)).mean(), (x.max(-1) - x.min(-1)).mean(), edges])


SIGNALS = ("brightness", "contrast", "saturation", "sharpness")


def features(pictures: Picture) -> NDArray[np.float64]:
    """Mean responses of two frozen layers of random convolutions to pictures [N, H, W, 3], [32]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    for channels, width in ((3, 16), (16, 32)):
        kernel = torch.randn(width, channels, 5, 5, generator=generator) / math.sqrt(channels * 25)
        x = F.relu(F.conv2d(x, kernel, stride=2))
    return x.mean((0, 2, 3)).double().numpy()


def drift(tenths: NDArray[np.float64]) -> dict[str, float]:
    """Largest change between the first tenth and a later one, as a share of the first: tenths [10, signals + 32]."""
    count = len(SIGNALS)
    moved = np.abs(tenths[1:, :count] - tenths[0, :count]) / tenths[0, :count]
    frozen = np.linalg.norm(tenths[1:, count:] - tenths[0, count:], axis=1) / np.linalg.norm(tenths[0, count:])
    return dict(zip((*SIGNALS, "frozen feature"), (*moved.max(0).tolist(), float(frozen.max())), strict=True))


def drift_interval(tenths: NDArray[np.float64]) -> Interval:
    """The largest drift of tenths [walks, 10, signals + 32], with an interval over walks by the bootstrap."""
    largest = max(drift(tenths.mean(0)).values())
    if len(tenths) < 2:
        return Interval(largest, None, None, len(tenths))
    chosen = np.random.default_rng(0).integers(len(tenths), size=(RESAMPLES, len(tenths)))
    low, high = np.quantile([max(drift(tenths[walks].mean(0)).values()) for walks in chosen], [0.025, 0.975])
    return Interval(largest, float(low), float(high), len(tenths))


def tenth_statistics(pictures: Picture) -> NDArray[np.float64]:
    """Signals and features of each tenth of a video [N, H, W, 3], [10, signals + 32]."""
    return np.stack([np.concatenate((signals(part), features(part))) for part in np.array_split(pictures, 10)])


class Minute(Walked):
    """A stream of 60 s: frames with the hero's colour, and `tenth_statistics` of the model and of the simulator."""

    hero_right: int
    ours: list[list[float]]
    true: list[list[float]]


def one_minute(engine: Engine, walks: int, progress: Progress) -> tuple[dict[str, Any], Sequence[Walked]]:
    """Drift between tenths of 60 s streams from a prompt without a video, the same of the simulator, and the hero.

    The signals are averaged over all streams; the simulator's drift is the level of chance. Also returns the walks for
    `judge`.
    """
    count = minute_frames(engine)
    minutes: list[Minute] = []
    for index in range(walks):
        minutes.append(progress.once(f"one minute {index}", minute, engine, index))
        right = sum(walk["hero_right"] for walk in minutes) / len(minutes) / (count - 1)
        progress.say(f"one minute {index + 1}/{walks}: hero right in {right:.1%}")
    ours, true = (np.array([walk[side] for walk in minutes]) for side in ("ours", "true"))
    moved, chance = drift(ours.mean(0)), drift(true.mean(0))
    figures = {"hero_right": right, "drift": moved, "drift_60s": max(moved.values()), "simulator_drift": chance}
    return figures | {"drift_interval": drift_interval(ours)}, minutes


def minute_frames(engine: Engine) -> int:
    return round(STREAM_SECONDS * engine.fps / FRAMES)


def minute(engine: Engine, index: int) -> Minute:
    """Judge a random walk from a prompt alone."""
    count, rng = minute_frames(engine), random.Random(200 + index)
    scene, actions = rng.choice(scenes()), random_walk(rng, count)[: count - 1]
    pictures = last_pictures(engine, scene, actions, index, SEEN)
    ends, truth = pictures[:, -1], simulate(scene, rng.randrange(1 << 19), actions).ends
    return {
        "hero_right": sum(
            hero_is(scene, actions[frame - 1], facing_after(actions[:frame]), ends[frame]) for frame in range(1, count)
        ),
        "ours": tenth_statistics(ends).tolist(),
        "true": tenth_statistics(truth).tolist(),
        "hero": hero_share(scene, ends[1:]),
        "words": words_share(scene, ends[1:]),
        "response": response(pictures, actions),
        "things": things(ends, truth),
    }


def long_run(engine: Engine, seeds: int, minutes: float, progress: Progress) -> dict[str, Any]:
    """Count long streams that collapsed: in the last 8 s, contrast or sharpness is below half or above twice the
    simulator's in the same scene.
    """
    collapsed = []
    for seed in range(seeds):
        ratio = progress.once(f"long run of {minutes:g} minutes {seed}", end_of_long_run, engine, seed, minutes)
        if min(ratio) < 0.5 or max(ratio) > 2:
            collapsed.append(seed)
        contrast, sharpness = ratio
        progress.say(f"long run {seed + 1}/{seeds}: contrast and sharpness at the end {contrast:.2f}, {sharpness:.2f}")
    return {"collapsed": len(collapsed), "collapsed_seeds": collapsed}


def end_of_long_run(engine: Engine, seed: int, minutes: float) -> list[float]:
    """Contrast and sharpness of the last 8 s by the simulator's in the same scene."""
    latent_fps = engine.fps / FRAMES
    total, eight = round(minutes * 60 * latent_fps), round(8 * latent_fps)
    rng = random.Random(100 + seed)
    scene, actions = rng.choice(scenes()), random_walk(rng, total)
    truth = signals(simulate(scene, rng.randrange(1 << 19), actions[: 8 * eight]).ends)
    with engine.open(prompt=scene.prompt, seed=seed, actions=actions) as session:
        for _ in session.stream(total - eight, decode=False):
            pass
        session.current.decoder.clear()  # the frames before were not decoded
        last = np.stack([block.frames[-1] for block in session.stream(eight) if block.frames is not None])
    ratio: list[float] = (signals(last)[[1, 3]] / truth[[1, 3]]).tolist()
    return ratio


def evaluate(
    engine: Engine, walks: int, seeds: int, minutes: float, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure every figure of `BARS`; return figures with `passed` and, for most, `intervals` over walks."""
    progress = progress or Progress()
    minute_figures, walking = one_minute(engine, walks, progress)
    measured = {
        "actions_right": actions_right(engine, walks, progress),
        "reconstruction_db": reconstruction(engine, walks, progress),
        "first_2s_db": first_two_seconds(engine, walks, progress),
        "landmark_return": landmark_return(engine, walks, progress),
    }
    intervals = {name: asdict(interval) for name, interval in measured.items()}
    intervals["drift_60s"] = asdict(minute_figures.pop("drift_interval"))
    judged = judge(engine, walks, seeds, walking, progress)
    figures = {
        **{name: interval.mean for name, interval in measured.items()},
        **minute_figures,
        **judged,
        **long_run(engine, seeds, minutes, progress),
        "intervals": intervals | judged["intervals"],
    }
    passed = {
        name: figures[name] >= bar if sign == ">=" else figures[name] <= bar for name, (sign, bar) in BARS.items()
    }
    return figures | {"passed": passed}
