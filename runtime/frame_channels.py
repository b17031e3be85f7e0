"""Channels that frames are given beside their latents: a mask and an image as condition, then a camera's rays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.decoder import Decoder, StreamState
from ..models.rays import ray_channels
from ..models.spec import ModelSpec
from ..schemes.camera import CameraTrack
from .worker_client import Handle


class ImageCondition:
    """Condition of each frame of a stream that begins with an image.

    pixels: the image [1, 3, H, W] in [-1, 1]. Its channels are a mask, 1 in the first frame, then the latents of the
    image followed by grey pictures. They are encoded as far as they are read; once the encoder's state repeats itself,
    so do the latents, and nothing more is encoded. Forks share one object: it depends on the image alone.
    """

    def __init__(self, spec: ModelSpec, encoder: Decoder, pixels: Tensor) -> None:
        self.spec, self.encoder, self.pixels = spec, encoder, pixels
        self.latents: list[Tensor] = []  # [C, H, W] of each frame
        self.state: StreamState | None = encoder.new_state()  # None once it repeats itself

    def of(self, frame: int) -> Tensor:
        """Channels [condition_channels, H, W] of a frame."""
        while self.state is not None and len(self.latents) <= frame:
            self.encode_next(self.state)
        latents = self.latents[min(frame, len(self.latents) - 1)]
        mask = latents.new_full((self.spec.condition_channels - len(latents), *latents.shape[1:]), float(frame == 0))
        return torch.cat((mask, latents))

    def encode_next(self, state: StreamState) -> None:
        before, first = state.clone(), not self.latents
        grey = torch.zeros_like(self.pixels)
        pictures = self.spec.first_pictures if first else self.spec.vae_stride[0]
        pixels = self.pixels.repeat(pictures, 1, 1, 1) if first else grey.repeat(pictures, 1, 1, 1)
        self.latents.append(self.encoder.encode(pixels, state)[0])
        if len(self.latents) > 1 and same_history(before, state):
            self.state = None


def same_history(one: StreamState, other: StreamState) -> bool:
    """True if two states hold the same numbers: equal input then gives equal output."""
    if one.history.keys() != other.history.keys():
        return False
    pairs = ((one.history[slot], other.history[slot]) for slot in one.history)
    return all(first is second or torch.equal(first, second) for first, second in pairs)


@dataclass(frozen=True, eq=False)
class GivenFrames:
    """Handle of the embedded channels of some frames in a worker. key: of all that they are made from."""

    key: tuple[object, ...]
    handle: Handle


def camera_key(camera: CameraTrack | None, frames: Sequence[int]) -> bytes:
    """Equal for equal rays of frames of one picture size."""
    return b"" if camera is None else camera.motions(frames).tobytes() + repr(camera.intrinsics).encode()


def frame_channels(
    spec: ModelSpec, image: ImageCondition | None, camera: CameraTrack | None, frames: Sequence[int], like: Tensor
) -> Tensor:
    """Channels [F, frame_channels, H, W] of frames, in the dtype and size of `like` [F, C, H, W] and on its device.

    Rays are computed in float32, or in a wider dtype of `like`.
    """
    parts = [] if image is None else [torch.stack([image.of(frame) for frame in frames]).to(like)]
    if camera is not None:
        stride, wide = spec.vae_stride[1], torch.promote_types(like.dtype, torch.float32)
        size = like.shape[-2] * stride, like.shape[-1] * stride
        motions = torch.from_numpy(camera.motions(frames)).to(wide)
        parts.append(ray_channels(motions, camera.intrinsics, size, stride).to(like))
    return torch.cat(parts, dim=1)
