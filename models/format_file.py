"""Tensor names of a checkpoint in a YAML file, for `names` of `load`.

    base: original                # the published format that the file is like; original, if left out
    containers: [student]         # keys of a training file that may have the weights, best first
    strip: [net., student.]       # prefixes of the file's names
    names:                        # our names to the file's; * is the layer
      blocks.*: layers.*                        # changes the beginning of all names under it
      blocks.*.self_attn.to_qkv: layers.*.attn.qkv   # query, key and value in one tensor
      head.linear: to_pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest, quoted
from ..user_yaml import read_yaml

KEYS = ("base", "containers", "strip", "names")


@dataclass(frozen=True)
class FormatFile:
    """The content of a file of names. base: name of a format. names: changes of its table, ours to the file's."""

    base: str
    containers: tuple[str, ...]
    strip: tuple[str, ...]
    names: dict[str, str]


def read_format_file(path: str | Path) -> FormatFile:
    """Read a file of names. UsageError for a file that cannot be read and for other keys or values than those above."""
    facts, where = read_yaml(path, "names"), f"names {quoted(str(path))}"
    if not isinstance(facts, dict) or not facts:
        raise UsageError(f"{where} is no mapping; expected some of {', '.join(KEYS)}")
    for key in facts:
        if key not in KEYS:
            raise UsageError(f"{where} has {quoted(key)}{nearest(str(key), KEYS)}; expected some of {', '.join(KEYS)}")
    names = facts.get("names", {})
    if not isinstance(names, dict) or not all(isinstance(text, str) for item in names.items() for text in item):
        raise UsageError(f"{where}: names is {quoted(names)}; expected a mapping of our names to the file's")
    base = facts.get("base", "original")
    if not isinstance(base, str):
        raise UsageError(f"{where}: base is {quoted(base)}; expected the name of a format")
    return FormatFile(base, text_list(facts, "containers", where), text_list(facts, "strip", where), names)


def text_list(facts: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = facts.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise UsageError(f"{where}: {key} is {quoted(values)}; expected a list of texts")
    return tuple(values)
