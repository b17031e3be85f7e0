"""Contiguous KV cache: the plain reference of the paged cache, used by tests.

One tensor of keys and one of values per layer, rolled by copying. With absolute positions keys are stored rotated; with
positions that move along with the window, keys are stored unrotated and rotated at each read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graphs.passes import Group, Pass
from ...kernels.attention import attention
from ...kernels.rope import Angles, axis_frequencies, rotate, token_angles
from ...models.rope import Rope
from ...models.spec import ModelSpec


class ContiguousCache:
    """Keys and values [1, frames*P, k, c] of the cached frames, per layer.

    rope: the model's; None for three axes over the whole head. rope_dtype: in which it is computed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        grid: tuple[int, int],
        moving_positions: bool,
        rope_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        rope: Rope | None = None,
    ) -> None:
        self.grid, self.moving_positions, self.rope_dtype = grid, moving_positions, rope_dtype
        self.rope, self.device = rope or Rope(*axis_frequencies(spec.head_dim)), device
        self.tokens = grid[0] * grid[1]
        empty = torch.empty(1, 0, spec.kv_heads, spec.head_dim, dtype=dtype, device=device)
        self.frames: tuple[int, ...] = ()
        self.keys = [empty] * spec.num_layers
        self.values = [empty] * spec.num_layers

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def set_window(self, frames: tuple[int, ...]) -> None:
        """Make `frames`, ascending, the cached frames: drop all others and add zeros for new ones.

        ValueError unless `frames` are cached frames in order, then new ones.
        """
        staying = [slot for slot, frame in enumerate(self.frames) if frame in frames]
        if tuple(self.frames[slot] for slot in staying) != frames[: len(staying)]:
            raise ValueError(f"frames is {frames}; expected some of the cached {self.frames} in order, then new ones")
        for store in (self.keys, self.values):
            for layer, tensor in enumerate(store):
                old = tensor.unflatten(1, (len(self.frames), self.tokens))[:, staying].flatten(1, 2)
                room = tensor.new_zeros(1, (len(frames) - len(staying)) * self.tokens, *tensor.shape[2:])
                store[layer] = torch.cat((old, room), dim=1)
        self.frames = frames

    def clear(self) -> None:
        """Drop all frames."""
        self.set_window(())

    def bind(self, run: Pass) -> BoundCache:
        """Return the attention of one pass over the cache."""
        return BoundCache(self, run)

    def end_pass(self) -> None:
        """Do nothing: a pass stores no scratch frames here."""

    def release(self) -> None:
        self.clear()


class BoundCache:
    """Attention of one pass (`KeyValues`): rotates, stores groups with `write`, and attends group by group."""

    def __init__(self, cache: ContiguousCache, run: Pass) -> None:
        self.cache, self.run = cache, run
        # Frames of groups without `write` are seen by this pass only; their slots come after the cached ones.
        self.slots = {frame: slot for slot, frame in enumerate(cache.frames + run.scratch)}
        self.query = self._angles([group.position_of(frame) for group in run.groups for frame in group.frames])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        q = rotate(q, self.query, cache.rope_dtype, cache.rope.half_split)
        if not cache.moving_positions:
            k = rotate(k, self.query, cache.rope_dtype, cache.rope.half_split)
        keys = self._store(cache.keys[layer], k)
        values = self._store(cache.values[layer], v)
        out = []
        for group, rows in self._groups():
            lists = group.head_contexts or (group.context,)
            queries, k_parts, v_parts = (part.chunk(len(lists), dim=2) for part in (q[:, rows], keys, values))
            parts = zip(queries, k_parts, v_parts, lists, strict=True)
            heads = [self._attended(group, *part) for part in parts]
            out.append(torch.cat(heads, dim=2))
        return torch.cat(out, dim=1)

    def _attended(self, group: Group, q: Tensor, keys: Tensor, values: Tensor, frames: tuple[int, ...]) -> Tensor:
        """Attention of a group's queries to some frames of its context, with as many heads as q has."""
        keys, values = self._read(keys, frames), self._read(values, frames)
        if self.cache.moving_positions:
            angles = self._angles([group.position_of(frame) for frame in frames])
            keys = rotate(keys, angles, self.cache.rope_dtype, self.cache.rope.half_split)
        return attention(q, keys, values)

    def _store(self, cached: Tensor, new: Tensor) -> Tensor:
        """Store the groups with `write` in `cached`; returns it followed by the other groups' tokens."""
        scratch = []
        for group, rows in self._groups():
            if group.write:
                slots = [self.slots[frame] for frame in group.frames]
                cached.unflatten(1, (-1, self.cache.tokens))[:, slots] = self._frames(new[:, rows])
            else:
                scratch.append(new[:, rows])
        return torch.cat((cached, *scratch), dim=1) if scratch else cached

    def _read(self, tensor: Tensor, frames: tuple[int, ...]) -> Tensor:
        slots = [self.slots[frame] for frame in frames]
        if slots == list(range(tensor.shape[1] // self.cache.tokens)):
            return tensor
        return self._frames(tensor)[:, slots].flatten(1, 2)

    def _frames(self, tensor: Tensor) -> Tensor:
        """Reshape [1, F*P, n, c] to [1, F, P, n, c]."""
        return tensor.unflatten(1, (-1, self.cache.tokens))

    def _groups(self) -> list[tuple[Group, slice]]:
        """Pairs of a group and the slice of its tokens in the pass."""
        groups, start = [], 0
        for group in self.run.groups:
            stop = start + len(group.frames) * self.cache.tokens
            groups.append((group, slice(start, stop)))
            start = stop
        return groups

    def _angles(self, positions: list[int] | tuple[int, ...]) -> Angles:
        return token_angles(self.cache.rope.axis_angles(positions, *self.cache.grid), self.cache.device)
