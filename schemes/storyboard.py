"""Prompts over time: the block of a stream at which each prompt begins.

A storyboard is a list of (seconds, prompt), from the command's `--prompt-at` or a YAML file with entries
`- at: 2.5` / `prompt: ...`. Each takes effect at the first block that begins at its time or later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, quoted
from .presets import Preset


@dataclass(frozen=True)
class Cue:
    """A prompt and the time at which it begins, in seconds of the video."""

    at: float
    prompt: str


def read_storyboard(path: str | Path) -> list[Cue]:
    """Read the cues of a YAML file; UsageError if it cannot be read or an entry is not `at` and `prompt`."""
    from ..user_yaml import read_yaml

    entries, where = read_yaml(path, "storyboard"), f"storyboard {quoted(str(path))}"
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{where} is no list; expected entries of 'at: SECONDS' and 'prompt: TEXT'")
    return [read_cue(entry, f"{where}, entry {index + 1}") for index, entry in enumerate(entries)]


def read_cue(entry: Any, where: str) -> Cue:
    """Check one entry. where: file and number of the entry, for messages."""
    if not isinstance(entry, dict) or set(entry) != {"at", "prompt"}:
        raise UsageError(f"{where} is {quoted(entry)}; expected 'at: SECONDS' and 'prompt: TEXT'")
    at, prompt = entry["at"], entry["prompt"]
    if isinstance(at, bool) or not isinstance(at, int | float) or not isinstance(prompt, str):
        raise UsageError(f"{where} has at={quoted(at)}, prompt={quoted(prompt)}; expected a number and a text")
    return Cue(float(at), prompt)


def schedule(cues: list[Cue], preset: Preset, blocks: int, fps: int, stride: int, start: int = 0) -> dict[int, str]:
    """Return the new prompts by the number of the block that each precedes.

    stride: pixel frames per latent frame. start: latent frames of a prefix. Raises UsageError for cues out of order,
    at no time above 0, beyond the end, or two in one block.
    """
    changes: dict[int, str] = {}
    before, block, frame, begins = 0.0, 0, start, start_time(start, stride, fps)
    for cue in cues:
        if cue.at == before == 0.0:
            raise UsageError("a prompt at 0 s is the first one: give it as --prompt, and those after it here")
        if not cue.at > before:
            raise UsageError(f"the prompt at {cue.at:g} s comes after one at {before:g} s; put them in order, above 0")
        while begins < cue.at:
            frame += preset.block_size(frame)
            block += 1
            if block >= blocks:
                raise UsageError(
                    f"the prompt at {cue.at:g} s is beyond the last block, which begins at {begins:.2f} s of "
                    f"{((frame - 1) * stride + 1) / fps:.2f} s; make the video longer or the prompt earlier"
                )
            begins = start_time(frame, stride, fps)
        if block in changes:
            raise UsageError(f"two prompts fall on the block at {begins:.2f} s, which has one; move one of them")
        changes[block] = cue.prompt
        before = cue.at
    return changes


def start_time(frame: int, stride: int, fps: int) -> float:
    """Return the seconds of video before a latent frame."""
    return max(0, (frame - 1) * stride + 1 if frame else 0) / fps
