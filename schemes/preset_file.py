"""Presets in YAML files: another preset with some fields changed.

    base: self-forcing            # a preset by name, or another such file
    name: brook                   # the file's name, if left out
    about: {base: wan-1.3b, licence: Apache-2.0, weights: nobody/brook}
    num_frame_per_block: 2        # any field of the preset, its sampler and its context
    local_attn_size: 10
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest, quoted
from ..user_yaml import read_yaml
from .presets import About, Preset, with_settings

SUFFIXES = (".yaml", ".yml")
DEEPEST = 8  # files that each name the next one as base


def is_preset_file(name: str) -> bool:
    """Return True for the path of a YAML file, False for the name of a preset."""
    return name.lower().endswith(SUFFIXES)


def read_preset(path: str | Path, known: Mapping[str, Preset], depth: int = 0) -> Preset:
    """Read the preset of a YAML file.

    known: presets by name, for `base`. Raises UsageError for a file that cannot be read, and names the file and the
    nearest field for an unknown one.
    """
    path, where = Path(path), f"preset {quoted(str(path))}"
    facts = read_yaml(path, "preset")
    if not isinstance(facts, dict) or not isinstance(facts.get("base"), str):
        raise UsageError(f"{where} has no base; expected 'base: NAME' of a preset, and fields that differ from it")
    base = base_preset(facts.pop("base"), path, known, depth)
    name, about = facts.pop("name", path.stem), facts.pop("about", {})
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: name is {quoted(name)}; expected a text")
    for key in facts:
        if not isinstance(key, str):
            raise UsageError(f"{where} has the key {quoted(key)}; expected the name of a field")
    try:
        changed = with_settings(base, **facts)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return replace(changed, name=name, about=read_about(about, base.about, where, str(path)))


def base_preset(name: str, path: Path, known: Mapping[str, Preset], depth: int) -> Preset:
    """Find the preset that a file changes: by name, or by a path beside the file."""
    if name in known:
        return known[name]
    if not is_preset_file(name):
        raise UsageError(
            f"preset {quoted(str(path))}: no preset {quoted(name)}{nearest(name, known)}; base may be "
            f"{', '.join(known)}, or a .yaml file"
        )
    if depth >= DEEPEST:
        raise UsageError(f"preset {quoted(str(path))}: more than {DEEPEST} files are each the base of the one before")
    return read_preset(path.parent / name, known, depth + 1)


def read_about(facts: Any, base: About, where: str, weights: str) -> About:
    """Read the source of the weights; without one, they are nobody's published ones."""
    known = {field.name for field in fields(About)}
    if not isinstance(facts, dict) or not set(facts) <= known:
        raise UsageError(f"{where}: about is {quoted(facts)}; expected a mapping of {', '.join(sorted(known))}")
    files = facts.get("files", [])
    texts = [value for key, value in facts.items() if key != "files"]
    if not isinstance(files, list) or not all(isinstance(text, str) for text in (*texts, *files)):
        raise UsageError(f"{where}: about is {quoted(facts)}; expected texts, and a list of them for files")
    return replace(base, **{"weights": weights, "licence": "", **facts, "files": tuple(files)})
