"""Cameras in files: JSON, or a folder of `poses.npy` and `intrinsics.npy` as LingBot-World's examples have them.

    {"poses": [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], ...],
     "intrinsics": [500, 500, 416, 240], "size": [832, 480], "rate": "picture", "scale": null}

Keys are those of `Camera`. `poses` are camera to world, one for each picture.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, quoted
from ..user_files import check_reachable, check_regular, read_json, unreadable
from .camera import Camera, CameraSpeeds, is_finite

KINDS: dict[str, tuple[type, str]] = {
    "rate": (str, "a text"), "normalize": (str, "a text"), "speeds": (dict, "an object"), "size": (list, "a list"),
}  # fmt: skip
LARGEST_ARRAY = 64 << 20  # bytes of a file of poses


def read_camera(path: str | Path) -> Camera:
    """Read a camera. UsageError that names the file for one that cannot be read, or whose values cannot be used."""
    where = f"camera {quoted(str(path))}"
    facts = read_folder(Path(path)) if check_reachable(path, "camera").is_dir() else read_json(path, "camera")
    known = [item.name for item in fields(Camera)]
    if not isinstance(facts, dict) or not set(facts) <= set(known):
        raise UsageError(f"{where} holds {quoted(facts)}; expected an object with some of {', '.join(known)}")
    if facts.get("poses") is None:
        raise UsageError(f"{where} has no poses; expected one for each picture, [T, 4, 4]")
    try:
        return camera_of(facts)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def camera_of(facts: dict[str, Any]) -> Camera:
    """A camera from plain values by name; UsageError for values that cannot be used."""
    values = {key: value for key, value in facts.items() if value is not None}
    for key, (kind, expected) in KINDS.items():
        if key in values and not isinstance(values[key], kind):
            raise UsageError(f"{key} is {quoted(values[key])}; expected {expected}")
    if "size" in values:
        values["size"] = tuple(values["size"])
    if "speeds" in values:
        values["speeds"] = speeds_of(values["speeds"])
    return Camera(**values)


def speeds_of(facts: dict[str, Any]) -> CameraSpeeds:
    """Speeds from plain values by name; UsageError for other names, and for values that are no numbers."""
    known = [item.name for item in fields(CameraSpeeds)]
    if not set(facts) <= set(known) or not all(map(is_finite, facts.values())):
        raise UsageError(f"speeds are {quoted(facts)}; expected numbers for some of {', '.join(known)}")
    return CameraSpeeds(**facts)


def read_folder(folder: Path) -> dict[str, Any]:
    """Read `poses.npy` and `intrinsics.npy` of a folder."""
    return {name: read_array(folder / f"{name}.npy") for name in ("poses", "intrinsics")}


def read_array(path: Path) -> Any:
    """Read a small array of numbers; UsageError for another file."""
    if check_regular(path, "camera").stat().st_size > LARGEST_ARRAY:
        raise UsageError(f"camera {quoted(str(path))} has more than {LARGEST_ARRAY} bytes; expected a smaller file")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, "camera", error) from error
