"""The past of a stream of an exported engine: the slot, keys and values of each frame. Needs numpy only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..schemes.fixed_window import FixedWindow
from ..schemes.page_needs import page_needs
from .backends import Values
from .numerics import rotated
from .plan import Plan


class Branch:
    """A past under one prompt: cross keys by input name, and keys and values of the frames in each slot."""

    def __init__(self, plan: Plan, text: Values) -> None:
        size, model = plan["size"], plan["model"]
        frames = page_needs(plan.preset).context
        assert frames is not None  # targets refuse a window without an end
        shape = (frames, size["tokens"], model["heads"], model["channels"])
        names = [f"{part}_{layer}" for layer in range(model["layers"]) for part in "kv"]
        self.text, self.slots, self.frequencies = text, FixedWindow(), plan["rope"]["frequencies"]
        self.past = {name: np.zeros(shape, np.float32) for name in names}
        self.pending: tuple[int, ...] = ()  # frames whose keys and values are in `new` and not yet in slots
        self.new: Values = {}
        self.stored: dict[int, int] = {}  # position at which a frame's keys were rotated
        self.shift: dict[int, int] = {}  # how much further they are rotated in their slot; 0 but for a moving sink
        self.originals: dict[int, Values] = {}  # keys as stored, of frames that have been rotated further

    def keep(self, frames: Sequence[int], positions: Sequence[int], new: Values) -> None:
        """Take the keys and values that a pass left for its frames, at these positions."""
        self.pending, self.new = tuple(frames), new
        self.stored |= dict(zip(frames, positions, strict=True))
        self.shift |= dict.fromkeys(frames, 0)
        self.originals = {frame: keys for frame, keys in self.originals.items() if frame not in frames}

    def bind(self, past: Mapping[int, int], cached: Collection[int] | None) -> Values:
        """Bring the slots up to date for a pass that sees `past`, frames with their positions as the pass counts them.

        cached: frames that have slots from now on, those of `past` among them; None for all that there are.
        Returns the inputs of the past and the prompt.
        """
        cached = {*self.slots.frames, *self.pending} if cached is None else cached
        update = self.slots.update(cached, self.pending)
        for name, slots in self.past.items():
            for frame, slot in update.writes:
                slots[slot] = self.new[f"new_{name}"][self.pending.index(frame)]
            for source, slot in update.moves:
                slots[slot] = slots[source]
        self.pending, self.new = (), {}
        seen = {slot: frame for slot, frame in enumerate(self.slots.frames) if frame in past}
        for slot, frame in seen.items():
            if (shift := past[frame] - self.stored[frame]) != self.shift[frame]:
                keys = {name: slots for name, slots in self.past.items() if name.startswith("k")}
                original = self.originals.setdefault(frame, {name: slots[slot].copy() for name, slots in keys.items()})
                for name, slots in keys.items():
                    slots[slot] = rotated(original[name], shift * np.array(self.frequencies))
                self.shift[frame] = shift
        for known in (self.stored, self.shift, self.originals):
            for frame in known.keys() - set(cached):
                del known[frame]
        listed = slice(len(past)) if len(past) == len(self.slots.frames) else list(seen)
        return self.text | {f"past_{name}": slots[listed] for name, slots in self.past.items()}
