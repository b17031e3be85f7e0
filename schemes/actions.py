"""What the hero of a world model does: one action per latent frame, from a script or as it is told.

Host integers only. Only changes are kept, so an endless stream costs no memory while nothing changes.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError


class ActionTrack:
    """The action of each latent frame: the first known one, rest, until something else is told.

    names: the model's actions; script: those of frames 1, 2, ...; what holds after its end is rest again.
    """

    def __init__(self, names: Sequence[str], script: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.starts, self.held = [0], [0]
        for frame, name in enumerate(script, start=1):
            self.tell(frame, name)
        if script:
            self.tell(len(script) + 1, self.names[0])

    def tell(self, frame: int, name: str) -> None:
        """From `frame` on, which none before was told later than, do `name`; what was planned from there is dropped."""
        index = self.names.index(check_action(name, self.names))
        keep = bisect_right(self.starts, frame - 1)
        del self.starts[keep:], self.held[keep:]
        if not self.held or self.held[-1] != index:
            self.starts.append(frame)
            self.held.append(index)

    def fork(self) -> ActionTrack:
        """A copy that goes on by itself."""
        twin = ActionTrack(self.names)
        twin.starts, twin.held = list(self.starts), list(self.held)
        return twin

    def of(self, frame: int) -> int:
        """The number of a frame's action."""
        return self.held[bisect_right(self.starts, frame) - 1]


def check_action(name: str, names: Sequence[str]) -> str:
    """`name`; UsageError unless it is one of the model's actions."""
    if not names:
        raise UsageError(f"action {name!r}: this model follows no actions, only its prompt")
    if name not in names:
        raise UsageError(f"no action {name!r}; there are {', '.join(names)}")
    return name


def read_actions(text: str, names: Sequence[str]) -> list[str]:
    """Actions from `8R 4U stay`, or from a JSON file that lists names; UsageError for anything else.

    A number before a name repeats it; a name may be cut to its first letter, in either case.
    """
    if text.endswith(".json"):
        try:
            listed = json.loads(Path(text).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read actions {text!r}: {error}; expected a JSON list of names") from error
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise UsageError(f"actions {text!r} must hold a list of names, such as [\"{names[0] if names else ''}\"]")
        return [check_action(name, names) for name in listed]
    found = []
    for word in text.split():
        parts = re.fullmatch(r"(\d*)([A-Za-z_]+)", word)
        if parts is None:
            raise UsageError(f"actions hold {word!r}; expected words such as {shorthand(names)}")
        name = parts[2].lower()
        full = next((known for known in names if known[0] == name), name)
        if names and full not in names:
            raise UsageError(f"actions hold {word!r}; expected words such as {shorthand(names)}")
        found += [check_action(full, names)] * int(parts[1] or 1)
    if not found:
        raise UsageError(f"actions are empty; expected words such as {shorthand(names)}")
    return found


def shorthand(names: Sequence[str]) -> str:
    """How actions are told in short: `8R (right), 8U (up)`."""
    return ", ".join(f"8{name[0].upper()} ({name})" for name in names) or "8R"
