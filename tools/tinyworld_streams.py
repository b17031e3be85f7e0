"""Streams of the small world that its training continues with the model itself, beside the simulator's truth.

A stream begins with frames of the simulator and goes on with the model's own, made by the preset's sampler. Each place
of its frames has a target. Land that the simulator has shown, and land that comes into view, are the simulator's. Land
that the model has drawn is as it was first drawn, until it has been out of view for longer than the window. So the
model can learn to hold land, and to correct its own errors. Some streams rest, the others walk between rests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix.kernels.attention import attention
from inferix.kernels.rope import rope_angles, rotate
from inferix.models.tinyworld.data import random_walk
from inferix.models.tinyworld.presets import PRESET
from inferix.models.tinyworld.spec import SPEC
from inferix.models.tinyworld.words import known_words, word_numbers
from inferix.models.tinyworld.world import ACTIONS, MOVES, STEP, World, scenes
from inferix.runtime.sampler import Sampler

if TYPE_CHECKING:
    from train_tinyworld import TinyWorld

Encode = Callable[[Tensor], Tensor]  # pictures, uint8 [T, H, W, 3], to normalised latents [F, C, h, w]

ROUND = 24  # latent frames of one round of the butterflies
LEAD = 4  # frames of a rest before it repeats exactly, since the encoder has a short memory
GRID = SPEC.grid or (1, 1)
HERO = slice(GRID[0] // 2 - 1, GRID[0] // 2 + 1)  # rows and columns of the hero
NEAR = slice(GRID[0] // 2 - 2, GRID[0] // 2 + 2)  # of the hero and what may block its way
APART = 64  # pixels between butterflies
CLEARLY = 0.5  # of the error of the other, below which a frame clearly shows one of two moves


@dataclass(frozen=True)
class Truth:
    """An encoded walk: latents [F, C, h, w], actions [F], camera places in latent pixels [F, 2], words [text_len].

    places: column and row. moving: where the simulator may show something that moves by itself [F, h, w]. repeats: the
    last `ROUND` frames repeat for ever.
    """

    latents: Tensor
    actions: Tensor
    places: Tensor
    moving: Tensor
    words: Tensor
    repeats: bool

    def index(self, frames: Sequence[int]) -> list[int]:
        """Indices of the latents of frames, which may be beyond the last one of a walk that repeats."""
        count = len(self.actions)
        return [frame if frame < count else count - ROUND + (frame - count) % ROUND for frame in frames]


@dataclass
class Land:
    """Map of the land that a stream has shown: latents as first drawn [C, H, W].

    own: the model drew it [H, W]. last: the latest frame that showed it [H, W], below -reach if none has. corner:
    column and row of the first place. reach: frames after which land that is out of view is forgotten.
    """

    latents: Tensor
    own: Tensor
    last: Tensor
    corner: Tensor
    reach: int

    @classmethod
    def around(cls, places: Tensor, channels: int, reach: int) -> Land:
        """Land that nobody has seen, as large as what cameras at these places [F, 2] show."""
        columns, rows = (places.amax(0) - places.amin(0)).tolist()
        size = rows + GRID[0], columns + GRID[1]
        return cls(
            torch.zeros(channels, *size), torch.zeros(size, dtype=torch.bool), torch.full(size, -reach - 1),
            places.amin(0), reach,
        )  # fmt: skip

    def show(self, frame: int, place: Tensor, drawn: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        """Add a frame that the camera at a place shows; `own` if the model drew it.

        Returns the land in view as it was first drawn, [C, h, w], and where the model had drawn it before, [h, w].
        """
        column, row = (place - self.corner).tolist()
        view = slice(row, row + GRID[0]), slice(column, column + GRID[1])
        seen = frame - self.last[view] <= self.reach
        before, was_own = self.latents[:, *view].clone(), self.own[view] & seen
        self.latents[:, *view] = torch.where(seen, before, drawn)
        self.own[view] = was_own | (~seen & own)
        self.last[view] = frame
        return before, was_own


@dataclass
class Stream:
    """A stream after `made` frames, of which it began with the simulator's. It restarts after `end` frames.

    past: its first frame and its last ones, [crop, C, h, w]. land: what it has shown.
    """

    truth: Truth
    made: int
    end: int
    past: Tensor
    land: Land

    def shown(self) -> list[int]:
        """Frame numbers of `past`."""
        return [0, *range(self.made - len(self.past) + 1, self.made)]


class Streams:
    """Streams that are continued in turn; `state` and `load_state` save and restore them.

    crop: frames of a stream in a batch. window: latent frames that a frame sees, as in `ClipAttention`. walk_share: of
    the streams, that walk between rests; the others rest.
    """

    def __init__(self, encode: Encode, count: int, crop: int, window: int, walk_share: float) -> None:
        self.encode, self.crop, self.reach, self.walk_share = encode, crop, window - 2, walk_share
        self.streams: list[Stream | None] = [None] * count
        self.turn = 0

    def advance(self, world: TinyWorld, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Continue the next `count` streams by all frames of a crop but its first.

        Returns the crops [count, crop, C, h, w], what they should show, actions [count, crop, d], words and a mask
        [count, crop, h, w] of the places that should show it.
        """
        chosen = [(self.turn + index) % len(self.streams) for index in range(count)]
        self.turn = (self.turn + count) % len(self.streams)
        rows = []
        for index in chosen:
            stream = self.streams[index]
            if stream is None or stream.made + self.crop - 1 > stream.end:
                stream = self.streams[index] = self.begin()
            rows.append(stream)
        words = torch.stack([stream.truth.words for stream in rows])
        past = torch.stack([stream.past for stream in rows])
        before = torch.stack([hot_actions(stream, stream.shown()) for stream in rows])
        new = [range(stream.made, stream.made + self.crop - 1) for stream in rows]
        actions = torch.stack([hot_actions(stream, frames) for stream, frames in zip(rows, new, strict=True)])
        frames = continued(world, past, before, actions, words)
        targets = [go_on(stream, part) for stream, part in zip(rows, frames, strict=True)]
        past, target, counts = (torch.stack(part) for part in zip(*targets, strict=True))
        return past, target, torch.cat((before[:, :1], actions), dim=1), words, counts

    def begin(self) -> Stream:
        """Begin a stream with a new walk."""
        rng = random.Random(random.getrandbits(64))
        world = World(rng.randrange(1 << 19), rng.choice(scenes()))
        world.walk(random_walk(rng, rng.randint(0, 40)))
        rests = rng.random() >= self.walk_share
        before, made = rng.choice((0, rng.randint(1, 10))), self.crop
        end = made + (self.crop - 1) * rng.choice((1, 3, 7, 15))
        if rests:
            actions = [*random_walk(rng, before), *["stay"] * (LEAD + ROUND)]
            later = rng.randint(0, before)
            made, end = made + later, end + later
        else:
            actions = with_rests(rng, end)
        truth = encoded(self.encode, world, actions, rests)
        land = Land.around(truth.places, truth.latents.shape[1], self.reach)
        for frame in range(made):
            land.show(frame, truth.places[frame], truth.latents[frame], own=False)
        return Stream(truth, made, end, truth.latents[:made][[0, *range(made - self.crop + 1, made)]], land)

    def state(self) -> dict[str, Any]:
        """Return what a run saves."""
        parts = lambda stream: {"truth": vars(stream.truth), "land": vars(stream.land)}  # noqa: E731
        streams = [stream and vars(stream) | parts(stream) for stream in self.streams]
        return {"turn": self.turn, "streams": streams}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.turn = saved["turn"]
        self.streams = [
            None
            if stream is None
            else Stream(**stream | {"truth": Truth(**stream["truth"]), "land": Land(**stream["land"])})
            for stream in saved["streams"]
        ]


def go_on(stream: Stream, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add frames that the model made [N, C, h, w] to a stream.

    Returns its past, what this should show [1 + N, C, h, w], and where [1 + N, h, w]; not after a frame that shows
    another move than the simulator, since from then on the stream is elsewhere. The stream ends there.
    """
    truth, targets, counts = stream.truth, [stream.past[0]], [torch.zeros(GRID, dtype=torch.bool)]
    before, astray = stream.past[-1], False
    for drawn in made:
        now, last = truth.index([stream.made, stream.made - 1])
        true, move = truth.latents[now], truth.places[now] - truth.places[last]
        land, own = stream.land.show(stream.made, truth.places[now], drawn, own=True)
        own[HERO, HERO] = False
        count = ~(own & truth.moving[now]) & (not astray)
        if not astray and shows_other_move(before, drawn, move, ACTIONS[truth.actions[now]]):
            count &= not own[NEAR, NEAR].any()  # what the model drew there may block or free the way
            astray, stream.end = True, 0
        targets.append(torch.where(own, land, true))
        counts.append(count)
        before, stream.made = drawn, stream.made + 1
    stream.past = torch.cat((stream.past[:1], made))
    return stream.past, torch.stack(targets), torch.stack(counts)


def shows_other_move(before: Tensor, drawn: Tensor, move: Tensor, action: str) -> bool:
    """True if a frame clearly shows that the action moved the camera where it did not, or the reverse. move: (x, y)."""
    ahead = MOVES[action]
    if ahead == (0, 0):
        return False
    moved = moved_error(before, drawn, ahead)
    stayed = moved_error(before, drawn, (0, 0))
    right, wrong = (moved, stayed) if bool(move.any()) else (stayed, moved)
    return wrong < CLEARLY * right


def moved_error(before: Tensor, drawn: Tensor, move: tuple[int, int]) -> float:
    """Mean squared difference of a frame to the one before, moved by (x, y), away from the hero and the edges."""
    dx, dy = move
    rows, columns = GRID
    there = before[:, 1 + dy : rows - 1 + dy, 1 + dx : columns - 1 + dx]
    error = (drawn[:, 1:-1, 1:-1] - there).square().mean(0)
    away = torch.ones(GRID, dtype=torch.bool)
    away[NEAR, NEAR] = False
    return float(error[away[1:-1, 1:-1]].mean())


def with_rests(rng: random.Random, length: int) -> list[str]:
    """Draw actions that lead a few steps on and then rest for a while, again and again."""
    walk: list[str] = []
    while len(walk) < length:
        walk += random_walk(rng, rng.randint(2, 12)) + ["stay"] * rng.randint(6, 40)
    return walk[:length]


@torch.no_grad()
def encoded(encode: Encode, world: World, actions: Sequence[str], repeats: bool) -> Truth:
    """Walk in the simulator and encode the pictures."""
    pictures, places, moving = [torch.from_numpy(world.first())], [(world.x, world.y)], [rounds(world.x, world.y)]
    for action in actions:
        pictures.append(torch.from_numpy(world.step(action)))
        places.append((world.x, world.y))
        moving.append(rounds(world.x, world.y))
    words = word_numbers(known_words(world.scene.prompt), SPEC.text_len)
    numbers = [ACTIONS.index(action) for action in ("stay", *actions)]
    latents = encode(torch.cat(pictures))
    at = torch.tensor(places) // STEP
    return Truth(latents, torch.tensor(numbers), at, torch.stack(moving), torch.tensor(words), repeats)


def rounds(x: int, y: int) -> Tensor:
    """Mask [h, w] of the places that butterflies cross on their rounds, for a camera at (x, y) in pixels."""
    near = []
    for at, size, reach in ((y, GRID[0], 18), (x, GRID[1], 20)):
        middles = at + STEP * torch.arange(size) - STEP * size // 2 + STEP // 2
        near.append((middles % APART - APART // 2).abs() <= reach)
    return near[0][:, None] & near[1]


def hot_actions(stream: Stream, frames: Sequence[int]) -> Tensor:
    """One-hot actions [len(frames), d] that lead to frames of a stream."""
    return F.one_hot(stream.truth.actions[stream.truth.index(frames)], len(ACTIONS)).float()


class StreamAttention:
    """Self-attention of one frame at a time over a stream's first frame and its last ones, for a batch of streams.

    Keys are stored without rotation, since positions count from the first frame. keeps: the pass stores its own.
    """

    def __init__(self, past: int) -> None:
        self.past, self.keeps = past, False
        self.stored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(SPEC.num_layers)]
        self.angles = [rope_angles(range(count), *GRID, SPEC.head_dim) for count in range(1, past + 3)]
        self.own = [rope_angles([count], *GRID, SPEC.head_dim) for count in range(past + 2)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = [*self.stored[layer], (k, v)]
        if self.keeps:
            self.stored[layer] = [*pairs[:1], *pairs[1:][-self.past :]]
        keys, values = (torch.cat(part, dim=1) for part in zip(*pairs, strict=True))
        last, wide = len(pairs) - 1, torch.promote_types(v.dtype, torch.float32)
        return attention(rotate(q, self.own[last], wide), rotate(keys, self.angles[last], wide), values)


@torch.no_grad()
def continued(world: TinyWorld, past: Tensor, before: Tensor, actions: Tensor, words: Tensor) -> Tensor:
    """Continue streams by the frames of `actions` [B, N, d] with the preset's sampler, as the runtime does.

    past [B, F, C, h, w] and before [B, F, d]: frames so far and the actions that led to them. Returns [B, N, C, h, w].
    """
    kv, context = StreamAttention(world.window - 2), world.transformer.embed_text(world.words(words))
    sampler = Sampler(PRESET.sampler)

    def run(x: Tensor, timestep: float, action: Tensor) -> Tensor:
        timesteps = x.new_full((len(x), 1), timestep)
        return world.transformer(x[:, None], timesteps, context, kv, action[:, None])[:, 0].to(x.dtype)

    def keep(x: Tensor, action: Tensor) -> None:
        kv.keeps = True
        run(x, 0.0, action)
        kv.keeps = False

    for frame in range(past.shape[1]):
        keep(past[:, frame], before[:, frame])
    made = []
    for frame in range(actions.shape[1]):
        x, solver = torch.randn_like(past[:, 0]), sampler.begin()
        for step, timestep in enumerate(sampler.schedule.timesteps):
            velocity = run(x, timestep, actions[:, frame])
            x = solver.advance(x, velocity, step, lambda: torch.empty(0))
        made.append(x)
        keep(x, actions[:, frame])
    return torch.stack(made, dim=1)
