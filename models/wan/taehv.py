"""The tiny decoder TAEHV (MIT, madebyollin/taehv), frame by frame; each memory block also sees its last input frame.

It reads normalised latents and needs no statistics. Streams are exact: the state carries the last input frames, and no
frame is decoded twice. The first latent frame of a stream gives one picture, the last of its four.
Parameter names are the checkpoint's. Shapes inside: [1, C, H, W], one frame.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ..decoder import Decoder, StreamState
from .vae_spec import TinySpec


class MemoryBlock(nn.Module):
    """A residual block over a frame and the frame before it (zeros before the first)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class Grow(nn.Module):
    """Upsample time: one frame [1, C, H, W] to `factor` frames, taken in order from its channels."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).chunk(self.factor, dim=1)


class TinyDecoder(Decoder):
    """TAEHV's decoder from normalised latents to pixels, as a stream; it cannot encode."""

    spec: TinySpec
    name = "TinyDecoder"

    def __init__(self, spec: TinySpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = [nn.Identity(), nn.Conv2d(spec.z_dim, spec.widths[0], 3, padding=1), nn.ReLU()]
        for width, following, factor in zip(spec.widths, spec.widths[1:], spec.time, strict=False):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, factor)]
            layers += [nn.Conv2d(width, following, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(spec.widths[3], 3 * spec.patch**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def encode(self, pixels: Tensor, state: StreamState) -> NoReturn:
        raise UsageError(
            "the tiny decoder cannot encode, but this stream starts from a picture or its preset encodes one again; "
            "leave vae out to use the model's own VAE"
        )

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        """Normalised latents [F, z, h, w] to pixels [T, 3, s*h, s*w] in [-1, 1]; advances `state`."""
        pixels = []
        for frame in latents.to(next(self.parameters()).dtype).split(1):
            pictures = self._through(torch.tanh(frame / 3) * 3, 0, state)
            pixels += pictures[-1:] if state.frames == 0 else pictures
            state.frames += 1
        return torch.cat(pixels) * 2 - 1

    def _through(self, x: Tensor, first: int, state: StreamState) -> list[Tensor]:
        """Run one frame through the layers from `first` on; returns its pictures in [0, 1]."""
        for index in range(first, len(self.decoder)):
            layer = self.decoder[index]
            if isinstance(layer, MemoryBlock):
                before = state.history.get(index, torch.zeros_like(x))
                state.history[index] = x
                x = layer(x, before)
            elif isinstance(layer, Grow):
                return [picture for part in layer(x) for picture in self._through(part, index + 1, state)]
            else:
                x = layer(x)
        return [F.pixel_shuffle(x, self.spec.patch).clamp(0, 1)]


def tiny_spec_from_shapes(shapes: dict[str, tuple[int, ...]]) -> TinySpec:
    """Read the sizes of a TAEHV checkpoint's decoder. Raises KeyError if tensors that show them are missing."""
    first, last = shapes["decoder.1.weight"], shapes["decoder.22.weight"]
    growing = [(index, shapes[f"decoder.{index}.conv.weight"]) for index in (7, 13, 19)]
    widths = (first[0], *(shapes[f"decoder.{index + 1}.weight"][0] for index, _ in growing))
    times = tuple(shape[0] // shape[1] for _, shape in growing)
    assert len(widths) == 4 and len(times) == 3
    return TinySpec(z_dim=first[1], widths=widths, time=times, patch=round((last[0] / 3) ** 0.5))
