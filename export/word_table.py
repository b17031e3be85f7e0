"""Prompts of an exported word encoder: a table of rows by word, as the plan lists them. Needs numpy only."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, quoted

Array = NDArray[Any]


class PromptTable:
    """Rows of prompts in an engine's folder: of its words, or of whole prompts. text: the plan's part on it."""

    def __init__(self, text: Mapping[str, Any], folder: Path) -> None:
        self.text, self.rows = text, np.load(folder / text["rows"])
        self.null: Array | None = np.load(folder / text["null"]) if "null" in text else None

    def encode(self, prompt: str) -> Array:
        """Rows [text_len, text_dim] of a prompt. UsageError for one that the engine does not have."""
        text = self.text
        if text["encoder"] == "words":
            return word_rows(known_words(prompt, text["words"], text["skipped"]), text, self.rows)
        if prompt not in text["prompts"]:
            listed = ", ".join(map(quoted, text["prompts"][:3]))
            raise UsageError(
                f"prompt {quoted(prompt)} is not in the engine, which was made for {len(text['prompts'])} prompts such "
                f"as {listed}; use one of them, or export with --prompt"
            )
        rows: Array = self.rows[text["prompts"].index(prompt)]
        return rows

    def inputs(self, rows: Array, dropped: bool) -> Array:
        """Rows of a text as the program `prompt` takes them, float32; rows of zeros are the null caption.

        dropped: the branch of guidance runs without the prompt.
        """
        if self.null is None:
            return np.asarray(rows, np.float32)
        null, length = self.null[int(dropped)], len(rows)
        return np.concatenate((rows if rows.any() else null[:length], null[length:]), dtype=np.float32)


def known_words(prompt: str, words: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """The words of a prompt that the engine's table has; an unknown word is replaced by the nearest, if any is near."""
    found = []
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in skipped:
            continue
        near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
        if near != [word]:
            instead = f"taken for {quoted(near[0])}" if near else "left out"
            warnings.warn(f"the engine does not know {quoted(word)}; {instead}", stacklevel=2)
        found += near
    if not found:
        raise UsageError(f"the engine knows no word of prompt {quoted(prompt)}; it knows {', '.join(words)}")
    return found


def word_rows(found: Sequence[str], text: Mapping[str, Any], table: Array) -> Array:
    """Rows [text_len, text_dim] of words, zero after the last."""
    rows = np.zeros((text["length"], text["dim"]), np.float32)
    numbers = [text["words"].index(word) for word in found[: text["length"]]]
    rows[: len(numbers)] = table[numbers]
    return rows
