"""Loop over diffusers' Wan transformer with the engine's weights, without a cache: a baseline of the executors.

Each denoising step runs the whole window, the clean frames and the noisy block, through the network, as code on top of
diffusers does that has no causal model. Frames see later frames, so its outputs are another function of the weights.
They equal the engine's in the first block only, which is compared; after that only its time means something.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..graphs.passes import Pass
from ..models.registry import family_of
from ..models.spec import ModelSpec
from ..runtime.engine import Engine
from ..schemes.presets import Preset
from .baseline import PlainLoop, passes_until_full, run_layer
from .baseline import unsupported_reason as unsupported_by_plain_loop


def unsupported_reason(spec: ModelSpec, preset: Preset) -> str | None:
    """The reason why this loop cannot run a model under a preset; None if it can."""
    if find_spec("diffusers") is None:
        return "diffusers is not installed; pip install diffusers"
    if not family_of(spec).is_in_diffusers(spec):
        return "diffusers has no such model"
    if any(scheduled.kind not in ("denoise", "commit") for scheduled in passes_until_full(preset)):
        return "its context is computed again"
    return unsupported_by_plain_loop(preset)


class DiffusersLoop(PlainLoop):
    """Stream of one prompt; `step` computes its next block."""

    def __init__(self, engine: Engine, rows: Tensor, seed: int, size: tuple[int, int]) -> None:
        super().__init__(engine, rows, seed, size, run_layer)
        self.caches = []
        self.network = family_of(engine.spec).diffusers_network(engine.parts.transformer)

    def forward(self, run: Pass, latents: Tensor) -> Tensor:
        """Run the frames of a pass's context through the network; returns the velocity of its own frames."""
        (group,) = run.groups
        self.frames = group.context
        window = torch.cat([*self.past, latents])[-len(group.context) :]
        timestep = torch.tensor([run.timesteps[0]], device=latents.device)
        (velocity,) = self.network(
            window.transpose(0, 1)[None], timestep.to(latents.dtype), self.rows[None], return_dict=False
        )
        frames: Tensor = velocity[0].transpose(0, 1)[-len(latents) :]
        return frames

    def commit(self, run: Pass, latents: Tensor) -> None:
        """Do nothing: there is no cache."""
