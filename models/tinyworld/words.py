"""The text encoder of the small world: one trained row per known word; other words are replaced or skipped.

It has the interface of the UMT5 encoder: from a prompt to rows [text_len, d], zero after the prompt's words.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UsageError, quoted
from ..files import fill, read_tensors
from ..text.umt5 import clean_prompt
from .world import BIOMES, COLOURS, HEROES, LIGHTS

FILE = "words.safetensors"
SKIPPED = ("a", "an", "the", "in", "at", "by", "on", "of", "and", "with", "to", "is")
WORDS: tuple[str, ...] = tuple(
    word
    for phrase in (*COLOURS, *HEROES, *BIOMES, *LIGHTS)
    for word in phrase.split()
    if word not in SKIPPED
)  # fmt: skip
GRAMMAR = (
    f"a {{{'|'.join(COLOURS)}}} {{{'|'.join(HEROES)}}} in a {{{'|'.join(BIOMES)}}} {{{'|'.join(LIGHTS)}}}"
)


class WordEncoder(nn.Module):
    """An embedding table of words; `encode` returns the rows [text_len, dim] of a prompt.

    rows: the table [words, dim]; without one it is drawn.
    """

    def __init__(self, dim: int, text_len: int, rows: Tensor | None = None) -> None:
        super().__init__()
        self.text_len = text_len
        self.rows = nn.Embedding(len(WORDS), dim) if rows is None else nn.Embedding.from_pretrained(rows)

    @classmethod
    def from_file(cls, path: Path, text_len: int, dtype: torch.dtype, device: Any) -> WordEncoder:
        tensors = read_tensors(path)
        rows = tensors.get("rows.weight")
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            raise CheckpointError(f"{quoted(path)} is no word encoder: it has no rows.weight; reinstall inferix")
        # Drawing a table on the meta device would import torch's compiler, which takes a second.
        module = cls(rows.shape[1], text_len, torch.empty(len(WORDS), rows.shape[1], device="meta"))
        return fill(module, tensors, dtype, device, path)

    def forward(self, words: Tensor) -> Tensor:
        """Look up word numbers [..., text_len], -1 for no word; returns rows [..., text_len, dim]."""
        return self.rows(words.clamp(min=0)) * (words >= 0)[..., None]

    def table(self) -> tuple[tuple[str, ...], tuple[str, ...], Tensor]:
        """Return the words, the words that are skipped, and the row of each word [words, dim]."""
        return WORDS, SKIPPED, self.rows.weight

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Return the rows [text_len, dim] of a prompt. Warns of unknown words; raises UsageError if none is known."""
        numbers = word_numbers(known_words(prompt), self.text_len)
        return self(torch.tensor(numbers, device=self.rows.weight.device))


def find_words(places: Iterable[Path]) -> Path | None:
    """Find the file of a word encoder in the first of `places` that has one."""
    return next((place / FILE for place in places if (place / FILE).is_file()), None)


def word_numbers(words: list[str], text_len: int) -> list[int]:
    """Return the numbers of the first `text_len` words, padded with -1. Warns of words beyond."""
    if len(words) > text_len:
        warnings.warn(f"the prompt has {len(words)} known words; only the first {text_len} count", stacklevel=2)
    numbers = [WORDS.index(word) for word in words[:text_len]]
    return numbers + [-1] * (text_len - len(numbers))


def known_words(prompt: str) -> list[str]:
    """Return the known words of a prompt in order; an unknown word is replaced by the nearest one, if any is near."""
    words, unknown = [], []
    for word in re.findall(r"[a-z]+", clean_prompt(prompt, empty=True).lower()):
        if word in SKIPPED:
            continue
        near = difflib.get_close_matches(word, WORDS, n=1, cutoff=0.6)
        if not near:
            unknown.append(word)
            continue
        if near[0] != word:
            warnings.warn(f"the small world does not know {quoted(word)}; taken for {quoted(near[0])}", stacklevel=2)
        words.append(near[0])
    if not words and prompt.strip():
        raise UsageError(f"the small world knows no word of {quoted(prompt)}; say for example {GRAMMAR}")
    if unknown:
        listed = ", ".join(map(repr, unknown))
        warnings.warn(f"the small world does not know {listed}; left out. It knows: {GRAMMAR}", stacklevel=2)
    return words
