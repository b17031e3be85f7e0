"""Videos of a model for a study of drift: every prompt with every seed, made one after the other and resumable.

A video has a record beside it, written after it, with the settings that made it and the frames of each block; its
scores are beside it too. A study that is started again makes and scores only what is missing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..errors import UsageError, quoted
from ..runtime.engine import Engine
from ..runtime.files import check_output, write_atomically
from ..runtime.media import VideoWriter
from ..schemes.storyboard import Cue, schedule
from ..user_files import read_json
from .prompt_lists import PromptEntry
from .results import Settings, Video, score_video

LONGEST_HOLD = 6  # latent frames for which a random walk keeps an action


@dataclass(frozen=True)
class Take:
    """A video of a study: its prompts, seed and file."""

    entry: PromptEntry
    seed: int
    path: Path

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def scores(self) -> Path:
        return self.path.with_suffix(".drift.json")


def takes_of(entries: Sequence[PromptEntry], seeds: Sequence[int], folder: Path) -> list[Take]:
    """Every prompt with every seed; files are named by prompt number and seed."""
    width = len(str(len(entries) - 1))
    return [
        Take(entry, seed, folder / f"prompt{index:0{width}}-seed{seed}.mp4")
        for index, entry in enumerate(entries)
        for seed in seeds
    ]


def settings_of(take: Take, described: dict[str, Any], seconds: float, size: tuple[int, int]) -> dict[str, Any]:
    """Everything that determines a video, as plain data."""
    cues = [[at, cue.prompt] for at, cue in zip([0.0, *take.entry.switches(seconds)], take.entry.cues, strict=True)]
    about = {"prompts": cues, "seed": take.seed, "seconds": seconds, "size": list(size), "engine": described}
    plain: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return plain


def make_video(
    take: Take, engine: Engine, described: dict[str, Any], seconds: float, size: tuple[int, int]
) -> bool:  # fmt: skip
    """Write a take's video and record unless they are there; returns True if they had to be made.

    described: `engine.describe()`, which hashes weights and so is called once. A model with actions walks: actions are
    drawn from the seed. Raises UsageError if the record is of other settings.
    """
    settings = settings_of(take, described, seconds, size)
    if take.record.exists() and take.path.exists():
        record = read_json(take.record, "record")
        if not isinstance(record, dict) or record.get("settings") != settings:
            raise UsageError(
                f"record {quoted(take.record)} is of another run's settings; choose another folder, or remove it"
            )
        return False
    check_output(take.path)
    blocks = engine.blocks_for(seconds)
    cues = [Cue(at, cue.prompt) for at, cue in zip(take.entry.switches(seconds), take.entry.cues[1:], strict=True)]
    changes = schedule(cues, engine.preset, blocks, engine.fps, engine.spec.vae_stride[0])
    opening: dict[str, Any] = {"prompt": take.entry.cues[0].prompt, "seed": take.seed, "size": size}
    if engine.spec.actions:
        opening["actions"] = walk(engine.spec.actions, latent_frames(engine, blocks) - 1, take.seed)
    frames = []
    with VideoWriter(take.path, engine.fps, size) as writer, closing(engine.open(**opening)) as session:
        for start, stop in pairwise([0, *sorted(changes), blocks]):
            if start in changes:
                session.prompt(changes[start])
            for block in session.stream(stop - start):
                assert block.frames is not None
                if refused := [ack.refused for ack in block.acks if ack.refused]:
                    raise UsageError(refused[0])
                writer.add(block.frames)
                frames.append(len(block.frames))
    text = json.dumps({"settings": settings, "block_frames": frames}, indent=2) + "\n"
    write_atomically(take.record, lambda part: part.write_text(text, "utf-8"))
    return True


def latent_frames(engine: Engine, blocks: int) -> int:
    """Latent frames of the first `blocks` blocks."""
    count = 0
    for _ in range(blocks):
        count += engine.preset.block_size(count)
    return count


def walk(actions: Sequence[str], length: int, seed: int) -> list[str]:
    """A random walk: each action is kept for up to six latent frames."""
    generator = random.Random(seed)
    steps: list[str] = []
    while len(steps) < length:
        steps += [generator.choice(list(actions))] * generator.randint(1, LONGEST_HOLD)
    return steps[:length]


def score_take(
    take: Take, settings: Settings, seconds: float, on_frame: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Score a take's video, or read its scores if they are there and of the same settings."""
    described = settings.describe()
    if take.scores.exists():
        stored = read_json(take.scores, "scores")
        if isinstance(stored, dict) and stored.get("settings") == described and isinstance(stored.get("entry"), dict):
            entry: dict[str, Any] = stored["entry"]
            return entry
    record = read_json(take.record, "record")
    borders = list(accumulate(record["block_frames"]))[:-1]
    if "motion" not in described["metrics"] or max(record["block_frames"]) < 2:
        borders = []
    video = Video(take.path, take.path.stem, take.entry.cues[0].prompt, take.entry.switches(seconds), borders)
    entry = score_video(video, settings, on_frame)
    text = json.dumps({"settings": described, "entry": entry}, allow_nan=False) + "\n"
    write_atomically(take.scores, lambda part: part.write_text(text, "utf-8"))
    return entry
