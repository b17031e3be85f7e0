"""Which past frames a block sees, and at which rotary positions: integers only.

The window of `local_attn_size` frames counts the block itself; the first `sink_size` frames of the stream stay
visible when it rolls. Absolute positions are frame numbers; window-relative ones count the visible frames from
0, so that they never grow (the sink sits right before the window).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

POSITIONS = ("absolute", "window-relative")


@dataclass(frozen=True)
class ContextPolicy:
    """local_attn_size: frames, or -1 for all; sink_size: frames; positions: one of `POSITIONS`."""

    local_attn_size: int
    sink_size: int
    positions: str

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise UsageError(f"positions is {self.positions!r}; expected one of {', '.join(POSITIONS)}")
        if self.local_attn_size < 1 and self.local_attn_size != -1:
            raise UsageError(f"local_attn_size is {self.local_attn_size}; expected 1 or more, or -1 for all frames")
        if self.sink_size < 0:
            raise UsageError(f"sink_size is {self.sink_size}; expected 0 or more")

    def check_block(self, frames: int) -> None:
        """UsageError unless a block of `frames` fits beside the sink."""
        if self.local_attn_size != -1 and self.local_attn_size < frames + self.sink_size:
            raise UsageError(
                f"local_attn_size {self.local_attn_size} is smaller than a block of {frames} frames plus "
                f"sink_size {self.sink_size}; widen the window or shrink the sink"
            )

    def visible(self, end: int) -> tuple[int, ...]:
        """Frames that a block ending before frame `end` attends to, itself included, ascending."""
        if self.local_attn_size == -1 or end <= self.local_attn_size:
            return tuple(range(end))
        recent = self.local_attn_size - self.sink_size
        return (*range(self.sink_size), *range(end - recent, end))

    def positions_of(self, visible: tuple[int, ...]) -> tuple[int, ...]:
        """Temporal rotary position of each visible frame."""
        return visible if self.positions == "absolute" else tuple(range(len(visible)))
