"""Small classifiers of the small world's pictures, trained on its simulator, and scorers by them.

`hero` reads the shape and colour of the hero, `land` the landscape, the light and the landmarks in view, `action` the
action that three pictures show. `tools/train_tinyworld_classifiers.py` trains them; the accuracy on held-out worlds is
in the metadata of their file, and in the model card.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..errors import UsageError, quoted
from ..models.files import fill, read_metadata, read_tensors
from ..models.tinyworld.world import ACTIONS, BIOMES, COLOURS, FRAMES, HEROES, LIGHTS, MOVES, SIZE, STEP, Scene
from .measures import Better
from .scorers import Kind, View
from .weight_files import WeightFile, checked_digest

FILE = Path(__file__).with_name("tinyworld_classifiers.safetensors")
NONE = "none"  # no hero, or one without its shape
WORDS: Mapping[str, tuple[str, ...]] = {
    "colour": (*COLOURS, NONE), "hero": (*HEROES, NONE), "biome": tuple(BIOMES), "light": tuple(LIGHTS),
}  # fmt: skip
MIDDLE = slice(SIZE // 2 - 13, SIZE // 2 + 11)  # rows and columns of the hero's classifier
CELLS = 8  # of the map of landmarks, across and down; at most one landmark has its middle in a cell
INNER = slice(1, CELLS - 1)  # rows and columns of the cells that are counted: at the edge landmarks are cut
LIKELY = -0.5  # logit of a landmark from which it counts, so that the mean count is right
SEEN = 3  # pictures that `action` sees, the last ones of a latent frame
MOVED = STEP * (SEEN - 1) // FRAMES  # pixels that the camera moves between the first and the last of them

Pictures = NDArray[np.uint8]


def convolution(channels: int, width: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU())


class HeroNetwork(nn.Module):
    """Logits of colours and of shapes from the middle of a picture [n, 3, 24, 24]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(3, 24, 1), convolution(24, 32), convolution(32, 48), nn.Flatten(), nn.Linear(48 * 36, 48),
            nn.ReLU(),
        )  # fmt: skip
        self.colour, self.hero = nn.Linear(48, len(WORDS["colour"])), nn.Linear(48, len(WORDS["hero"]))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(pictures)
        return self.colour(features), self.hero(features)


class LandNetwork(nn.Module):
    """Logits of landscapes and of lights, and of a landmark in each cell [n, CELLS, CELLS], from whole pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            convolution(3, 24), convolution(24, 32), convolution(32, 32, 1), convolution(32, 48), convolution(48, 48, 1)
        )
        self.biome, self.light = nn.Linear(48, len(WORDS["biome"])), nn.Linear(48, len(WORDS["light"]))
        self.things = nn.Conv2d(48, 1, 3, 1, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.layers(pictures)
        mean = features.mean((2, 3))
        return self.biome(mean), self.light(mean), self.things(features)[:, 0]


class ActionNetwork(nn.Module):
    """Logits of actions from the last `SEEN` pictures of a latent frame, [n, 3 * SEEN, SIZE, SIZE].

    It sees how well each move of the camera explains the last picture by the first, and how the hero turns and walks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Sequential(
            convolution(3 * SEEN, 24), convolution(24, 32), nn.Flatten(), nn.Linear(32 * 36, 32), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(32 + len(ACTIONS), 32), nn.ReLU(), nn.Linear(32, len(ACTIONS)))

    def forward(self, pictures: Tensor) -> Tensor:
        first, last = pictures[:, :3], pictures[:, -3:]
        inside = slice(MOVED, SIZE - MOVED)
        around = torch.ones(SIZE, SIZE, dtype=torch.bool)
        around[MIDDLE, MIDDLE] = False
        wrong = []
        for dx, dy in (MOVES[action] for action in ACTIONS):
            rows, columns = (slice(MOVED * (1 + d), SIZE - MOVED * (1 - d)) for d in (dy, dx))
            difference = (last[..., inside, inside] - first[..., rows, columns]).abs().mean(1)
            wrong.append(difference[:, around[inside, inside]].mean(1))
        moved = torch.log(torch.stack(wrong, 1) + 0.01)
        features = torch.cat((self.middle(pictures[..., MIDDLE, MIDDLE]), moved - moved.mean(1, keepdim=True)), 1)
        return torch.as_tensor(self.head(features))


class Classifiers(nn.Module):
    """The three networks."""

    def __init__(self) -> None:
        super().__init__()
        self.hero, self.land, self.action = HeroNetwork(), LandNetwork(), ActionNetwork()

    @torch.no_grad()
    def words(self, pictures: Pictures) -> dict[str, NDArray[np.float64]]:
        """Probabilities of the words of each kind of `WORDS`, [n, words]."""
        pixels = as_pixels(pictures)
        colour, hero = self.hero(pixels[..., MIDDLE, MIDDLE])
        biome, light, _ = self.land(pixels)
        logits = {"colour": colour, "hero": hero, "biome": biome, "light": light}
        return {kind: values.softmax(-1).double().numpy() for kind, values in logits.items()}

    def named(self, pictures: Pictures) -> list[Scene]:
        """The scene that each picture shows, word by word; a kind of hero may be `NONE`."""
        best = {kind: [WORDS[kind][index] for index in values.argmax(-1)] for kind, values in
                self.words(pictures).items()}  # fmt: skip
        return [Scene(*words) for words in zip(*(best[kind] for kind in WORDS), strict=True)]

    @torch.no_grad()
    def things(self, pictures: Pictures) -> NDArray[np.int64]:
        """Number of landmarks whose middle is in each picture, a cell or more from its edge, [n]."""
        return np.asarray((self.land(as_pixels(pictures))[2] > LIKELY)[:, INNER, INNER].sum((1, 2)).numpy())

    @torch.no_grad()
    def actions(self, pictures: Pictures) -> NDArray[np.float64]:
        """Probabilities of `ACTIONS` from runs of pictures [n, SEEN, SIZE, SIZE, 3]."""
        pixels = as_pixels(pictures.reshape(-1, *pictures.shape[2:]))
        logits = self.action(pixels.reshape(len(pictures), 3 * SEEN, SIZE, SIZE))
        return logits.softmax(-1).double().numpy()


def as_pixels(pictures: Pictures) -> Tensor:
    """Pictures [n, SIZE, SIZE, 3] as the networks take them, float32 [n, 3, SIZE, SIZE] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def classifiers() -> Classifiers:
    """The shipped classifiers. Raises CheckpointError if their file is damaged."""
    with torch.device("meta"):
        empty = Classifiers()
    return fill(empty, read_tensors(FILE), torch.float32, "cpu", FILE.name)


@cache
def accuracy() -> dict[str, float]:
    """Accuracy of each classifier on held-out worlds, as measured when they were trained."""
    measured: dict[str, float] = json.loads(read_metadata(FILE)["accuracy"])
    return measured


def action_response(frames: Pictures, actions: Sequence[str]) -> NDArray[np.bool_]:
    """True for each latent frame after the first that shows the given action, [len(actions)].

    frames: all pictures of a video, [1 + FRAMES * len(actions), SIZE, SIZE, 3]. A blocked hero turns and walks on the
    spot, which counts.
    """
    ends = FRAMES * np.arange(1, len(actions) + 1)
    runs = np.stack([frames[end - SEEN + 1 : end + 1] for end in ends])
    shown = classifiers().actions(runs).argmax(-1)
    return np.asarray(shown == [ACTIONS.index(action) for action in actions])


@dataclass(frozen=True)
class WorldScorer(ABC):
    """A scorer of pictures of the small world; larger pictures are reduced to its size."""

    name: str
    kind: Kind
    about: str
    better: Better = "neither"
    floor: float = 0.05
    version: str = "1"
    partial: bool = False
    smallest: int = SIZE

    @cached_property
    def weights(self) -> str:
        return checked_digest(FILE.parent, [WeightFile(FILE.name, "the package inferix-runtime")], self.name)

    def similarity(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """Mean over the kinds of words of the probability that both pictures share."""
        return np.asarray(np.minimum(one, other).sum(-1) / len(WORDS))

    @abstractmethod
    def score(self, views: Sequence[View]) -> NDArray[Any]:
        """Score the pictures of a video; see `Scorer`."""


class SceneWords(WorldScorer):
    """Probabilities of all words, the kinds one after the other: a feature that changes with what a picture shows."""

    def score(self, views: Sequence[View]) -> NDArray[Any]:
        return np.concatenate(list(classifiers().words(pictures_of(views)).values()), axis=1)


class Things(WorldScorer):
    """Number of landmarks in view."""

    def score(self, views: Sequence[View]) -> NDArray[Any]:
        return classifiers().things(pictures_of(views)).astype(np.float64)


@dataclass(frozen=True)
class ActionResponse(WorldScorer):
    """Probability of the action that was given, at the last picture of each latent frame; other pictures have none.

    actions: of the video, one for each latent frame after the first.
    """

    actions: Sequence[str] = ()

    def __post_init__(self) -> None:
        if unknown := [action for action in self.actions if action not in ACTIONS]:
            raise UsageError(f"actions has {quoted(unknown[0])}; expected names of {', '.join(ACTIONS)}")

    def score(self, views: Sequence[View]) -> NDArray[Any]:
        scores = np.full(len(views), np.nan)
        for index, view in enumerate(views):
            number, rest = divmod(view.index, FRAMES)
            if rest or not 1 <= number <= len(self.actions):
                continue
            assert view.previous is not None and view.previous.previous is not None
            run = pictures_of([view.previous.previous, view.previous, view])
            scores[index] = classifiers().actions(run[None])[0, ACTIONS.index(self.actions[number - 1])]
        return scores


def action_scorer(actions: Sequence[str]) -> ActionResponse:
    """The scorer `tinyworld_action` of a video whose actions are known."""
    about = "probability of the given action"
    return ActionResponse("tinyworld_action", "pair", about, "higher", partial=True, actions=actions)


def pictures_of(views: Sequence[View]) -> Pictures:
    """Frames at the world's size."""
    frames = [view.frame for view in views]
    if frames[0].shape[:2] != (SIZE, SIZE):
        frames = [np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX)) for frame in frames]
    return np.stack(frames)


WORLD_SCORERS: Mapping[str, WorldScorer] = {
    "tinyworld_words": SceneWords(
        "tinyworld_words", "feature", "words of the scene that the small world shows", "higher"
    ),
    "tinyworld_things": Things("tinyworld_things", "frame", "landmarks of the small world in view", floor=1.0),
}
