"""Keys of a viewer: which action is in force while several are pressed."""

from __future__ import annotations


class HeldKeys:
    """Actions whose keys are down. rest: the action without a key, None for a model without actions."""

    def __init__(self, rest: str | None) -> None:
        self.rest = rest
        self.pressed: list[str] = []

    @property
    def action(self) -> str | None:
        """The action in force: that of the key pressed last."""
        return self.pressed[-1] if self.pressed else self.rest

    def press(self, action: str) -> None:
        self.release(action)
        if action != self.rest:
            self.pressed.append(action)
        else:
            self.pressed.clear()

    def release(self, action: str) -> None:
        if action in self.pressed:
            self.pressed.remove(action)
