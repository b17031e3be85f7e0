"""Streams of the small world that its training continues with the model itself, beside the simulator's truth.

A stream begins with frames of the simulator and goes on with the model's own, made by the preset's sampler. While land
has not been out of view for longer than the window, the simulator determines it, so the model can learn to hold it and
to correct its own errors. Many streams rest, and some walk in a loop, since these are determined for ever.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inferix.kernels.attention import attention
from inferix.kernels.rope import rope_angles, rotate
from inferix.models.tinyworld.data import BACK, along_things, errands, random_walk, straight
from inferix.models.tinyworld.presets import PRESET
from inferix.models.tinyworld.spec import SPEC
from inferix.models.tinyworld.words import known_words, word_numbers
from inferix.models.tinyworld.world import ACTIONS, MOVES, STEP, World, scenes
from inferix.runtime.sampler import Sampler

if TYPE_CHECKING:
    from train_tinyworld import TinyWorld

Encode = Callable[[Tensor], Tensor]  # pictures, uint8 [T, H, W, 3], to normalised latents [F, C, h, w]

ROUND = 24  # latent frames of one round of the butterflies; the length of each loop divides it
LEAD = 4  # frames of a loop before it repeats exactly: the hero turns first, and the encoder has a short memory
GRID = SPEC.grid or (1, 1)
RINGS = ("right", "down", "left", "up"), ("right", "up", "left", "down")
LOOPS: tuple[tuple[str, ...], ...] = (
    *((*[action] * steps, *[BACK[action]] * steps) for action in ACTIONS[1:] for steps in (1, 2)),
    *((*ring[start:], *ring[:start]) for ring in RINGS for start in range(4)),
)


@dataclass(frozen=True)
class Truth:
    """An encoded walk: latents [F, C, h, w], actions [F], camera places in latent pixels [F, 2], words [text_len].

    repeats: the last `ROUND` frames repeat for ever.
    """

    latents: Tensor
    actions: Tensor
    places: Tensor
    words: Tensor
    repeats: bool

    def index(self, frames: Sequence[int]) -> list[int]:
        """Indices of the latents of frames, which may be beyond the last one of a walk that repeats."""
        count = len(self.actions)
        return [frame if frame < count else count - ROUND + (frame - count) % ROUND for frame in frames]


@dataclass
class Stream:
    """A stream after `made` frames; `first` of them are the simulator's. It restarts after `end` frames.

    past: its first frame and its last ones, [crop, C, h, w].
    """

    truth: Truth
    first: int
    made: int
    end: int
    past: Tensor

    def shown(self) -> list[int]:
        """Frame numbers of `past`."""
        return [0, *range(self.made - len(self.past) + 1, self.made)]


class Streams:
    """Streams that are continued in turn; `state` and `load_state` save and restore them.

    crop: frames of a stream in a batch. window: latent frames that a frame sees, as in `ClipAttention`. walk_share,
    loop_share: of the streams, that walk on and that walk in a loop; the others rest.
    """

    def __init__(
        self, encode: Encode, count: int, crop: int, window: int, walk_share: float, loop_share: float
    ) -> None:
        self.encode, self.crop, self.reach = encode, crop, window - 2
        self.walk_share, self.loop_share = walk_share, loop_share
        self.streams: list[Stream | None] = [None] * count
        self.turn = 0

    def advance(self, world: TinyWorld, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Continue the next `count` streams by all frames of a crop but its first.

        Returns the crops [count, crop, C, h, w], the simulator's truth, actions [count, crop, d], words and a mask
        [count, crop, h, w] of the places that the simulator determines.
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
        for stream, part in zip(rows, frames, strict=True):
            stream.past = torch.cat((stream.past[:1], part))
            stream.made += len(part)
        truth = [stream.truth.latents[stream.truth.index(stream.shown())] for stream in rows]
        known = [known_land(stream, self.reach)[stream.shown()] for stream in rows]
        past = torch.stack([stream.past for stream in rows])
        return past, torch.stack(truth), torch.cat((before[:, :1], actions), dim=1), words, torch.stack(known)

    def begin(self) -> Stream:
        """Begin a stream with a new walk."""
        rng = random.Random(random.getrandbits(64))
        world = World(rng.randrange(1 << 19), rng.choice(scenes()))
        world.walk(random_walk(rng, rng.randint(0, 40)))
        repeats = rng.random() >= self.walk_share
        before, made = rng.choice((0, rng.randint(1, 10))), self.crop
        if repeats:
            actions = loop_walk(rng, world, before, self.loop_share / (1 - self.walk_share))
            made += rng.randint(0, before)
            end = made + (self.crop - 1) * rng.choice((1, 3, 7, 15))
        else:
            length = 4 * self.crop
            walks = (
                lambda: random_walk(rng, length),
                lambda: errands(rng, length),
                lambda: along_things(rng, length, world),
                lambda: straight(rng, length, world),
            )
            actions = rng.choice(walks)()
            end = length + 1
        truth = encoded(self.encode, world, actions, repeats)
        stream = Stream(truth, made, made, end, truth.latents[:made][[0, *range(made - self.crop + 1, made)]])
        if not repeats:
            shares = known_land(stream, self.reach).float().mean((1, 2))
            stream.end = next((frame for frame, share in enumerate(shares.tolist()) if share < 0.3), end)
            stream.end = max(stream.end, made + self.crop - 1)
        return stream

    def state(self) -> dict[str, Any]:
        """Return what a run saves."""
        streams = [stream and vars(stream) | {"truth": vars(stream.truth)} for stream in self.streams]
        return {"turn": self.turn, "streams": streams}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.turn = saved["turn"]
        self.streams = [
            None if stream is None else Stream(**stream | {"truth": Truth(**stream["truth"])})
            for stream in saved["streams"]
        ]


def loop_walk(rng: random.Random, world: World, before: int, loop_share: float) -> list[str]:
    """Draw a walk from a world's place that ends in a rest, or in a loop which nothing blocks."""
    start = random_walk(rng, before)
    there = copy.copy(world)
    there.walk(start)
    loop = rng.choice(LOOPS) if rng.random() < loop_share else ("stay",)
    walked = copy.copy(there)
    for action in loop:
        x, y = walked.x, walked.y
        walked.walk([action])
        if (walked.x - x, walked.y - y) != tuple(STEP * part for part in MOVES[action]):
            loop = ("stay",)
            break
    return [*start, *[loop[index % len(loop)] for index in range(LEAD + ROUND)]]


@torch.no_grad()
def encoded(encode: Encode, world: World, actions: Sequence[str], repeats: bool) -> Truth:
    """Walk in the simulator and encode the pictures."""
    pictures, places = [torch.from_numpy(world.first())], [(world.x, world.y)]
    for action in actions:
        pictures.append(torch.from_numpy(world.step(action)))
        places.append((world.x, world.y))
    words = word_numbers(known_words(world.scene.prompt), SPEC.text_len)
    numbers = [ACTIONS.index(action) for action in ("stay", *actions)]
    latents = encode(torch.cat(pictures))
    return Truth(latents, torch.tensor(numbers), torch.tensor(places) // STEP, torch.tensor(words), repeats)


def hot_actions(stream: Stream, frames: Sequence[int]) -> Tensor:
    """One-hot actions [len(frames), d] that lead to frames of a stream."""
    return F.one_hot(stream.truth.actions[stream.truth.index(frames)], len(ACTIONS)).float()


def known_land(stream: Stream, reach: int) -> Tensor:
    """Mask [made or the walk's length, h, w] of land that the simulator determines.

    It was in view of the simulator's frames, and since then never out of view for `reach` frames or more. The hero in
    the middle is always determined.
    """
    count = stream.made if stream.truth.repeats else len(stream.truth.actions)
    places = stream.truth.places[stream.truth.index(range(count))]
    height, width = GRID
    columns, rows = (places - places.amin(0)).unbind(1)
    last = torch.full((int(rows.max()) + height, int(columns.max()) + width), -reach - 1)
    known = []
    for frame, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        view = last[row : row + height, column : column + width]
        seen = frame - view <= reach if frame >= stream.first else torch.ones(GRID, dtype=torch.bool)
        view[seen] = frame
        known.append(seen.clone())
        known[-1][height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] = True
    return torch.stack(known)


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
