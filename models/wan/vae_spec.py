"""Sizes of Wan's decoders: the VAEs of Wan 2.1 and 2.2, and the tiny decoder TAEHV; and their costs, convolution by
convolution.

Source: Wan 2.1 (arXiv 2503.20314) and the published configurations; TAEHV (MIT, madebyollin/taehv).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from ..decoder import DecoderSpec


@dataclass(frozen=True)
class VaeSpec(DecoderSpec):
    """Every size of a VAE; mean and std normalise its latents, one entry per channel.

    patch: pixels a side that become channels; shortcuts: levels have averaging and repeating shortcuts.
    """

    base_channels: int
    decoder_channels: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    temporal_down: tuple[bool, ...]
    patch: int
    shortcuts: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_down)

    @property
    def spatial_stride(self) -> int:
        return 2 ** len(self.temporal_down) * self.patch

    @property
    def picture_channels(self) -> int:
        return 3 * self.patch**2

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level of the encoder, from pixels to latents."""
        return tuple(self.base_channels * factor for factor in self.multipliers)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder, from latents to pixels."""
        return tuple(self.decoder_channels * factor for factor in reversed(self.multipliers))

    @property
    def encodes(self) -> bool:
        return True

    @property
    def parameters(self) -> int:
        return self.decoding_parameters + sum(conv.parameters for conv in encoder_convs(self))

    @property
    def decoding_parameters(self) -> int:
        return sum(conv.parameters for conv in decoder_convs(self))

    def state_entries(self, latent: tuple[int, int]) -> int:
        return math.prod(latent) * sum(conv.state_entries for conv in decoder_convs(self))

    def decode_flops(self, latent: tuple[int, int], first: bool = False) -> int:
        area = math.prod(latent)
        return area * conv_flops(decoder_convs(self), first) + 4 * area**2 * self.decoder_widths[0]

    def encode_flops(self, latent: tuple[int, int]) -> int:
        area = math.prod(latent)
        return area * conv_flops(encoder_convs(self), first=True) + 4 * area**2 * self.widths[-1]

    def edge_entries(self, first: bool = False) -> tuple[int, int]:
        # A causal convolution reads all frames under its kernel in one call.
        wide = [conv for conv in decoder_convs(self) if conv.kernel[2] > 1]
        frames = [conv.past + (conv.place.first if first else conv.place.frames) for conv in wide]
        return sum(conv.inputs * conv.place.scale * n for conv, n in zip(wide, frames, strict=True)), len(wide)

    @property
    def attended_entries(self) -> int:
        return 2 * self.decoder_widths[0]

    def scratch_bytes(self, latent: tuple[int, int], frames: int, item: int, on_gpu: bool = False) -> int:
        if on_gpu:
            live = max(group_bytes(conv, frames, item, self.shortcuts) for conv in decoder_convs(self))
        else:
            live = max(live_bytes(conv, item) for conv in decoder_convs(self))
        return scratch_bytes(self, latent, frames, item, live)


@dataclass(frozen=True)
class TinySpec(DecoderSpec):
    """Sizes of a TAEHV decoder.

    widths: channels of the three upsampling stages and of the last one. time: frames out per frame in, by stage.
    """

    widths: tuple[int, int, int, int]
    time: tuple[int, int, int]
    patch: int

    @property
    def temporal_stride(self) -> int:
        return self.time[0] * self.time[1] * self.time[2]

    @property
    def spatial_stride(self) -> int:
        return 8 * self.patch

    @property
    def encodes(self) -> bool:
        return False

    @property
    def parameters(self) -> int:
        return self.decoding_parameters

    @property
    def decoding_parameters(self) -> int:
        return sum(conv.parameters for conv in tiny_convs(self))

    def state_entries(self, latent: tuple[int, int]) -> int:
        # A memory block reads its input joined with its cache, so half its input channels are cached.
        return math.prod(latent) * sum(conv.state_entries // 2 for conv in tiny_convs(self))

    def decode_flops(self, latent: tuple[int, int], first: bool = False) -> int:
        return math.prod(latent) * conv_flops(tiny_convs(self), first)

    def encode_flops(self, latent: tuple[int, int]) -> int:
        return 0

    def edge_entries(self, first: bool = False) -> tuple[int, int]:
        # Each frame is a call; a memory block's first convolution reads its cached frame, too, as channels.
        wide = [conv for conv in tiny_convs(self) if conv.kernel[2] > 1]
        frames = [conv.place.first if first else conv.place.frames for conv in wide]
        return sum(conv.inputs * conv.place.scale * n for conv, n in zip(wide, frames, strict=True)), sum(frames)

    def scratch_bytes(self, latent: tuple[int, int], frames: int, item: int, on_gpu: bool = False) -> int:
        if on_gpu:
            convs = ((conv, conv.place.frames * conv.place.scale**2) for conv in tiny_convs(self))
            sizes = ((max(conv.inputs, conv.inputs // 4 + conv.outputs) + conv.outputs) * size for conv, size in convs)
            live = item * max(sizes)  # after upsampling: the small input, the result by phase, and its pixels
            return scratch_bytes(self, latent, frames, item, live)
        # The upsampled input and the output of each stage stay live until the stages after it are done.
        grown = (conv for conv in tiny_convs(self) if not conv.bias)
        live = item * sum((conv.inputs + conv.outputs) * conv.place.scale**2 for conv in grown)
        return scratch_bytes(self, latent, frames, item, live)


WAN21_VAE = VaeSpec(
    z_dim=16,
    base_channels=96,
    decoder_channels=96,
    multipliers=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_down=(False, True, True),
    patch=1,
    shortcuts=False,
    mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
          0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)  # fmt: skip
WAN22_VAE = VaeSpec(
    z_dim=48,
    base_channels=160,
    decoder_channels=256,
    multipliers=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_down=(False, True, True),
    patch=2,
    shortcuts=True,
    mean=(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
          -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
          -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
          -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
          -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
          0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    std=(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
         0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
         0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
         0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
         0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)  # fmt: skip
GROUP = 2  # latent frames that go through the layers of a GPU together; a third saves 2 % of the time and costs 0.9 GB
TINY_VAE = replace(WAN21_VAE, base_channels=16, decoder_channels=16, num_res_blocks=1)
TINY_VAE22 = replace(WAN22_VAE, base_channels=16, decoder_channels=16, num_res_blocks=1)
TAEW21 = TinySpec(z_dim=16, widths=(256, 128, 64, 64), time=(1, 2, 2), patch=1)
TAEW22 = TinySpec(z_dim=48, widths=(256, 128, 64, 64), time=(1, 2, 2), patch=2)


class Place(NamedTuple):
    """Resolution of a convolution: spatial scale relative to the latents, and output frames for each latent frame.

    first: output frames for the first latent frame of a stream.
    """

    scale: int
    frames: int
    first: int = 1


@dataclass(frozen=True)
class Conv:
    """Sizes of a convolution.

    norm: width of the norm before it. past: input frames that a stream caches. doubles: True if its input was upsampled
    by 2 just before. beside: entries per latent position of the residual branch that are live meanwhile.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int, int]
    place: Place
    past: int = 0
    norm: int = 0
    bias: bool = True
    doubles: bool = False
    beside: int = 0

    @property
    def parameters(self) -> int:
        return math.prod(self.kernel) * self.inputs * self.outputs + self.outputs * self.bias + self.norm

    @property
    def state_entries(self) -> int:
        """Entries that a stream caches for each latent position."""
        return self.past * self.inputs * self.place.scale**2

    def flops(self, frames: int) -> int:
        """FLOPs for each latent position and `frames` output frames."""
        return 2 * math.prod(self.kernel) * self.inputs * self.outputs * self.place.scale**2 * frames


CUBE, PLANE, LINE, POINT = (3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)


def residual_convs(inputs: int, outputs: int, place: Place) -> Iterator[Conv]:
    yield Conv(inputs, outputs, CUBE, place, past=2, norm=inputs)
    yield Conv(outputs, outputs, CUBE, place, past=2, norm=outputs)
    if inputs != outputs:
        yield Conv(inputs, outputs, POINT, place)


def middle_convs(width: int, place: Place) -> Iterator[Conv]:
    yield from residual_convs(width, width, place)
    yield Conv(width, 3 * width, POINT, place, norm=width)
    yield Conv(width, width, POINT, place)
    yield from residual_convs(width, width, place)


def decoder_convs(spec: VaeSpec) -> Iterator[Conv]:
    """Yield the convolutions of a VAE's decoder, in execution order."""
    place, width = Place(scale=1, frames=1), spec.decoder_widths[0]
    yield Conv(spec.z_dim, spec.z_dim, POINT, place)
    yield Conv(spec.z_dim, width, CUBE, place, past=2)
    yield from middle_convs(width, place)
    for out, temporal in zip(spec.decoder_widths, [*reversed(spec.temporal_down), None], strict=True):
        beside = width * place.frames * place.scale**2
        first, *rest = (residual_convs(inputs, out, place) for inputs in (width, *[out] * spec.num_res_blocks))
        yield next(first)
        yield from (replace(conv, beside=beside) for conv in chain(first, *rest))
        width = out if spec.shortcuts or temporal is None else out // 2
        if temporal:
            yield Conv(out, 2 * out, LINE, place._replace(first=0), past=2, beside=beside)
        if temporal is not None:
            place = Place(2 * place.scale, place.frames * (2 if temporal else 1))
            yield Conv(out, width, PLANE, place, doubles=True, beside=beside)
    yield Conv(width, spec.picture_channels, CUBE, place, past=2, norm=width)


def encoder_convs(spec: VaeSpec) -> Iterator[Conv]:
    """Yield the convolutions of a VAE's encoder, in execution order."""
    place, width = Place(2 ** len(spec.temporal_down), spec.temporal_stride), spec.base_channels
    yield Conv(spec.picture_channels, width, CUBE, place, past=2)
    for out, temporal in zip(spec.widths, [*spec.temporal_down, None], strict=True):
        for inputs in (width, *[out] * (spec.num_res_blocks - 1)):
            yield from residual_convs(inputs, out, place)
        width = out
        if temporal is not None:
            place = place._replace(scale=place.scale // 2)
            yield Conv(out, out, PLANE, place)
        if temporal:
            place = place._replace(frames=place.frames // 2)
            yield Conv(out, out, LINE, place._replace(first=0), past=1)
    yield from middle_convs(width, place)
    yield Conv(width, 2 * spec.z_dim, CUBE, place, past=2, norm=width)
    yield Conv(2 * spec.z_dim, 2 * spec.z_dim, POINT, place)


def tiny_convs(spec: TinySpec) -> Iterator[Conv]:
    """Yield the convolutions of the tiny decoder; the first latent frame of a stream costs as much as any other."""
    place = Place(scale=1, frames=1)
    yield Conv(spec.z_dim, spec.widths[0], PLANE, place)
    for width, following, factor in zip(spec.widths, spec.widths[1:], spec.time, strict=False):
        for _ in range(3):
            yield Conv(2 * width, width, PLANE, place, past=1)
            yield from (Conv(width, width, PLANE, place) for _ in range(2))
        place = Place(2 * place.scale, place.frames, place.first)
        yield Conv(width, width * factor, POINT, place, bias=False)
        place = Place(place.scale, place.frames * factor, place.first * factor)
        yield Conv(width, following, PLANE, place, bias=False)
    yield Conv(spec.widths[-1], 3 * spec.patch**2, PLANE, place)


def live_bytes(conv: Conv, item: int) -> int:
    """Peak live bytes for each latent position around one convolution.

    2 x input + input concatenated with its cached frames + new cache + output; after upsampling, the upsampled input
    and a copy of it in float32 or better.
    """
    frames, positions = conv.place.frames, conv.place.scale**2
    if conv.doubles:
        doubled = conv.inputs * frames * positions
        return item * (conv.beside + doubled // 4) + doubled * (max(item, 4) + item)
    joined = conv.inputs * (frames + 2 * conv.past) if conv.past else 0
    return item * (conv.beside + positions * (frames * (2 * conv.inputs + conv.outputs) + joined))


def group_bytes(conv: Conv, frames: int, item: int, shortcuts: bool) -> int:
    """Peak live bytes for each latent position around one convolution with the layers of a GPU.

    Of the frames of a group: input and output; of a convolution with a norm its cached frames and the residual, too.
    One latent frame more is live.
    """
    group, one, positions = min(frames, GROUP), conv.place.frames, conv.place.scale**2
    count = group * one
    entries = conv.inputs * count + conv.outputs * (count + one)
    if conv.doubles:
        entries = conv.inputs * (count + one) // 4 + conv.outputs * (count + one + shortcuts * (count + one))
    elif conv.norm:
        entries += conv.inputs * (count + 2 * conv.past)
    return item * (shortcuts * group * conv.beside + positions * entries)


def conv_flops(convs: Iterable[Conv], first: bool) -> int:
    """FLOPs for each latent position of one latent frame, the first of a stream or a later one."""
    return sum(conv.flops(conv.place.first if first else conv.place.frames) for conv in convs)


def scratch_bytes(spec: DecoderSpec, latent: tuple[int, int], frames: int, item: int, live: int) -> int:
    """Bytes of decoding `frames` latent frames. live: of the convolutions, for each latent position."""
    pictures = item * frames * spec.temporal_stride * 3 * spec.spatial_stride**2
    return math.prod(latent) * (max(live + pictures, 3 * pictures) + 2 * item * frames * spec.z_dim)
