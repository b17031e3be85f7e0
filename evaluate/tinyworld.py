"""Evaluation of the small world against its simulator: obedience to actions, memory, and drift.

Every figure comes from pictures at the end of a latent frame, where the camera is at a whole step. The worlds have
seeds that are not in the training data. `BARS` are the targets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
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
from .tinyworld_classifiers import SEEN
from .tinyworld_judge import Walked, judge
from .tinyworld_walks import (
    HERO,
    PREFIX,
    Log,
    Picture,
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


def decibel(wrong: NDArray[Any]) -> float:
    """PSNR, dB, of differences of uint8 pictures."""
    return 20 * math.log10(255 / max(float(np.sqrt(np.mean(np.square(wrong, dtype=np.float64)))), 1e-9))


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


def actions_right(engine: Engine, walks: int, log: Log) -> float:
    """Share of latent frames in which the camera moves as the simulator's does."""
    right = total = 0
    for index, walk in enumerate(random_walks(walks, PREFIX + 8, 1)):
        new = generate(engine, walk, PREFIX, index)[FRAMES - 1 :: FRAMES]
        ends = np.concatenate((walk.ends[PREFIX - 1 : PREFIX], new))
        for step in range(len(ends) - 1):
            (x, y), (to_x, to_y) = walk.places[PREFIX - 1 + step], walk.places[PREFIX + step]
            right += shift_between(ends[step], ends[step + 1]) == ((to_x - x) // STEP, (to_y - y) // STEP)
            total += 1
        log(f"actions {index + 1}/{walks}: {right / total:.1%} right")
    return right / total


def reconstruction(engine: Engine, walks: int, log: Log) -> float:
    """PSNR, dB, of walks encoded and decoded by the VAE."""
    wrong = []
    for index, walk in enumerate(random_walks(walks, 12, 2)):
        pixels = torch.from_numpy(walk.pictures).permute(0, 3, 1, 2).to(engine.device, engine.dtype) / 127.5 - 1
        vae = engine.parts.vae
        with torch.no_grad():
            decoded = to_frames(vae.decode(vae.encode(pixels, vae.new_state()), vae.new_state()))
        wrong.append(decoded.astype(np.float64) - walk.pictures)
        log(f"reconstruction {index + 1}/{walks}: {decibel(wrong[-1]):.1f} dB")
    return decibel(np.stack(wrong))


def seen_before(walk: Walk, given: int, frame: int) -> NDArray[np.bool_]:
    """Mask [SIZE, SIZE] of the pixels of a latent frame with land that the first `given` frames have shown."""
    x, y = walk.places[frame]
    seen = np.zeros((SIZE, SIZE), dtype=bool)
    for then_x, then_y in walk.places[:given]:
        left, top = then_x - x, then_y - y
        seen[max(0, top) : max(0, SIZE + top), max(0, left) : max(0, SIZE + left)] = True
    return seen


def first_two_seconds(engine: Engine, walks: int, log: Log) -> float:
    """PSNR, dB, of the first 2 s against the simulator, on land that the prefix has shown."""
    count = 2 * engine.fps // FRAMES
    wrong = []
    for index, walk in enumerate(random_walks(walks, PREFIX - 1 + count, 3)):
        ends = generate(engine, walk, PREFIX, index)[FRAMES - 1 :: FRAMES]
        for step, picture in enumerate(ends):
            mask = seen_before(walk, PREFIX, PREFIX + step)
            wrong.append((picture.astype(np.float64) - walk.ends[PREFIX + step])[mask].ravel())
        log(f"first seconds {index + 1}/{walks}: {decibel(np.concatenate(wrong)):.1f} dB")
    return decibel(np.concatenate(wrong))


def landmark_return(engine: Engine, walks: int, log: Log) -> float:
    """Share of landmarks that reappear after walking away and back within the window.

    A landmark reappears if the picture around it is nearer to the simulator's than to one without it.
    """
    there = total = 0
    rng = random.Random(4)
    for index in range(walks):
        walk, marks = away_and_back(rng, (engine.preset.context.local_attn_size - 2) // 2)
        given = 2
        last = generate(engine, walk, given, index)[-1].astype(np.float64)
        for mark in marks:
            where = around(mark, walk.places[-1])
            true, without = walk.ends[-1].astype(np.float64), walk.world.picture_without(mark).astype(np.float64)
            there += bool(np.square(last - true)[where].mean() < np.square(last - without)[where].mean())
            total += 1
        log(f"landmarks {index + 1}/{walks}: {there}/{total} reappeared")
    return there / total


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


def tenth_statistics(pictures: Picture) -> NDArray[np.float64]:
    """Signals and features of each tenth of a video [N, H, W, 3], [10, signals + 32]."""
    return np.stack([np.concatenate((signals(part), features(part))) for part in np.array_split(pictures, 10)])


def one_minute(engine: Engine, walks: int, log: Log) -> tuple[dict[str, Any], Picture, list[Walked]]:
    """Drift between tenths of 60 s streams from a prompt without a video, the same of the simulator, and the hero.

    The signals are averaged over all streams; the simulator's drift is the level of chance. Also returns pictures for a
    contact sheet, [8 streams at most, 10, SIZE, SIZE, 3], and the walks for `judge`.
    """
    count = round(STREAM_SECONDS * engine.fps / FRAMES)
    ours, true, sheet, right, total = [], [], [], 0, 0
    walking: list[Walked] = []
    for index in range(walks):
        rng = random.Random(200 + index)
        scene, actions = rng.choice(scenes()), random_walk(rng, count)[: count - 1]
        pictures = last_pictures(engine, scene, actions, index, SEEN)
        ends = pictures[:, -1]
        for frame in range(1, count):
            right += hero_is(scene, actions[frame - 1], facing_after(actions[:frame]), ends[frame])
        total += count - 1
        truth = simulate(scene, rng.randrange(1 << 19), actions).ends
        ours.append(tenth_statistics(ends))
        true.append(tenth_statistics(truth))
        sheet.append(ends[:: count // 10][:10])
        walking.append((scene, actions, pictures, truth))
        log(f"one minute {index + 1}/{walks}: hero right in {right / total:.1%}")
    moved, chance = drift(np.mean(ours, 0)), drift(np.mean(true, 0))
    figures = {"hero_right": right / total, "drift": moved, "drift_60s": max(moved.values()), "simulator_drift": chance}
    return figures, np.stack(sheet[:8]), walking


def long_run(engine: Engine, seeds: int, minutes: float, log: Log) -> dict[str, Any]:
    """Count long streams that collapsed: in the last 8 s, contrast or sharpness is below half or above twice the
    simulator's in the same scene.
    """
    latent_fps = engine.fps / FRAMES
    total, eight = round(minutes * 60 * latent_fps), round(8 * latent_fps)
    collapsed = []
    for seed in range(seeds):
        rng = random.Random(100 + seed)
        scene, actions = rng.choice(scenes()), random_walk(rng, total)
        truth = signals(simulate(scene, rng.randrange(1 << 19), actions[: 8 * eight]).ends)
        with engine.open(prompt=scene.prompt, seed=seed, actions=actions) as session:
            for _ in session.stream(total - eight, decode=False):
                pass
            session.current.decoder.clear()  # the frames before were not decoded
            last = np.stack([block.frames[-1] for block in session.stream(eight) if block.frames is not None])
        ratio = signals(last)[[1, 3]] / truth[[1, 3]]
        if (ratio < 0.5).any() or (ratio > 2).any():
            collapsed.append(seed)
        log(f"long run {seed + 1}/{seeds}: contrast and sharpness at the end {ratio[0]:.2f} and {ratio[1]:.2f}")
    return {"collapsed": len(collapsed), "collapsed_seeds": collapsed}


def evaluate(
    engine: Engine, walks: int, seeds: int, minutes: float, log: Log = lambda message: None
) -> tuple[dict[str, Any], Picture]:
    """Measure every figure of `BARS`; return figures with `passed`, and pictures of streams, [streams, 10, H, W, 3]."""
    minute, sheet, walking = one_minute(engine, walks, log)
    figures: dict[str, Any] = {
        "actions_right": actions_right(engine, walks, log),
        "reconstruction_db": reconstruction(engine, walks, log),
        "first_2s_db": first_two_seconds(engine, walks, log),
        "landmark_return": landmark_return(engine, walks, log),
        **minute,
        **judge(engine, walks, seeds, walking, log),
        **long_run(engine, seeds, minutes, log),
    }
    passed = {
        name: figures[name] >= bar if sign == ">=" else figures[name] <= bar for name, (sign, bar) in BARS.items()
    }
    return figures | {"passed": passed}, sheet
