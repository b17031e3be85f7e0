"""Streams of the small world that its training continues with the network, as the runtime does, for its sheets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inferix.kernels.attention import attention
from inferix.kernels.rope import rope_angles, rotate
from inferix.models.tinyworld.presets import PRESET
from inferix.models.tinyworld.spec import SPEC
from inferix.runtime.sampler import Sampler

if TYPE_CHECKING:
    from train_tinyworld import TinyWorld

GRID = SPEC.grid or (1, 1)


class StreamAttention:
    """Self-attention of one frame at a time over a stream's first frame and its last ones, for a batch of streams.

    Keys are stored without rotation, since positions count from the first frame. keeps: the pass stores its own.
    """

    def __init__(self, past: int) -> None:
        self.past, self.keeps = past, False
        self.stored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(SPEC.num_layers)]
        self.angles = [rope_angles(range(count), *GRID, SPEC.head_dim) for count in range(1, past + 3)]
        self.own = [rope_angles([count], *GRID, SPEC.head_dim) for count in range(past + 2)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pairs = [*self.stored[layer], (k, v)]
        if self.keeps:
            self.stored[layer] = [*pairs[:1], *pairs[1:][-self.past :]]
        keys, values = (torch.cat(part, dim=1) for part in zip(*pairs, strict=True))
        last, wide = len(pairs) - 1, torch.promote_types(v.dtype, torch.float32)
        return attention(rotate(q, self.own[last], wide), rotate(keys, self.angles[last], wide), values)


@torch.no_grad()
def continued(world: TinyWorld, past: Tensor, before: Tensor, actions: Tensor, words: Tensor) -> Tensor:
    """Continue streams by the frames of `actions` [B, N, d] with the preset's sampler, as the runtime does.

    past [B, F, C, h, w] and before [B, F, d]: frames so far and the actions that led to them. Returns [B, N, C, h, w].
    """
    kv, context = StreamAttention(world.window - 2), world.transformer.embed_text(world.words(words))
    sampler = Sampler(PRESET.sampler)

    def run(x: Tensor, timestep: float, action: Tensor) -> Tensor:
        timesteps = x.new_full((len(x), 1), timestep)
        return world.transformer(x[:, None], timesteps, context, kv, action[:, None])[:, 0].to(x.dtype)

    def keep(x: Tensor, action: Tensor) -> None:
        kv.keeps = True
        run(x, 0.0, action)
        kv.keeps = False

    for frame in range(past.shape[1]):
        keep(past[:, frame], before[:, frame])
    made = []
    for frame in range(actions.shape[1]):
        scale = torch.where(actions[:, frame, 0] == 1, 1.0, sampler.spec.noise_scale)  # 1 for the action to stay
        x, solver = torch.randn_like(past[:, 0]) * scale[:, None, None, None], sampler.begin()
        for step, timestep in enumerate(sampler.schedule.timesteps):
            velocity = run(x, timestep, actions[:, frame])
            x = solver.advance(x, velocity, step, lambda: torch.empty(0))
        made.append(x)
        keep(x, actions[:, frame])
    return torch.stack(made, dim=1)
