"""Train the small classifiers that judge the small world, on pictures of its simulator.

    python tools/train_tinyworld_classifiers.py --out evaluate/tinyworld_classifiers.safetensors

Takes a few minutes of one core. Some pictures have no hero, or one without its head, legs or outline, which the
classifier has to call none. Pictures are blurred and made noisy, since a model's pictures are softer than the
simulator's. The accuracy is measured on worlds that were not trained on, and stored in the file.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from inferix.errors import one_line_errors
from inferix.evaluate.tinyworld_classifiers import (
    CELLS,
    INNER,
    MIDDLE,
    NONE,
    SEEN,
    WORDS,
    Classifiers,
    Pictures,
    as_pixels,
)
from inferix.models.files import write_tensors
from inferix.models.tinyworld.data import HELD_OUT, along_things, random_walk
from inferix.models.tinyworld.world import (
    ACTIONS,
    BIOMES,
    FRAMES,
    MOVES,
    SIZE,
    Canvas,
    Scene,
    World,
    draw_creature,
    draw_hero,
    draw_land,
    landmarks_near,
    lit,
    scenes,
    soft,
)

BROKEN = ("gone", "headless", "legless", "smeared")
CELL = SIZE // CELLS


@dataclass(frozen=True)
class Recipe:
    """Sizes of the training."""

    pictures: int = 10000
    broken_share: float = 0.25
    walks: int = 250
    walk_length: int = 24
    batch: int = 64
    hero_steps: int = 2500
    land_steps: int = 2000
    action_steps: int = 1200
    rate: float = 2e-3
    held_out: int = 1000  # pictures, and actions


SHORT = Recipe(pictures=48, walks=2, walk_length=4, batch=8, hero_steps=3, land_steps=3, action_steps=3, held_out=32)


@dataclass(frozen=True)
class Bank:
    """Pictures with their words [n, kinds] and maps of landmarks [n, CELLS, CELLS]."""

    pictures: Pictures
    words: Tensor
    things: Tensor


def draw_bank(rng: random.Random, count: int, first_seed: int, broken_share: float) -> Bank:
    """Draw pictures of random places with heroes, `broken_share` of them without a whole one."""
    pictures, words, things = [], [], []
    for _ in range(count):
        scene, seed = rng.choice(scenes()), first_seed + rng.randrange(1 << 19)
        kind = rng.choice(BROKEN) if rng.random() < broken_share else None
        picture, x, y = draw_picture(rng, scene, seed, kind)
        pictures.append(picture)
        shown = (NONE, NONE) if kind else (scene.colour, scene.hero)
        named = (*shown, scene.biome, scene.light)
        words.append([WORDS[part].index(word) for part, word in zip(WORDS, named, strict=True)])
        things.append(thing_map(seed, x, y))
    return Bank(np.stack(pictures), torch.tensor(words), torch.from_numpy(np.stack(things)))


def draw_picture(rng: random.Random, scene: Scene, seed: int, broken: str | None) -> tuple[Pictures, int, int]:
    """Draw one picture at a place that a walk reaches, or at any place without a whole hero."""
    world = World(seed, scene)
    world.walk(random_walk(rng, rng.randint(0, 40)))
    facing, stride = world.facing, rng.choice((0.0, 0.7, -0.7))
    x, y = world.x, world.y
    if broken:
        x, y, facing = x + rng.randint(-24, 24), y + rng.randint(-24, 24), rng.choice(list(MOVES)[1:])
    left, top, biome = x - SIZE // 2, y - SIZE // 2, BIOMES[scene.biome]
    canvas = draw_land(seed, biome, left, top, SIZE, SIZE)
    if broken != "gone":
        whole = canvas.copy()
        draw_hero(whole, scene, facing, stride)
        canvas = whole if broken is None else broken_hero(canvas, whole, broken)
    draw_creature(canvas, seed, biome, left, top, rng.randrange(96))
    return (np.clip(lit(soft(canvas), scene.light), 0, 1) * 255 + 0.5).astype(np.uint8), x, y


def broken_hero(land: Canvas, whole: Canvas, kind: str) -> Canvas:
    """A hero without its upper or lower half, or whose outline has run."""
    canvas, middle = whole.copy(), SIZE // 2
    if kind == "headless":
        canvas[: middle - 1] = land[: middle - 1]
    elif kind == "legless":
        canvas[middle - 1 :] = land[middle - 1 :]
    else:
        for _ in range(10):
            canvas = soft(canvas)
        away = np.ones((SIZE, SIZE), dtype=bool)
        away[MIDDLE, MIDDLE] = False
        canvas[away] = whole[away]
    return canvas


def thing_map(seed: int, x: int, y: int) -> np.ndarray:
    """1 in each cell of the picture around a place that has the middle of a landmark."""
    cells = np.zeros((CELLS, CELLS), dtype=np.float32)
    for mark in landmarks_near(seed, x, y, SIZE / 2):
        column, row = int((mark.x - x + SIZE / 2) // CELL), int((mark.y - y + SIZE / 2) // CELL)
        if 0 <= column < CELLS and 0 <= row < CELLS:
            cells[row, column] = 1
    return cells


def draw_actions(rng: random.Random, walks: int, length: int, first_seed: int) -> tuple[Pictures, Tensor]:
    """Last pictures of the latent frames of walks [n, SEEN, SIZE, SIZE, 3], and their actions [n]."""
    runs, actions = [], []
    for _ in range(walks):
        world = World(first_seed + rng.randrange(1 << 19), rng.choice(scenes()))
        world.walk(random_walk(rng, rng.randint(0, 40)))
        walk = along_things(rng, length, world) if rng.random() < 0.5 else random_walk(rng, length)
        for action in walk:
            runs.append(world.step(action)[FRAMES - SEEN :])
            actions.append(ACTIONS.index(action))
    return np.stack(runs), torch.tensor(actions)


def disturbed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur each picture by some amount, change its gain a little, and add noise; pixels [n, c, h, w]."""
    amount = torch.rand(len(pixels), 1, 1, 1, generator=generator)
    gain = 1 + 0.08 * torch.randn(len(pixels), 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = 0.04 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    return (pixels + amount * (blurred - pixels)) * gain + noise * torch.randn(pixels.shape, generator=generator)


def train(
    name: str, network: nn.Module, loss: Callable[[Tensor, torch.Generator], Tensor], count: int, steps: int,
    recipe: Recipe,
) -> None:  # fmt: skip
    """Train one network. loss: of the examples with given numbers."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), recipe.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=steps, pct_start=0.1)
    began, smooth = time.monotonic(), 0.0
    for step in range(steps):
        total = loss(torch.randint(count, (recipe.batch,), generator=generator), generator)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        schedule.step()
        smooth = float(total.detach()) if not step else 0.98 * smooth + 0.02 * float(total.detach())
        if (step + 1) % 250 == 0:
            print(f"{name} {step + 1}/{steps}  loss {smooth:.4f}  {time.monotonic() - began:.0f} s", flush=True)


def train_all(recipe: Recipe) -> Classifiers:
    """Train the three networks on new pictures."""
    torch.manual_seed(0)
    networks = Classifiers()
    bank = draw_bank(random.Random(1), recipe.pictures, 0, recipe.broken_share)
    print(f"drew {len(bank.pictures)} pictures", flush=True)

    def hero_loss(chosen: Tensor, generator: torch.Generator) -> Tensor:
        dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
        middle = bank.pictures[chosen.numpy(), MIDDLE.start + dy : MIDDLE.stop + dy,
                               MIDDLE.start + dx : MIDDLE.stop + dx]  # fmt: skip
        colour, hero = networks.hero(disturbed(as_pixels(middle), generator))
        return F.cross_entropy(colour, bank.words[chosen, 0]) + F.cross_entropy(hero, bank.words[chosen, 1])

    def land_loss(chosen: Tensor, generator: torch.Generator) -> Tensor:
        biome, light, things = networks.land(disturbed(as_pixels(bank.pictures[chosen.numpy()]), generator))
        words = F.cross_entropy(biome, bank.words[chosen, 2]) + F.cross_entropy(light, bank.words[chosen, 3])
        return words + 4 * F.binary_cross_entropy_with_logits(things, bank.things[chosen])

    train("hero", networks.hero, hero_loss, len(bank.pictures), recipe.hero_steps, recipe)
    train("land", networks.land, land_loss, len(bank.pictures), recipe.land_steps, recipe)
    runs, actions = draw_actions(random.Random(1), recipe.walks, recipe.walk_length, 0)
    print(f"drew {len(runs)} actions", flush=True)

    def action_loss(chosen: Tensor, generator: torch.Generator) -> Tensor:
        pixels = as_pixels(runs[chosen.numpy()].reshape(-1, SIZE, SIZE, 3)).reshape(len(chosen), -1, SIZE, SIZE)
        return F.cross_entropy(networks.action(disturbed(pixels, generator)), actions[chosen])

    train("action", networks.action, action_loss, len(runs), recipe.action_steps, recipe)
    return networks.eval().requires_grad_(False)


def held_out_accuracy(networks: Classifiers, count: int, seed: int = 2) -> dict[str, float]:
    """Share of pictures of held-out worlds that each classifier names right.

    hero: shape and colour of whole heroes. broken: heroes that are not whole, which are called none. things: number of
    landmarks within 1. action: of held-out walks, half of them along obstacles.
    """
    rng = random.Random(seed)
    whole, broken = draw_bank(rng, count, HELD_OUT, 0.0), draw_bank(rng, count // 4, HELD_OUT, 1.0)
    chosen = {kind: values.argmax(-1) for kind, values in networks.words(whole.pictures).items()}
    right = {kind: chosen[kind] == whole.words[:, index].numpy() for index, kind in enumerate(WORDS)}
    runs, actions = draw_actions(rng, max(1, count // 24), 24, HELD_OUT)
    none = networks.words(broken.pictures)["hero"].argmax(-1) == WORDS["hero"].index(NONE)
    off = np.abs(networks.things(whole.pictures) - whole.things[:, INNER, INNER].sum((1, 2)).numpy())
    shown = networks.actions(runs).argmax(-1)
    return {
        "hero": float((right["hero"] & right["colour"]).mean()),
        "broken": float(none.mean()),
        "biome": float(right["biome"].mean()),
        "light": float(right["light"].mean()),
        "things": float((off <= 1).mean()),
        "action": float((shown == actions.numpy()).mean()),
    }


def main(
    out: Annotated[Path, typer.Option(help="File to write.")],
    short: Annotated[bool, typer.Option(help="A few steps of each network, to test all of it.")] = False,
) -> None:
    """Train the classifiers and write them in half precision, with their accuracy on held-out worlds."""
    recipe = SHORT if short else Recipe()
    networks = train_all(recipe).half().float()
    accuracy = held_out_accuracy(networks, recipe.held_out)
    state = {name: tensor.half().contiguous() for name, tensor in networks.state_dict().items()}
    write_tensors(state, out, {"accuracy": json.dumps(accuracy)})
    print(f"wrote {out}, {out.stat().st_size} bytes: {json.dumps(accuracy)}")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
