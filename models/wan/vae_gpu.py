"""Faster layers for a VAE or tiny decoder on a GPU: channels last, and one pass over memory between two convolutions.

Frames lie as [T, H, W, C] here. A causal convolution reads a buffer of its past frames and those of a group of latent
frames behind them, into which `rms_silu` or `conv_epilogue` writes, with the bias of the convolution before and the
residual. So nothing is joined, padded or widened to float32, and torch's convolutions run without their bias, which is
a pass of its own on a GPU. A convolution of upsampled frames is one of the small frames, by phase. A convolution is
launched once for each latent frame, always of the same shape, so that a stream decoded in any split equals the whole
clip bit for bit.

`use_gpu_layers` replaces the class of a decoder; parameters, their names and the state of a stream do not change. The
result equals that of the plain layers to 1e-10 in float64 and to 1e-5 in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.conv_epilogue import SPEC as EPILOGUE
from ...kernels.conv_epilogue import conv_epilogue
from ...kernels.join_phases import join_phases
from ...kernels.rms_norm import rms_norm
from ...kernels.rms_silu import rms_silu
from ..decoder import StreamState
from .taehv import Grow, MemoryBlock, TinyDecoder
from .vae import (
    CausalConv3d,
    CausalVae,
    ChannelNorm,
    DownBlock,
    Downsample,
    Encoder,
    FrameAttention,
    MidBlock,
    ResidualBlock,
    ShortcutUpBlock,
    UpBlock,
    Upsample,
    from_patches,
    to_patches,
)
from .vae_spec import GROUP

NO_DIRECTION = 1e-24  # of the mean square of a pixel: a pixel that is all 0 stays 0

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Frames:
    """Frames [T, H, W, C] of a group, a tensor for each latent frame, and what is not added to them yet.

    bias: [C], of the convolution that made them. residual: as `parts`. relu: a ReLU follows the sum.
    """

    parts: list[Tensor]
    bias: Tensor | None = None
    residual: list[Tensor] | None = None
    relu: bool = False

    @property
    def is_sum(self) -> bool:
        """True once nothing is left to do."""
        return self.bias is None and self.residual is None and not self.relu

    def drained(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each part with its residual, in order; neither is kept here any longer."""
        while self.parts:
            yield self.parts.pop(0), self.residual.pop(0) if self.residual else None

    def summed(self) -> list[Tensor]:
        """The parts, once everything is added."""
        if self.is_sum:
            return self.parts
        return [conv_epilogue(part, bias=self.bias, residual=more, relu=self.relu) for part, more in self.drained()]

    def written(self, places: Iterable[Tensor]) -> None:
        """Write the parts into their places."""
        for place, (part, residual) in zip(places, self.drained(), strict=True):
            if self.is_sum:
                place.copy_(part)
            else:
                conv_epilogue(part, bias=self.bias, residual=residual, relu=self.relu, out=place)


class InputBuffer:
    """Input of a causal convolution: its past frames, zeros at first, and room for those of a group behind them."""

    last: Tensor | None

    def __init__(self, frames: Tensor, past: int, counts: Sequence[int], history: Tensor | None) -> None:
        """frames: of the input's size. counts: frames of each latent frame. history: [1, C, past, H, W]."""
        self.past, self.counts, self.last = past, counts, None
        self.frames = frames.new_empty(past + sum(counts), *frames.shape[1:])
        if history is None:
            self.frames[:past].zero_()
        else:
            self.frames[:past].copy_(history[0].permute(1, 2, 3, 0))

    def places(self) -> Iterator[Tensor]:
        """The room of each latent frame."""
        first = self.past
        for count in self.counts:
            yield self.frames[first : first + count]
            first += count

    def windows(self) -> Iterator[Tensor]:
        """The frames that the convolution reads for each latent frame."""
        first = 0
        for count in self.counts:
            yield self.frames[first : first + self.past + count]
            first += count

    def room_for_last(self) -> Tensor | None:
        """Room for the last `past` frames once more, if they are of one latent frame; who writes that fills it."""
        if self.counts[-1] >= self.past:
            self.last = self.frames.new_empty(self.past, *self.frames.shape[1:])
        return self.last

    def history(self) -> Tensor:
        """The last frames [1, C, past, H, W], channels last in memory of their own."""
        return as_clip(self.frames[-self.past :].clone() if self.last is None else self.last)


class GpuCausalVae(CausalVae):
    """A VAE that decodes a group of latent frames layer by layer, and encodes one latent frame after the other."""

    name = CausalVae.name
    statistics: Tensor  # standard deviations and means of the latents, [2, 1, z, 1, 1]

    def encode(self, pixels: Tensor, state: StreamState) -> Tensor:
        deviation, mean = self.statistics
        latents, sizes = [], self.chunks(len(pixels), state)
        for chunk in to_patches(pixels, self.spec.patch).permute(0, 2, 3, 1).contiguous().split(sizes):
            x = pointwise(self.quant_conv, encoded(self.encoder, chunk, state))
            state.frames += 1
            latents.append(x[..., : self.spec.z_dim].permute(0, 3, 1, 2))
        return (torch.cat(latents) - mean) / deviation

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        deviation, mean = self.statistics
        z = latents.to(self.statistics.dtype) * deviation + mean
        begins, pixels = int(state.frames == 0), []
        for group in z.split([1] * begins + group_sizes(len(z) - begins)):
            frames = group.permute(0, 2, 3, 1).contiguous().split(1)
            for part in decoded(self, [pointwise(self.post_quant_conv, frame) for frame in frames], state):
                pixels.append(from_patches(part.permute(0, 3, 1, 2), self.spec.patch))
            state.frames += len(frames)
        return torch.cat(pixels).clamp(-1, 1)


def decoded(vae: CausalVae, parts: list[Tensor], state: StreamState) -> list[Tensor]:
    """Latents of a group [1, h, w, z] to frames [T, H, W, C] of each."""
    decoder = vae.decoder
    buffer = input_buffer(decoder.conv_in, parts, state)
    Frames(parts).written(buffer.places())
    x = convolved(decoder.conv_in, buffer, state)
    x = middle(decoder.mid_block, x, state)
    for block in decoder.up_blocks:
        if isinstance(block, ShortcutUpBlock):
            x = shortcut_level(block, x, state)
        else:
            x = level(cast(UpBlock, block), x, state)
    x, _ = norm_and_conv(decoder.norm_out, x, decoder.conv_out, state)
    assert x.bias is not None
    return [part + x.bias for part in x.parts]


def encoded(encoder: Encoder, chunk: Tensor, state: StreamState) -> Tensor:
    """Frames [T, H, W, C] of one latent frame to [1, h, w, 2z]."""
    buffer = input_buffer(encoder.conv_in, [chunk], state)
    Frames([chunk]).written(buffer.places())
    x = convolved(encoder.conv_in, buffer, state)
    for block in encoder.down_blocks:
        if isinstance(block, DownBlock):
            before = x.summed()
            x = residual_blocks(block.resnets, Frames(list(before)), state)
            x = x if block.downsampler is None else downsampled(block.downsampler, x, state)
            x = Frames(x.summed(), residual=[frames_of(block.averaged(as_clip(part))) for part in before])
        elif isinstance(block, Downsample):
            x = downsampled(block, x, state)
        else:
            x = residual_block(cast(ResidualBlock, block), x, state)
    x, _ = norm_and_conv(encoder.norm_out, middle(encoder.mid_block, x, state), encoder.conv_out, state)
    return x.summed()[0]


def downsampled(layer: Downsample, x: Frames, state: StreamState) -> Frames:
    conv, time = cast(nn.Conv2d, layer.resample[1]), layer.time_conv
    padded = [F.pad(part, (0, 0, 0, 1, 0, 1)) for part in x.summed()]
    x = Frames([convolve_frames(part, conv.weight, 0, stride=2) for part in padded], conv.bias)
    if time is None:
        return x
    history, counts = state.history.get(layer.slot), [len(part) for part in x.parts]
    buffer = InputBuffer(x.parts[0], 1, counts, history)
    x.written(buffer.places())
    state.history[layer.slot] = buffer.history()
    if history is None:  # the first frame stays one
        return Frames(list(buffer.places()))
    clips = [F.conv3d(as_clip(window), time.weight, stride=time.stride) for window in buffer.windows()]
    return Frames(list(map(frames_of, clips)), time.bias)


def middle(block: MidBlock, x: Frames, state: StreamState) -> Frames:
    before, after = cast(list[ResidualBlock], block.resnets)
    x = attended(cast(FrameAttention, block.attentions[0]), residual_block(before, x, state))
    return residual_block(after, x, state)


def level(block: UpBlock, x: Frames, state: StreamState) -> Frames:
    x = residual_blocks(block.resnets, x, state)
    for layer in cast(list[Upsample], block.upsamplers):
        x = upsampled(layer, x, state)
    return x


def shortcut_level(block: ShortcutUpBlock, x: Frames, state: StreamState) -> Frames:
    """A level of Wan 2.2's decoder."""
    before = x.summed()
    x = residual_blocks(block.resnets, Frames(list(before)), state)
    if block.upsampler is None:
        return x
    x = upsampled(block.upsampler, x, state)
    x.residual = [frames_of(block.repeated(as_clip(part), state)) for part in before]
    return x


def residual_blocks(blocks: nn.ModuleList, x: Frames, state: StreamState) -> Frames:
    for block in cast(list[ResidualBlock], blocks):
        x = residual_block(block, x, state)
    return x


def residual_block(block: ResidualBlock, x: Frames, state: StreamState) -> Frames:
    x, total = norm_and_conv(block.norm1, x, block.conv1, state, keep=True)
    x, _ = norm_and_conv(block.norm2, x, block.conv2, state)
    if isinstance(block.conv_shortcut, nn.Conv3d):
        total = [pointwise(block.conv_shortcut, part) for part in total]
    x.residual = total
    return x


def norm_and_conv(
    norm: ChannelNorm, x: Frames, conv: CausalConv3d, state: StreamState, keep: bool = False
) -> tuple[Frames, list[Tensor]]:
    """Norm, activation and convolution of frames, which are drained; and their sums if `keep`, else none."""
    buffer, total = normed(norm, x, conv, state, keep)
    return convolved(conv, buffer, state), total


def normed(
    norm: ChannelNorm, x: Frames, conv: CausalConv3d, state: StreamState, keep: bool
) -> tuple[InputBuffer, list[Tensor]]:
    """The input of a convolution after norm and activation, and the sums before them if `keep`."""
    buffer, gamma = input_buffer(conv, x.parts, state), norm.gamma.flatten()
    total, is_sum = list[Tensor](), x.is_sum
    for place, (part, residual) in zip(buffer.places(), x.drained(), strict=True):
        kept = (part if is_sum else torch.empty_like(part)) if keep else None
        last = None if x.parts else buffer.room_for_last()
        rms_silu(
            rows(part), gamma, bias=x.bias, residual=None if residual is None else rows(residual),
            total=None if kept is None or is_sum else rows(kept), out=rows(place),
            tail=None if last is None else rows(last),
        )  # fmt: skip
        total += [] if kept is None else [kept]
    return buffer, total


def attended(layer: FrameAttention, x: Frames) -> Frames:
    """Single-head attention among the pixels of each frame."""
    parts, results = x.summed(), []
    for part in parts:
        q, k, v = pointwise(layer.to_qkv, normal(layer.norm, part)).flatten(1, 2)[:, None].chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].unflatten(1, part.shape[1:3])
        results.append(pointwise(layer.proj, out))
    return Frames(results, residual=parts)


def normal(norm: ChannelNorm, part: Tensor) -> Tensor:
    return rms_norm(rows(part), norm.gamma.flatten(), eps=NO_DIRECTION).view(part.shape)


def upsampled(layer: Upsample, x: Frames, state: StreamState) -> Frames:
    parts, conv, results = 1, cast(nn.Conv2d, layer.resample[1]), []
    if layer.time_conv is not None and state.frames > 0:  # the first frame stays one, and enters no history
        buffer = input_buffer(layer.time_conv, x.parts, state)
        x.written(buffer.places())
        parts, x = 2, convolved(layer.time_conv, buffer, state)
    for part, residual in x.drained():
        small = part if x.is_sum else conv_epilogue(part, bias=x.bias, residual=residual, parts=parts)
        results.append(convolve_enlarged(small, conv))
    return Frames(results)


class GpuTinyDecoder(TinyDecoder):
    """A tiny decoder that runs the frames of one latent frame together: its state is too small for a group to pay."""

    name = TinyDecoder.name

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        x = torch.tanh(latents.to(next(self.parameters()).dtype) / 3) * 3
        pixels = []
        for frame in x.permute(0, 2, 3, 1).contiguous().split(1):
            pictures = F.pixel_shuffle(tiny_decoded(self, frame, state).permute(0, 3, 1, 2), self.spec.patch)
            pixels.append(pictures[-1:] if state.frames == 0 else pictures)
            state.frames += 1
        return torch.cat(pixels).clamp(0, 1) * 2 - 1


def tiny_decoded(model: TinyDecoder, latent: Tensor, state: StreamState) -> Tensor:
    """A latent frame [1, h, w, z] to its frames [T, H, W, C]."""
    x, enlarges = Frames([latent]), False
    for index, layer in enumerate(model.decoder):
        if isinstance(layer, MemoryBlock):
            x = remembered(layer, index, x, state)
        elif isinstance(layer, nn.Upsample):
            enlarges = True
        elif isinstance(layer, Grow):  # of single pixels, so that it may come before the upsampling
            x = Frames([conv_epilogue(pointwise(layer.conv, part), parts=layer.factor) for part in x.summed()])
        elif isinstance(layer, nn.Conv2d) and enlarges:
            x, enlarges = Frames([convolve_enlarged(part, layer) for part in x.summed()]), False
        elif isinstance(layer, nn.Conv2d):
            x = Frames([convolve_frames(part, layer.weight, 1) for part in x.summed()], layer.bias)
        elif isinstance(layer, nn.ReLU):
            x.relu = True
    return x.summed()[0]


def remembered(layer: MemoryBlock, index: int, x: Frames, state: StreamState) -> Frames:
    """A memory block: its first convolution reads a frame and the one before it as two steps in time."""
    first, _, second, _, third = cast(list[nn.Conv2d], layer.conv)
    history = state.history.get(index)
    buffer = InputBuffer(x.parts[0], 1, list(map(len, x.parts)), None if history is None else history[:, :, None])
    x.written(buffer.places())
    state.history[index] = buffer.history()[:, :, 0]
    weight = cast(Tensor, first.pair_weight)
    parts = [frames_of(F.conv3d(as_clip(window), weight, padding=(0, 1, 1))) for window in buffer.windows()]
    for conv, bias in ((second, first.bias), (third, second.bias)):
        parts = [convolve_frames(part, conv.weight, 1) for part in Frames(parts, bias, relu=True).summed()]
    return Frames(parts, third.bias, list(buffer.places()), relu=True)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {CausalVae: GpuCausalVae, TinyDecoder: GpuTinyDecoder}


def use_gpu_layers(module: Module) -> Module:
    """Replace the class of a decoder on a GPU that has the kernels, in place; returns others unchanged."""
    weight = next(module.parameters())
    has_kernels = weight.device.type == "cuda" and EPILOGUE.chosen(weight.device, weight.dtype) != "reference"
    return with_gpu_layers(module) if has_kernels else module


def with_gpu_layers(module: Module) -> Module:
    """Replace the class of a decoder, in place; weights of its convolutions are copied once to channels last."""
    decoder: nn.Module = module
    decoder.__class__ = LAYERS[type(module)]
    if isinstance(decoder, GpuCausalVae):
        weight, statistics = decoder.post_quant_conv.weight, (decoder.spec.std, decoder.spec.mean)
        decoder.statistics = torch.tensor(statistics, dtype=weight.dtype, device=weight.device)[:, None, :, None, None]
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if layer.weight.ndim == 4 else torch.channels_last_3d
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
    for layer in enlarged_convs(decoder):
        layer.phase_weight = phase_weight(layer.weight.detach())
    for first in (layer.conv[0] for layer in decoder.modules() if isinstance(layer, MemoryBlock)):
        first.pair_weight = pair_weight(cast(nn.Conv2d, first).weight.detach())
    return module


def with_plain_layers(module: Module) -> Module:
    """Copy a decoder that has the layers of a GPU, sharing its weights, with plain layers; others are returned."""
    plain = {fast: plain for plain, fast in LAYERS.items()}.get(type(module))
    if plain is None:
        return module
    copied: nn.Module = copy.copy(module)
    copied.__class__ = plain
    return cast(Module, copied)


def enlarged_convs(decoder: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of upsampled frames."""
    if isinstance(decoder, GpuTinyDecoder):
        grown = [index for index, layer in enumerate(decoder.decoder) if isinstance(layer, Grow)]
        return [cast(nn.Conv2d, decoder.decoder[index + 1]) for index in grown]
    return [cast(nn.Conv2d, layer.resample[1]) for layer in decoder.modules() if isinstance(layer, Upsample)]


def input_buffer(conv: CausalConv3d, parts: Sequence[Tensor], state: StreamState) -> InputBuffer:
    """An empty input of a convolution for frames like these."""
    return InputBuffer(parts[0], conv.kernel_size[0] - 1, [len(part) for part in parts], state.history.get(conv.slot))


def convolved(conv: CausalConv3d, buffer: InputBuffer, state: StreamState) -> Frames:
    """The frames of a convolution without its bias; its input becomes the stream's history."""
    state.history[conv.slot] = buffer.history()
    parts = [frames_of(F.conv3d(as_clip(window), conv.weight, padding=conv.padding)) for window in buffer.windows()]
    return Frames(parts, conv.bias)


def convolve_frames(x: Tensor, weight: Tensor, padding: int, stride: int = 1) -> Tensor:
    """A 2-D convolution of each frame, without its bias."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=padding).permute(0, 2, 3, 1).contiguous()


def convolve_enlarged(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution of 3x3, with its bias, of frames whose pixels are repeated twice in both directions.

    Each pixel of the result reads 2x2 small pixels, whose weights depend on its phase: 4/9 of the operations.
    """
    return join_phases(convolve_frames(x, cast(Tensor, conv.phase_weight), 1), bias=conv.bias)


def phase_weight(weight: Tensor) -> Tensor:
    """Weights [O, C, 3, 3] of an upsampled convolution as those [4 * O, C, 2, 2] of its phases over small pixels."""

    def halved(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        before, here, after = weight.unbind(dim)
        return torch.stack((before, here + after), dim), torch.stack((before + here, after), dim)

    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    phases = [phase for rows in halved(wide, 2) for phase in halved(rows, 3)]
    return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def pair_weight(weight: Tensor) -> Tensor:
    """Weights [O, 2C, 3, 3] over a frame and the one before it as those [O, C, 2, 3, 3] of two steps in time."""
    return torch.stack(weight.chunk(2, dim=1)[::-1], dim=2).contiguous(memory_format=torch.channels_last_3d)


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution of single pixels as a matrix product, with its bias."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def as_clip(x: Tensor) -> Tensor:
    """[T, H, W, C] to [1, C, T, H, W], a view whose memory is channels last."""
    return x[None].permute(0, 4, 1, 2, 3)


def frames_of(x: Tensor) -> Tensor:
    """[1, C, T, H, W] to [T, H, W, C]; a view where its memory is channels last."""
    return x[0].permute(1, 2, 3, 0).contiguous()


def rows(x: Tensor) -> Tensor:
    """[T, H, W, C] to [pixels, C]."""
    return x.view(-1, x.shape[-1])


def group_sizes(frames: int) -> list[int]:
    return [min(GROUP, frames - first) for first in range(0, frames, GROUP)]
