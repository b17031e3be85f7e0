"""Actions of a world model: one per latent frame, from a script or set while the stream runs.

Host integers only. Only changes are stored, so an endless stream costs no memory while nothing changes.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

from ..errors import UsageError, quoted
from ..user_files import read_json

LONGEST_SCRIPT = 100_000  # actions, and so latent frames: some hours of video


class ActionTrack:
    """The action of each latent frame: the first of `names`, rest, until another is set.

    names: the model's actions. script: those of frames 1, 2, ...; rest follows it.
    """

    def __init__(self, names: Sequence[str], script: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.starts, self.indices = [0], [0]
        for frame, name in enumerate(script, start=1):
            self.set_from(frame, name)
        if script:
            self.set_from(len(script) + 1, self.names[0])

    def set_from(self, frame: int, name: str) -> None:
        """Set the action from `frame` on; actions set for later frames are dropped. UsageError for an unknown name."""
        index = self.names.index(check_action(name, self.names))
        keep = bisect_right(self.starts, frame - 1)
        del self.starts[keep:], self.indices[keep:]
        if not self.indices or self.indices[-1] != index:
            self.starts.append(frame)
            self.indices.append(index)

    def fork(self) -> ActionTrack:
        """Return an independent copy."""
        twin = ActionTrack(self.names)
        twin.starts, twin.indices = list(self.starts), list(self.indices)
        return twin

    def resting_since(self, frame: int) -> int | None:
        """The frame whose place `frame` still shows, as all after it are at rest; None if `frame` has another action.

        Also None for a frame below 0, before the stream, and for models without actions.
        """
        if frame < 0 or not self.rests(frame):
            return None
        return max(0, self.starts[bisect_right(self.starts, frame) - 1] - 1)

    def rests(self, frame: int) -> bool:
        """True if a frame has the first action; never for models without actions."""
        return bool(self.names) and self.of(frame) == 0

    def of(self, frame: int) -> int:
        """The number of a frame's action."""
        return self.indices[bisect_right(self.starts, frame) - 1]


def check_action(name: str, names: Sequence[str]) -> str:
    """`name`; UsageError unless it is one of the model's actions."""
    if not names:
        raise UsageError(f"action {quoted(name)}: this model follows no actions, only its prompt")
    if name not in names:
        raise UsageError(f"no action {quoted(name)}; there are {', '.join(names)}")
    return name


def read_actions(text: str, names: Sequence[str]) -> list[str]:
    """Actions from `8R 4U stay`, or from a JSON file that lists names; UsageError for anything else.

    At most 100,000. A number before a name repeats it; a name may be cut to its first letter, in either case.
    """
    if text.endswith(".json"):
        listed = read_json(text, "actions")
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            example = f'["{names[0] if names else ""}"]'
            raise UsageError(f"actions {quoted(text)} must hold a list of names, such as {example}")
        check_script_length(len(listed))
        return [check_action(name, names) for name in listed]
    actions: list[str] = []
    for match in re.finditer(r"\S+", text):  # a list of the words could be many times larger than the text
        word = match[0]
        parts = re.fullmatch(r"([0-9]*)([A-Za-z_]+)", word)
        if parts is None:
            raise UsageError(f"actions hold {quoted(word)}; expected words such as {shorthand(names)}")
        name = parts[2].lower()
        full = next((known for known in names if known[0] == name), name)
        if names and full not in names:
            raise UsageError(f"actions hold {quoted(word)}; expected words such as {shorthand(names)}")
        check_action(full, names)
        count = int(parts[1][:10] or 1)  # more digits are too many already
        check_script_length(len(actions) + count)
        actions += [full] * count
    if not actions:
        raise UsageError(f"actions are empty; expected words such as {shorthand(names)}")
    return actions


def check_script_length(count: int) -> None:
    if count > LONGEST_SCRIPT:
        raise UsageError(f"actions hold {count} actions; expected at most {LONGEST_SCRIPT}, one for each latent frame")


def shorthand(names: Sequence[str]) -> str:
    """Return the short form of actions: `8R (right), 8U (up)`."""
    return ", ".join(f"8{name[0].upper()} ({name})" for name in names) or "8R"
