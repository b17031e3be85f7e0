"""Slots of a window of fixed size, for programs that read the past from tensors with one slot per latent frame.

Attention does not depend on the order of keys, so a frame stays in its slot until it is evicted, and its slot is used
again. The filled slots are always the first ones. Host integers only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SlotUpdate:
    """Copies that bring the slots up to date: `writes` (frame, slot) of new frames first, then `moves` (from, to)."""

    writes: tuple[tuple[int, int], ...]
    moves: tuple[tuple[int, int], ...]


@dataclass
class FixedWindow:
    """The frame in each filled slot."""

    frames: list[int] = field(default_factory=list)

    def update(self, past: Collection[int], new: Collection[int]) -> SlotUpdate:
        """Make `past` the frames of the slots: evict all others, and place those of `new` that are in `past`.

        A frame of `new` that has a slot already is evicted and placed again. Every frame of `past` is in a slot or new.
        """
        holes = [slot for slot, frame in enumerate(self.frames) if frame not in past or frame in new]
        writes, moves = [], []
        for frame in new:
            if frame not in past:
                continue
            if holes:
                slot = holes.pop(0)
                self.frames[slot] = frame
            else:
                slot = len(self.frames)
                self.frames.append(frame)
            writes.append((frame, slot))
        while holes:
            if holes[-1] == len(self.frames) - 1:
                holes.pop()
                self.frames.pop()
            else:
                moves.append((len(self.frames) - 1, holes[0]))
                self.frames[holes.pop(0)] = self.frames.pop()
        assert set(self.frames) == set(past), (self.frames, past)
        return SlotUpdate(tuple(writes), tuple(moves))
