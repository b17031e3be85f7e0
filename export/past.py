"""The past of a stream of an exported engine: the slot, keys and values of each frame. Needs numpy only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..schemes.fixed_window import FixedWindow
from .backends import Values
from .numerics import Array, quantised, rotated
from .plan import Plan


class Past:
    """Keys and values of the frames in each slot. frames: how many slots there are."""

    def __init__(self, plan: Plan, frames: int) -> None:
        size, model, rope = plan["size"], plan["model"], plan["rope"]
        shape = (frames, size["tokens"], model["heads"], model["channels"])
        names = [f"{part}_{layer}" for layer in range(model["layers"]) for part in "kv"]
        self.slots, self.frequencies = FixedWindow(), rope["frequencies"]
        self.half = sum(rope["pairs"]) if rope.get("half_split") else None
        self.values = {name: np.zeros(shape, plan.kv_dtype) for name in names}
        if plan.kv_dtype == "int8":
            self.values |= {f"scale_{name}": np.zeros((shape[0], shape[2]), np.float32) for name in names}
        self.pending: tuple[int, ...] = ()  # frames whose keys and values are in `new` and not yet in slots
        self.new: Values = {}
        self.stored: dict[int, int] = {}  # position at which a frame's keys were rotated
        self.shift: dict[int, int] = {}  # how much further they are rotated in their slot; 0 but for a moving sink
        self.originals: dict[int, Values] = {}  # keys of frames that have been rotated further, before that

    def keep(self, frames: Sequence[int], positions: Sequence[int], new: Values) -> None:
        """Take the keys and values that a pass left for its frames, at these positions."""
        self.pending, self.new = tuple(frames), new
        self.stored |= dict(zip(frames, positions, strict=True))
        self.shift |= dict.fromkeys(frames, 0)
        self.originals = {frame: keys for frame, keys in self.originals.items() if frame not in frames}

    def roll(self, cached: Collection[int] | None) -> None:
        """Bring the slots up to date for a pass. cached: frames that have slots from now on; None for all there are."""
        cached = {*self.slots.frames, *self.pending} if cached is None else cached
        update = self.slots.update(cached, self.pending)
        for name, slots in self.values.items():
            for frame, slot in update.writes:
                slots[slot] = self.new[f"new_{name}"][self.pending.index(frame)]
            for source, slot in update.moves:
                slots[slot] = slots[source]
        self.pending, self.new = (), {}
        for known in (self.stored, self.shift, self.originals):
            for frame in known.keys() - set(cached):
                del known[frame]

    def bind(self, past: Mapping[int, int]) -> tuple[Values, list[int]]:
        """Inputs of a pass that sees `past`, frames with their positions as the pass counts them, and their order."""
        seen = {slot: frame for slot, frame in enumerate(self.slots.frames) if frame in past}
        for slot, frame in seen.items():
            if (shift := past[frame] - self.stored[frame]) != self.shift[frame]:
                keys = {name: slots for name, slots in self.values.items() if name.startswith("k")}
                original = self.originals.setdefault(frame, {name: self.keys_in(name, slot) for name in keys})
                for name, slots in keys.items():
                    turned = rotated(original[name], shift * np.array(self.frequencies), self.half)
                    if (scales := self.values.get(f"scale_{name}")) is None:
                        slots[slot] = turned
                    else:
                        slots[slot], scales[slot] = quantised(turned)
                self.shift[frame] = shift
        listed = slice(len(past)) if len(past) == len(self.slots.frames) else list(seen)
        return {f"past_{name}": slots[listed] for name, slots in self.values.items()}, list(seen.values())

    def keys_in(self, name: str, slot: int) -> Array:
        """Keys [tokens, heads, channels] of the frame in a slot, float32."""
        keys, scales = self.values[name][slot].astype(np.float32), self.values.get(f"scale_{name}")
        return keys if scales is None else keys * scales[slot][:, None]
