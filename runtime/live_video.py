"""A video that arrives while blocks are made from it: the latents that wait, and the state of their encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.decoder import StreamState
from ..models.spec import ModelSpec
from ..schemes.presets import Preset


@dataclass(frozen=True)
class LiveVideo:
    """Latents [F, C, H, W] of frames from `first` on, and the encoder's state after them; never changed in place."""

    first: int
    latents: Tensor
    encoder: StreamState

    @property
    def end(self) -> int:
        """The first frame that has not arrived."""
        return self.first + len(self.latents)

    def of(self, frames: range) -> Tensor:
        """Latents of some frames, fewer where they have not arrived."""
        return self.latents[frames.start - self.first : frames.stop - self.first]

    def followed_by(self, latents: Tensor, encoder: StreamState, needed: int) -> LiveVideo:
        """This video with later frames, and without those before frame `needed`."""
        kept = self.latents[max(0, needed - self.first) :]
        return LiveVideo(max(self.first, needed), torch.cat((kept, latents)), encoder)


def pictures_of_block(preset: Preset, spec: ModelSpec, start: int) -> int:
    """Pictures of the block that starts at latent frame `start`."""
    frames = preset.block_size(start)
    return spec.pictures(frames) if start == 0 else frames * spec.vae_stride[0]
