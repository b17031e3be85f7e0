"""The contiguous KV cache: one tensor of keys and one of values per layer, rolled by copying.

It is the plain form that paged and captured execution are held against. Keys are stored rotated when positions
are absolute; window-relative positions change as the window rolls, so there keys are stored as they come and
rotated whenever they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graphs.passes import Group, Pass
from ..kernels.attention import attention
from ..kernels.rope import Angles, rope_angles, rotate
from ..models.wan.spec import ModelSpec
from .context import ContextPolicy


class ContiguousCache:
    """Keys and values [1, frames*P, n, c] per layer of the frames the policy still shows."""

    def __init__(
        self,
        spec: ModelSpec,
        policy: ContextPolicy,
        grid: tuple[int, int],
        rope: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.policy, self.grid, self.rope = policy, grid, rope
        self.head_dim, self.device = spec.head_dim, device
        self.tokens = grid[0] * grid[1]
        empty = torch.empty(1, 0, spec.num_heads, spec.head_dim, dtype=dtype, device=device)
        self.frames: tuple[int, ...] = ()
        self.keys = [empty] * spec.num_layers
        self.values = [empty] * spec.num_layers

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def begin_block(self, visible: tuple[int, ...]) -> None:
        """Keep the frames of `visible` that are held, and add room for those that are not: all after the kept."""
        kept = [slot for slot, frame in enumerate(self.frames) if frame in set(visible)]
        added = len(visible) - len(kept)
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                old = tensor.unflatten(1, (-1, self.tokens))[:, kept] if kept else tensor[:, :0]
                room = tensor.new_zeros(1, added * self.tokens, *tensor.shape[2:])
                store[layer] = torch.cat((old.flatten(1, 2) if kept else old, room), dim=1)
        assert tuple(self.frames[slot] for slot in kept) == visible[: len(kept)]
        self.frames = visible

    def bind(self, run: Pass) -> BoundCache:
        """The cache as the attention of one pass."""
        return BoundCache(self, run)

    def angles(self, frames: tuple[int, ...]) -> Angles:
        """Rotation of frames that are visible now."""
        where = dict(zip(self.frames, self.policy.positions_of(self.frames), strict=True))
        return rope_angles([where[frame] for frame in frames], *self.grid, self.head_dim, self.device)


class BoundCache:
    """`KeyValues` of one pass: rotates, writes the groups that write, and attends group by group."""

    def __init__(self, cache: ContiguousCache, run: Pass) -> None:
        self.cache, self.run = cache, run
        self.new = cache.angles(run.frames)
        self.rotated_when_stored = cache.policy.positions == "absolute"
        self.held = None if self.rotated_when_stored else cache.angles(cache.frames)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, tokens = self.cache, self.cache.tokens
        q = rotate(q, self.new, cache.rope)
        if self.rotated_when_stored:
            k = rotate(k, self.new, cache.rope)
        keys, values = cache.keys[layer], cache.values[layer]
        for group, rows in self._rows(write=True) + self._rows(write=False):
            if not group.write and keys is cache.keys[layer]:
                keys, values = keys.clone(), values.clone()  # the pass sees its own, the cache does not
            slots = self._slots(group.frames)
            keys.unflatten(1, (-1, tokens))[:, slots] = k[:, rows].unflatten(1, (-1, tokens))
            values.unflatten(1, (-1, tokens))[:, slots] = v[:, rows].unflatten(1, (-1, tokens))
        if self.held is not None:
            keys = rotate(keys, self.held, cache.rope)
        out = []
        for group, rows in self._rows():
            seen_keys, seen_values = keys, values
            if group.context != cache.frames:
                slots = self._slots(group.context)
                seen_keys, seen_values = (
                    tensor.unflatten(1, (-1, tokens))[:, slots].flatten(1, 2) for tensor in (keys, values)
                )
            out.append(attention(q[:, rows], seen_keys, seen_values))
        return torch.cat(out, dim=1)

    def _slots(self, frames: tuple[int, ...]) -> list[int]:
        return [self.cache.frames.index(frame) for frame in frames]

    def _rows(self, write: bool | None = None) -> list[tuple[Group, slice]]:
        """Each group, or each that writes or not, with its token rows in the pass."""
        found, start = [], 0
        for group in self.run.groups:
            stop = start + len(group.frames) * self.cache.tokens
            if write is None or group.write == write:
                found.append((group, slice(start, stop)))
            start = stop
        return found
