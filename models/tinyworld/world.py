"""Simulator of the small world: a land seen from above by a camera that follows a hero.

Ground, landmarks and butterflies are functions of a seed, a scene and the time. One action lasts one latent frame,
which is four pictures; a step is 8 pixels, one latent pixel. Uses only numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels a side of a picture
STEP = 8  # pixels the hero walks in one action
FRAMES = 4  # pictures of one action
CELL = 24  # pixels a side of a square that holds at most one landmark
ACTIONS = ("stay", "up", "down", "left", "right")
MOVES = {"stay": (0, 0), "up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}

COLOURS = {
    "red": (0.86, 0.20, 0.18), "blue": (0.20, 0.38, 0.90), "yellow": (0.96, 0.80, 0.20),
    "purple": (0.62, 0.28, 0.80), "white": (0.95, 0.95, 0.97), "orange": (0.96, 0.52, 0.14),
}  # fmt: skip
HEROES = ("robot", "fox", "ghost", "wizard")
LIGHTS = {  # factor and offset of each colour channel
    "by day": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    "at night": ((0.42, 0.46, 0.68), (0.0, 0.0, 0.03)),
    "at sunset": ((1.0, 0.74, 0.56), (0.03, 0.0, 0.04)),
    "in fog": ((0.52, 0.52, 0.52), (0.38, 0.40, 0.42)),
}

MASK = (1 << 64) - 1
ROUNDS = ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1))

Colour = tuple[float, float, float]
Canvas = NDArray[np.float32]
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Biome:
    """Colours of a landscape. ground: two colours to mix; the others are of landmarks and of butterflies' wings."""

    ground: tuple[Colour, Colour]
    leaf: Colour
    trunk: Colour
    stone: Colour
    water: Colour
    roof: Colour
    wing: Colour


BIOMES = {
    "snowy forest": Biome(
        ((0.90, 0.93, 0.97), (0.78, 0.85, 0.93)), (0.13, 0.40, 0.30), (0.36, 0.25, 0.18), (0.62, 0.66, 0.72),
        (0.60, 0.80, 0.94), (0.55, 0.22, 0.20), (0.10, 0.35, 0.60),
    ),
    "green meadow": Biome(
        ((0.47, 0.72, 0.32), (0.36, 0.61, 0.27)), (0.16, 0.46, 0.18), (0.45, 0.30, 0.16), (0.58, 0.58, 0.56),
        (0.25, 0.55, 0.85), (0.80, 0.28, 0.22), (0.98, 0.95, 0.60),
    ),
    "sandy desert": Biome(
        ((0.93, 0.81, 0.56), (0.86, 0.70, 0.44)), (0.30, 0.56, 0.28), (0.34, 0.50, 0.26), (0.68, 0.48, 0.34),
        (0.20, 0.62, 0.72), (0.92, 0.90, 0.82), (0.20, 0.20, 0.24),
    ),
    "autumn wood": Biome(
        ((0.66, 0.52, 0.30), (0.54, 0.42, 0.24)), (0.86, 0.42, 0.12), (0.36, 0.22, 0.14), (0.52, 0.48, 0.46),
        (0.28, 0.44, 0.52), (0.40, 0.26, 0.46), (0.96, 0.92, 0.84),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A sentence of the grammar, such as "a red robot in a snowy forest at night", in parts."""

    colour: str
    hero: str
    biome: str
    light: str

    @property
    def prompt(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        place = "an" if self.biome[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.hero} in {place} {self.biome} {self.light}"


def scenes() -> list[Scene]:
    """Return every scene of the grammar."""
    return [
        Scene(colour, hero, biome, light)
        for colour in COLOURS
        for hero in HEROES
        for biome in BIOMES
        for light in LIGHTS
    ]


@dataclass(frozen=True)
class Landmark:
    """A fixed object. reach: least distance of the hero in pixels, 0 if it may walk over the object."""

    kind: str
    x: float
    y: float
    size: float
    reach: float


def draw_number(seed: int, x: int, y: int, salt: int) -> float:
    """Hash a place (x, y) to a number in [0, 1); `mix` for one place, in Python integers."""
    h = (x * 0x9E3779B97F4A7C15 & MASK) ^ (y * 0xC2B2AE3D27D4EB4F & MASK)
    h ^= (seed * 0x165667B19E3779F9 + salt * 0x27D4EB2F165667C5) & MASK
    for shift, factor in ROUNDS:
        h = (h ^ (h >> shift)) * factor & MASK
    return (h >> 40) / (1 << 24)


def mix(seed: int, x: NDArray[np.int64], y: NDArray[np.int64], salt: int) -> NDArray[np.float32]:
    """Hash places (x, y) to numbers in [0, 1), one for each place."""
    with np.errstate(over="ignore"):
        h = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ y.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        h ^= np.uint64((seed * 0x165667B19E3779F9 + salt * 0x27D4EB2F165667C5) & MASK)
        for shift, factor in ROUNDS:
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return ((h >> np.uint64(40)).astype(np.float32)) / np.float32(1 << 24)


@lru_cache(maxsize=4096)
def landmark_at(seed: int, cx: int, cy: int) -> Landmark | None:
    """Return the landmark of a cell, if it has one; the cells around the start are free."""
    if draw_number(seed, cx, cy, 1) > 0.74 or (cx in (-1, 0) and cy in (-1, 0)):
        return None
    x = (cx + 0.25 + 0.5 * draw_number(seed, cx, cy, 2)) * CELL
    y = (cy + 0.25 + 0.5 * draw_number(seed, cx, cy, 3)) * CELL
    pick, size = draw_number(seed, cx, cy, 4), 0.85 + 0.3 * draw_number(seed, cx, cy, 5)
    for share, kind, reach in (
        (0.42, "tree", 6.0), (0.60, "stone", 6.0), (0.74, "pond", 8.0), (0.90, "flowers", 0.0), (1.0, "house", 9.0),
    ):  # fmt: skip
        if pick < share:
            return Landmark(kind, x, y, size, reach * size)
    raise AssertionError(pick)


def landmarks_near(seed: int, x: float, y: float, reach: float) -> list[Landmark]:
    """Return the landmarks whose cells come within `reach` of a place, sorted from back to front."""
    cells = [
        landmark_at(seed, cx, cy)
        for cy in range(math.floor((y - reach) / CELL), math.floor((y + reach) / CELL) + 1)
        for cx in range(math.floor((x - reach) / CELL), math.floor((x + reach) / CELL) + 1)
    ]
    return sorted((mark for mark in cells if mark is not None), key=lambda mark: (mark.y, mark.x))


def disc(
    canvas: Canvas, x: float, y: float, rx: float, ry: float, colour: Colour, alpha: float = 1.0, soft: float = 1.0
) -> None:
    """Blend an ellipse with an edge of `soft` pixels onto the canvas."""
    height, width = canvas.shape[:2]
    left, right = max(0, math.floor(x - rx - soft)), min(width, math.ceil(x + rx + soft) + 1)
    top, bottom = max(0, math.floor(y - ry - soft)), min(height, math.ceil(y + ry + soft) + 1)
    if left >= right or top >= bottom:
        return
    dx = (np.arange(left, right, dtype=np.float32) + 0.5 - x) / rx
    dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / ry
    distance = (np.sqrt(dx[None] ** 2 + dy[:, None] ** 2) - 1) * min(rx, ry)
    cover = (np.clip(0.5 - distance / soft, 0, 1) * alpha)[..., None]
    part = canvas[top:bottom, left:right]
    part += cover * (np.array(colour, dtype=np.float32) - part)


def box(canvas: Canvas, x: float, y: float, rx: float, ry: float, colour: Colour, round_by: float = 1.5) -> None:
    """Blend a rectangle with round corners onto the canvas."""
    height, width = canvas.shape[:2]
    left, right = max(0, math.floor(x - rx - 1)), min(width, math.ceil(x + rx + 1) + 1)
    top, bottom = max(0, math.floor(y - ry - 1)), min(height, math.ceil(y + ry + 1) + 1)
    if left >= right or top >= bottom:
        return
    dx = np.abs(np.arange(left, right, dtype=np.float32) + 0.5 - x) - (rx - round_by)
    dy = np.abs(np.arange(top, bottom, dtype=np.float32) + 0.5 - y) - (ry - round_by)
    outside = np.sqrt(np.maximum(dx[None], 0) ** 2 + np.maximum(dy[:, None], 0) ** 2)
    cover = np.clip(0.5 - (outside - round_by), 0, 1)[..., None]
    part = canvas[top:bottom, left:right]
    part += cover * (np.array(colour, dtype=np.float32) - part)


def lighter(colour: Colour, by: float) -> Colour:
    """Mix a colour with white for `by` above 0, with black for `by` below 0."""
    end = 1.0 if by > 0 else 0.0
    red, green, blue = (part + (end - part) * abs(by) for part in colour)
    return red, green, blue


def value_noise(seed: int, x: NDArray[np.float32], y: NDArray[np.float32], scale: float, salt: int) -> Canvas:
    """Return smooth value noise in [0, 1], [len(y), len(x)]."""
    gx, gy = x / scale, y / scale
    ix, iy = np.floor(gx).astype(np.int64), np.floor(gy).astype(np.int64)
    fx, fy = gx - ix, gy - iy
    fx, fy = (fx * fx * (3 - 2 * fx))[None], (fy * fy * (3 - 2 * fy))[:, None]
    corner = {(dx, dy): mix(seed, (ix + dx)[None], (iy + dy)[:, None], salt) for dx in (0, 1) for dy in (0, 1)}
    top = corner[0, 0] + fx * (corner[1, 0] - corner[0, 0])
    bottom = corner[0, 1] + fx * (corner[1, 1] - corner[0, 1])
    return top + fy * (bottom - top)


def draw_land(
    seed: int, biome: Biome, x: int, y: int, width: int, height: int, without: Landmark | None = None
) -> Canvas:
    """Draw ground and landmarks, except `without`, from world pixel (x, y) on: colours [height, width, 3] in 0..1."""
    xs = np.arange(x, x + width, dtype=np.float32) + 0.5
    ys = np.arange(y, y + height, dtype=np.float32) + 0.5
    mix = 0.65 * value_noise(seed, xs, ys, 26.0, 11) + 0.35 * value_noise(seed, xs, ys, 9.0, 12)
    mix = np.clip((mix - 0.25) * 2.0, 0, 1)[..., None].astype(np.float32)
    one, two = (np.array(colour, dtype=np.float32) for colour in biome.ground)
    canvas = one + mix * (two - one)
    for mark in landmarks_near(seed, x + width / 2, y + height / 2, max(width, height) / 2 + CELL):
        if mark != without:
            draw_landmark(canvas, biome, mark, mark.x - x, mark.y - y)
    return canvas


def draw_landmark(canvas: Canvas, biome: Biome, mark: Landmark, x: float, y: float) -> None:
    s = mark.size
    if mark.kind != "flowers" and mark.kind != "pond":
        disc(canvas, x + 1.5, y + 4 * s, 7 * s, 3.2 * s, (0.05, 0.08, 0.12), 0.28, 2.5)
    if mark.kind == "tree":
        box(canvas, x, y + 2.5 * s, 1.3 * s, 3.5 * s, biome.trunk)
        disc(canvas, x, y - 3 * s, 6.5 * s, 6.5 * s, lighter(biome.leaf, -0.18), 1.0, 1.4)
        disc(canvas, x - 0.8, y - 4 * s, 5.2 * s, 5.0 * s, biome.leaf, 1.0, 1.6)
        disc(canvas, x - 2 * s, y - 5.5 * s, 2.2 * s, 1.9 * s, lighter(biome.leaf, 0.32), 0.8, 1.8)
    elif mark.kind == "stone":
        disc(canvas, x, y + 0.5, 6 * s, 4.6 * s, lighter(biome.stone, -0.2), 1.0, 1.2)
        disc(canvas, x - 0.7, y - 0.6, 4.8 * s, 3.4 * s, biome.stone, 1.0, 1.6)
        disc(canvas, x - 2 * s, y - 1.6 * s, 1.8 * s, 1.1 * s, lighter(biome.stone, 0.4), 0.8, 1.4)
    elif mark.kind == "pond":
        disc(canvas, x, y, 9 * s, 6.6 * s, lighter(biome.ground[1], -0.22), 1.0, 2.0)
        disc(canvas, x, y, 7.8 * s, 5.5 * s, biome.water, 1.0, 1.6)
        disc(canvas, x - 2.4 * s, y - 1.6 * s, 2.6 * s, 1.0 * s, lighter(biome.water, 0.5), 0.7, 1.4)
    elif mark.kind == "flowers":
        for dx, dy, by in ((-4, -2, 0.1), (1, -4, 0.3), (4, 1, 0.0), (-2, 3, 0.2), (2, 4, 0.4)):
            disc(canvas, x + dx * s, y + dy * s, 1.5, 1.5, lighter(biome.roof, by), 0.95, 1.2)
    else:
        box(canvas, x, y + 2 * s, 6.5 * s, 4.5 * s, lighter(biome.trunk, 0.45))
        box(canvas, x, y + 4 * s, 1.5 * s, 2.6 * s, lighter(biome.trunk, -0.3), 0.8)
        box(canvas, x, y - 3 * s, 8 * s, 3.4 * s, lighter(biome.roof, -0.12), 2.6)
        box(canvas, x, y - 4 * s, 6.2 * s, 2.2 * s, biome.roof, 2.0)


def stride_at(action: str, index: int) -> float:
    """Return the phase of the hero's step in picture `index` (1..FRAMES) of an action, -1..1; 0 when it stands."""
    return 0.0 if action == "stay" else math.sin(2 * math.pi * index / FRAMES + math.pi / 4)


def draw_hero(canvas: Canvas, scene: Scene, facing: str, stride: float) -> None:
    """Draw the hero in the middle; `stride` in -1..1 is the phase of its step."""
    colour, (dx, dy) = COLOURS[scene.colour], MOVES[facing]
    x, y = SIZE / 2, SIZE / 2 - 0.8 * abs(stride)
    dark, bright = lighter(colour, -0.35), lighter(colour, 0.35)
    disc(canvas, SIZE / 2 + 0.5, SIZE / 2 + 5, 4.6, 2.0, (0.05, 0.07, 0.1), 0.35, 2.0)
    if scene.hero == "robot":
        for side in (-1, 1):
            box(canvas, x + 2 * side, y + 4.2 + 0.8 * stride * side, 1.2, 1.6, dark, 0.6)
        box(canvas, x, y + 1, 4.2, 3.4, colour, 1.2)
        box(canvas, x, y - 4, 3.4, 2.6, bright, 1.0)
        box(canvas, x, y - 7.6, 0.6, 1.4, dark, 0.5)
        disc(canvas, x, y - 9, 1.1, 1.1, colour)
    elif scene.hero == "fox":
        disc(canvas, x - 4.5 * dx, y + 2 - 2.5 * dy + stride, 2.6, 1.8, bright)
        disc(canvas, x, y + 2, 4.6, 3.0, colour)
        for side in (-1, 1):
            disc(canvas, x + 2.2 * side + dx, y - 5.4, 1.2, 1.9, dark)
            disc(canvas, x + 2.2 * side, y + 4.6 + 0.8 * stride * side, 0.9, 1.1, dark)
        disc(canvas, x + dx, y - 2.4, 3.5, 3.0, colour)
    elif scene.hero == "ghost":
        disc(canvas, x, y - 2, 4.8, 5.4, colour)
        box(canvas, x, y + 1.2, 4.7, 3.2, colour, 0.8)
        for side in (-1, 0, 1):
            disc(canvas, x + 3 * side, y + 4.4 + 0.7 * stride * (side or -1), 1.5, 1.3, colour)
        disc(canvas, x - 1.5, y - 4.6, 1.6, 1.6, bright, 0.7, 1.4)
    else:
        disc(canvas, x, y + 1.6, 4.4, 4.0, colour)
        disc(canvas, x, y - 2.6, 2.8, 2.6, (0.96, 0.82, 0.68))
        disc(canvas, x, y - 4.6, 4.6, 1.3, dark)
        for row in range(5):
            disc(canvas, x, y - 5.4 - row, 2.6 - 0.5 * row, 1.0, colour)
    if facing != "up":
        for side in (-1, 1):
            disc(canvas, x + 1.5 * side + 1.3 * dx, y - 3.4, 0.8, 1.0, (0.06, 0.06, 0.10))


def draw_creature(canvas: Canvas, seed: int, biome: Biome, x: int, y: int, time: int) -> None:
    """Draw butterflies, which circle independently of the actions. (x, y): corner of the picture in world pixels."""
    span = 64
    for cy in range((y - span) // span, (y + SIZE) // span + 2):
        for cx in range((x - span) // span, (x + SIZE) // span + 2):
            turn = 2 * math.pi * (time / 96 + draw_number(seed, cx, cy, 21))
            px = (cx + 0.5) * span + 12 * math.cos(turn) - x
            py = (cy + 0.5) * span + 8 * math.sin(turn) - y
            flap = 0.6 + 0.4 * math.cos(math.pi * time / 2)
            disc(canvas, px + 1, py + 6, 2.4, 1.0, (0.05, 0.07, 0.1), 0.25, 1.6)
            for side in (-1, 1):
                disc(canvas, px + 1.7 * side * flap, py, 1.9 * flap, 2.0, biome.wing)
            disc(canvas, px, py, 0.7, 1.7, (0.08, 0.07, 0.08))


def lit(canvas: Canvas, light: str) -> Canvas:
    """Apply a light, the same for all pixels, so that a place always looks the same."""
    share, added = (np.array(part, dtype=np.float32) for part in LIGHTS[light])
    return canvas * share + added


def soft(canvas: Canvas) -> Canvas:
    """Blur each pixel with its neighbours, weights 1 2 1 in both directions: a VAE reproduces fine edges worst."""
    for axis in (0, 1):
        wide = np.pad(canvas, [(1, 1) if index == axis else (0, 0) for index in range(3)], mode="edge")
        before, middle, after = (np.take(wide, range(start, start + SIZE), axis) for start in range(3))
        canvas = np.asarray((before + 2 * middle + after) / 4, dtype=np.float32)
    return canvas


class World:
    """State of one run: the hero's place and direction, and the time; actions advance it."""

    def __init__(self, seed: int, scene: Scene) -> None:
        self.seed, self.scene, self.biome = seed, scene, BIOMES[scene.biome]
        self.x = self.y = self.time = 0
        self.facing = "down"
        self._map: tuple[int, int, Canvas] | None = None

    def first(self) -> Frames:
        """Draw the picture before any action, uint8 [1, SIZE, SIZE, 3]."""
        return self._picture(self.x, self.y, 0.0)[None]

    def step(self, action: str) -> Frames:
        """Do one action and draw its pictures, uint8 [FRAMES, SIZE, SIZE, 3]; a blocked hero walks on the spot."""
        dx, dy, free = self._turn(action)
        pictures = []
        for index in range(1, FRAMES + 1):
            self.time += 1
            done = STEP * index // FRAMES if free else 0
            pictures.append(self._picture(self.x + dx * done, self.y + dy * done, stride_at(action, index)))
        if free:
            self.x, self.y = self.x + dx * STEP, self.y + dy * STEP
        return np.stack(pictures)

    def become(self, scene: Scene) -> None:
        """Change the scene: the land keeps its shape, and everything in it changes its look."""
        self.scene, self.biome, self._map = scene, BIOMES[scene.biome], None

    def walk(self, actions: Sequence[str]) -> None:
        """Do actions as `step` does, without drawing pictures."""
        for action in actions:
            dx, dy, free = self._turn(action)
            self.time += FRAMES
            if free:
                self.x, self.y = self.x + dx * STEP, self.y + dy * STEP

    def _turn(self, action: str) -> tuple[int, int, bool]:
        """Turn the hero for an action; returns the direction (dx, dy) and True if the way is free."""
        dx, dy = MOVES[action]
        self.facing = self.facing if action == "stay" else action
        return dx, dy, self.free(self.x + dx * STEP, self.y + dy * STEP)

    def free(self, x: int, y: int) -> bool:
        """Return True if the hero may stand at a place."""
        near = landmarks_near(self.seed, x, y, CELL)
        return all(math.hypot(mark.x - x, (mark.y - y) * 1.2) >= mark.reach + 1 for mark in near if mark.reach)

    def rollout(self, actions: Sequence[str]) -> Frames:
        """Draw the first picture and those of all actions, uint8 [1 + FRAMES * len(actions), SIZE, SIZE, 3]."""
        return np.concatenate([self.first(), *(self.step(action) for action in actions)])

    def picture_without(self, mark: Landmark) -> Frames:
        """Draw the current picture without one landmark, uint8 [SIZE, SIZE, 3]."""
        left, top = self.x - SIZE // 2, self.y - SIZE // 2
        return self._finished(draw_land(self.seed, self.biome, left, top, SIZE, SIZE, without=mark), left, top, 0.0)

    def _picture(self, x: int, y: int, stride: float) -> Frames:
        left, top = x - SIZE // 2, y - SIZE // 2
        return self._finished(self._land(left, top).copy(), left, top, stride)

    def _finished(self, canvas: Canvas, left: int, top: int, stride: float) -> Frames:
        draw_hero(canvas, self.scene, self.facing, stride)
        draw_creature(canvas, self.seed, self.biome, left, top, self.time)
        return (np.clip(lit(soft(canvas), self.scene.light), 0, 1) * 255 + 0.5).astype(np.uint8)

    def _land(self, left: int, top: int) -> Canvas:
        """Return the land of a picture; from the second picture on, cut from a larger piece that is drawn once."""
        if self._map is not None:
            x, y, canvas = self._map
            if 0 <= left - x <= canvas.shape[1] - SIZE and 0 <= top - y <= canvas.shape[0] - SIZE:
                return canvas[top - y : top - y + SIZE, left - x : left - x + SIZE]
        margin = 0 if self._map is None else SIZE
        size = SIZE + 2 * margin
        canvas = draw_land(self.seed, self.biome, left - margin, top - margin, size, size)
        self._map = (left - margin, top - margin, canvas)
        return canvas[margin : margin + SIZE, margin : margin + SIZE]
