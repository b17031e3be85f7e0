"""Prompts of an exported word encoder: a table of rows by word, as the plan lists them. Needs numpy only."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, quoted

Array = NDArray[Any]


def known_words(prompt: str, words: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """The words of a prompt that the engine's table has; an unknown word is replaced by the nearest, if any is near."""
    found = []
    for word in re.findall(r"[a-z]+", prompt.lower()):
        if word in skipped:
            continue
        near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
        if near != [word]:
            warnings.warn(f"the engine does not know {word!r}; {f'taken for {near[0]!r}' if near else 'left out'}",
                          stacklevel=2)  # fmt: skip
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
