"""What a cache is to the block loop, and its plain form: one tensor of keys and one of values per layer.

It is rolled by copying, and what paged and captured execution are held against. Keys are stored rotated where a frame
keeps its position for good; where positions change as the window moves, keys are stored as they come and
rotated whenever they are read.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...graphs.passes import Group, Pass
from ...kernels.attention import attention
from ...kernels.rope import Angles, rope_angles, rotate
from ...models.wan.spec import ModelSpec
from ...models.wan.transformer import KeyValues


class Cache(Protocol):
    """Keys and values of the past of one conditioning."""

    @property
    def frames(self) -> tuple[int, ...]:
        """Frames held, ascending."""

    @property
    def nbytes(self) -> int:
        """Bytes that the frames take."""

    def set_window(self, frames: tuple[int, ...]) -> None:
        """Hold just `frames`, ascending: keep those that are here, drop others, make room for new ones."""

    def clear(self) -> None:
        """Forget all frames."""

    def bind(self, run: Pass) -> KeyValues:
        """The cache as the attention of one pass."""

    def end_pass(self) -> None:
        """The pass is over; what it did not write is gone."""

    def release(self) -> None:
        """Give the memory back; a second call does nothing."""


class ContiguousCache:
    """Keys and values [1, frames*P, n, c] per layer of the frames held."""

    def __init__(
        self,
        spec: ModelSpec,
        grid: tuple[int, int],
        moving_positions: bool,
        rope: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.grid, self.moving_positions, self.rope = grid, moving_positions, rope
        self.head_dim, self.device = spec.head_dim, device
        self.tokens = grid[0] * grid[1]
        empty = torch.empty(1, 0, spec.num_heads, spec.head_dim, dtype=dtype, device=device)
        self.held: tuple[int, ...] = ()
        self.keys = [empty] * spec.num_layers
        self.values = [empty] * spec.num_layers

    @property
    def frames(self) -> tuple[int, ...]:
        return self.held

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def set_window(self, frames: tuple[int, ...]) -> None:
        """Hold just `frames`, ascending: keep those that are here, drop others, make room (zeros) for new ones."""
        kept = [slot for slot, frame in enumerate(self.frames) if frame in frames]
        if tuple(self.frames[slot] for slot in kept) != frames[: len(kept)]:
            raise ValueError(f"frames {frames} to hold must be some of {self.frames}, then new ones")
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                old = tensor.unflatten(1, (len(self.frames), self.tokens))[:, kept].flatten(1, 2)
                room = tensor.new_zeros(1, (len(frames) - len(kept)) * self.tokens, *tensor.shape[2:])
                store[layer] = torch.cat((old, room), dim=1)
        self.held = frames

    def clear(self) -> None:
        """Forget all frames."""
        self.set_window(())

    def bind(self, run: Pass) -> BoundCache:
        """The cache as the attention of one pass."""
        return BoundCache(self, run)

    def end_pass(self) -> None:
        """Nothing: what a pass does not write is kept nowhere."""

    def release(self) -> None:
        self.clear()


class BoundCache:
    """`KeyValues` of one pass: rotates, writes the groups that write, and attends group by group."""

    def __init__(self, cache: ContiguousCache, run: Pass) -> None:
        self.cache, self.run = cache, run
        scratch = tuple(frame for group in run.groups if not group.write for frame in group.frames)
        # What a group that does not write has made is seen by the pass, and stands after what is held.
        self.slots = {frame: slot for slot, frame in enumerate(cache.frames + scratch)}
        self.query = self._angles([group.position_of(frame) for group in run.groups for frame in group.frames])
        self.reads = [self._angles(group.positions) for group in run.groups] if cache.moving_positions else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        q = rotate(q, self.query, cache.rope)
        if not cache.moving_positions:
            k = rotate(k, self.query, cache.rope)
        keys = self._store(cache.keys[layer], k)
        values = self._store(cache.values[layer], v)
        out = []
        for index, (group, rows) in enumerate(self._groups()):
            seen_keys, seen_values = self._read(keys, group.context), self._read(values, group.context)
            if self.reads is not None:
                seen_keys = rotate(seen_keys, self.reads[index], cache.rope)
            out.append(attention(q[:, rows], seen_keys, seen_values))
        return torch.cat(out, dim=1)

    def _store(self, held: Tensor, new: Tensor) -> Tensor:
        """Write what the pass writes into `held`; returns it with the rest of the pass after it."""
        scratch = []
        for group, rows in self._groups():
            if group.write:
                slots = [self.slots[frame] for frame in group.frames]
                held.unflatten(1, (-1, self.cache.tokens))[:, slots] = self._frames(new[:, rows])
            else:
                scratch.append(new[:, rows])
        return torch.cat((held, *scratch), dim=1) if scratch else held

    def _read(self, tensor: Tensor, frames: tuple[int, ...]) -> Tensor:
        slots = [self.slots[frame] for frame in frames]
        if slots == list(range(tensor.shape[1] // self.cache.tokens)):
            return tensor
        return self._frames(tensor)[:, slots].flatten(1, 2)

    def _frames(self, tensor: Tensor) -> Tensor:
        """[1, F*P, n, c] to [1, F, P, n, c]."""
        return tensor.unflatten(1, (-1, self.cache.tokens))

    def _groups(self) -> list[tuple[Group, slice]]:
        """Each group with its token rows in the pass."""
        found, start = [], 0
        for group in self.run.groups:
            stop = start + len(group.frames) * self.cache.tokens
            found.append((group, slice(start, stop)))
            start = stop
        return found

    def _angles(self, positions: list[int] | tuple[int, ...]) -> Angles:
        return rope_angles(positions, *self.cache.grid, self.cache.head_dim, self.cache.device)
