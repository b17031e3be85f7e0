"""The causal 3-D VAEs of Wan 2.1 and 2.2, frame by frame, with an explicit state of past frames.

Every temporal convolution reads its last input frames from `StreamState`, zeros at first. A stream decoded in any split
therefore equals the whole clip bit for bit. Parameter names are those of diffusers' AutoencoderKLWan.
Wan 2.2's VAE has 2x2 pixels as channels and an averaging or repeating shortcut beside each level.
Shapes inside: [1, C, T, H, W]. Source: Wan 2.1 (arXiv 2503.20314), section on the VAE.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoder import Decoder as StreamDecoder
from ..decoder import StreamState
from .vae_spec import VaeSpec


class CausalConv3d(nn.Conv3d):
    """A convolution over this chunk and the last `kernel - 1` frames before it."""

    def __init__(self, channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.slot = -1  # numbered by the VAE

    def stream(self, x: Tensor, state: StreamState) -> Tensor:
        past = self.kernel_size[0] - 1
        history = state.history.get(self.slot)
        if history is None:
            history = x.new_zeros(*x.shape[:2], past, *x.shape[3:])
        x = torch.cat((history, x), dim=2)
        state.history[self.slot] = x[:, :, -past:].contiguous()
        return self(x)


class ChannelNorm(nn.Module):
    """x / ||x|| over channels, times sqrt(C) and a gain."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * math.sqrt(len(self.gamma)) * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels, 3)
        self.conv1 = CausalConv3d(channels, out_channels, (3, 3, 3))
        self.norm2 = ChannelNorm(out_channels, 3)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.conv_shortcut = nn.Conv3d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        shortcut = self.conv_shortcut(x)
        x = self.conv1.stream(F.silu(self.norm1(x)), state)
        return self.conv2.stream(F.silu(self.norm2(x)), state) + shortcut


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        frames = by_frame(x)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        out = self.attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, frames.shape[2:])
        return x + by_clip(self.proj(out), len(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the pixels of each frame; all [T, 1, H*W, C]."""
        return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """Halves height and width, and time too where `temporal`."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        self.slot = -1

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = by_clip(self.resample(by_frame(x)), len(x))
        if self.time_conv is None:
            return x
        history = state.history.get(self.slot)
        state.history[self.slot] = x[:, :, -1:].contiguous()
        return x if history is None else self.time_conv(torch.cat((history, x), dim=2))


class Upsample(nn.Module):
    """Doubles height and width; doubles time first where `temporal`."""

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        if self.time_conv is not None and state.frames > 0:  # the first frame stays one, and enters no history
            x = self.interleaved(self.time_conv.stream(x, state))
        return by_clip(self.resample(self.enlarged(x)), len(x))

    def interleaved(self, x: Tensor) -> Tensor:
        """[B, 2C, T, H, W] to [B, C, 2T, H, W]: the halves of each frame's channels become two frames."""
        return x.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)

    def enlarged(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to frames [B*T, C, 2H, 2W], each pixel repeated."""
        wide = torch.promote_types(x.dtype, torch.float32)  # copies are not named: each is freed once it is read
        return F.interpolate(by_frame(x).to(wide), scale_factor=2.0, mode="nearest-exact").to(x.dtype)


class MidBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = layer(x, state)
        return x


class DownBlock(nn.Module):
    """A level of Wan 2.2's encoder; its shortcut averages the inputs of each output channel."""

    def __init__(self, channels: int, out_channels: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.factors = (2 if temporal else 1, 1 if temporal is None else 2)  # time, space
        self.resnets = nn.ModuleList(
            ResidualBlock(channels if index == 0 else out_channels, out_channels) for index in range(blocks)
        )
        self.downsampler = None if temporal is None else Downsample(out_channels, temporal)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        shortcut = self.averaged(x)
        for layer in self.resnets:
            x = layer(x, state)
        return shortcut + (x if self.downsampler is None else self.downsampler(x, state))

    def averaged(self, x: Tensor) -> Tensor:
        time, space = self.factors
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))  # zeros before the first frame, which has no partner
        x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return x.unflatten(1, (self.out_channels, -1)).mean(2)


class Encoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(spec.picture_channels, spec.base_channels, (3, 3, 3))
        self.down_blocks = nn.ModuleList()
        width = spec.base_channels
        for out, temporal in zip(spec.widths, [*spec.temporal_down, None], strict=True):
            if spec.shortcuts:
                self.down_blocks.append(DownBlock(width, out, spec.num_res_blocks, temporal))
            else:
                inputs = [width] + [out] * (spec.num_res_blocks - 1)
                self.down_blocks.extend(ResidualBlock(channels, out) for channels in inputs)
                if temporal is not None:
                    self.down_blocks.append(Downsample(out, temporal))
            width = out
        self.mid_block = MidBlock(width)
        self.norm_out = ChannelNorm(width, 3)
        self.conv_out = CausalConv3d(width, spec.z_dim * 2, (3, 3, 3))

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = self.conv_in.stream(x, state)
        for layer in (*self.down_blocks, self.mid_block):
            x = layer(x, state)
        return self.conv_out.stream(F.silu(self.norm_out(x)), state)


class UpBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(channels if index == 0 else out_channels, out_channels) for index in range(blocks)
        )
        halved = out_channels // 2
        self.upsamplers = nn.ModuleList([] if temporal is None else [Upsample(out_channels, halved, temporal)])

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, state)
        return x


class ShortcutUpBlock(nn.Module):
    """A level of Wan 2.2's decoder; its shortcut repeats each channel over its outputs."""

    def __init__(self, channels: int, out_channels: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.time = 2 if temporal else 1
        self.repeats = out_channels * self.time * 4 // channels
        self.resnets = nn.ModuleList(
            ResidualBlock(channels if index == 0 else out_channels, out_channels) for index in range(blocks)
        )
        self.upsampler = None if temporal is None else Upsample(out_channels, out_channels, temporal)

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        before = x
        for layer in self.resnets:
            x = layer(x, state)
        return x if self.upsampler is None else self.upsampler(x, state) + self.repeated(before, state)

    def repeated(self, x: Tensor, state: StreamState) -> Tensor:
        x = x.repeat_interleave(self.repeats, dim=1).unflatten(1, (-1, self.time, 2, 2))
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.time - 1 :] if state.frames == 0 else x  # the first frame stays one


class Decoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        width = spec.decoder_widths[0]
        self.conv_in = CausalConv3d(spec.z_dim, width, (3, 3, 3))
        self.mid_block = MidBlock(width)
        self.up_blocks = nn.ModuleList()
        for out, temporal in zip(spec.decoder_widths, [*reversed(spec.temporal_down), None], strict=True):
            if spec.shortcuts:
                self.up_blocks.append(ShortcutUpBlock(width, out, spec.num_res_blocks + 1, temporal))
                width = out
            else:
                self.up_blocks.append(UpBlock(width, out, spec.num_res_blocks + 1, temporal))
                width = out // 2 if temporal is not None else out
        self.norm_out = ChannelNorm(width, 3)
        self.conv_out = CausalConv3d(width, spec.picture_channels, (3, 3, 3))

    def forward(self, x: Tensor, state: StreamState) -> Tensor:
        x = self.conv_in.stream(x, state)
        for layer in (self.mid_block, *self.up_blocks):
            x = layer(x, state)
        return self.conv_out.stream(F.silu(self.norm_out(x)), state)


class CausalVae(StreamDecoder):
    """Encoder and decoder between pixels and normalised latents, both as streams."""

    spec: VaeSpec
    name = "CausalVae"
    zero_start = True

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.quant_conv = nn.Conv3d(spec.z_dim * 2, spec.z_dim * 2, 1)
        self.post_quant_conv = nn.Conv3d(spec.z_dim, spec.z_dim, 1)
        slots = [module for module in self.modules() if isinstance(module, CausalConv3d | Downsample)]
        for number, module in enumerate(slots):
            module.slot = number

    def encode(self, pixels: Tensor, state: StreamState) -> Tensor:
        """Encode pixels [T, 3, H, W] in [-1, 1] to normalised latents [F, z, H/s, W/s]; advances `state`.

        The first frame of a stream is one latent frame; after it every `temporal_stride` frames are one.
        Raises ValueError if the count of frames does not fit.
        """
        latents = []
        pixels, sizes = to_patches(pixels, self.spec.patch), self.chunks(len(pixels), state)
        for chunk in pixels.split(sizes):
            x = self.quant_conv(self.encoder(chunk.transpose(0, 1)[None], state))
            state.frames += 1
            latents.append(x[0, : self.spec.z_dim].transpose(0, 1))
        return (torch.cat(latents) - self._channels(self.spec.mean, pixels)) / self._channels(self.spec.std, pixels)

    def chunks(self, count: int, state: StreamState) -> list[int]:
        """Frames of each latent frame that `count` frames become; ValueError if they do not fit."""
        stride, first = self.spec.temporal_stride, int(state.frames == 0)
        if (count - first) % stride:
            raise ValueError(
                f"{count} frames cannot be encoded {'from the start' if first else 'here'}: "
                f"expected a multiple of {stride}{' plus 1' if first else ''}"
            )
        if count == 0:
            raise ValueError("0 frames cannot be encoded: expected at least 1")
        return [1] * first + [stride] * ((count - first) // stride)

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        """Decode normalised latents [F, z, h, w] to pixels [T, 3, s*h, s*w] in [-1, 1]; advances `state`.

        The first latent frame of a stream is one pixel frame, each later one is `temporal_stride` frames.
        """
        latents = latents.to(self.post_quant_conv.weight.dtype)
        z = latents * self._channels(self.spec.std, latents) + self._channels(self.spec.mean, latents)
        pixels = []
        for frame in z.split(1):
            x = self.decoder(self.post_quant_conv(frame.transpose(0, 1)[None]), state)
            state.frames += 1
            pixels.append(from_patches(x[0].transpose(0, 1), self.spec.patch))
        return torch.cat(pixels).clamp(-1, 1)

    def _channels(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[None, :, None, None]


def to_patches(x: Tensor, patch: int) -> Tensor:
    """[T, C, H, W] to [T, C*p*p, H/p, W/p]; of a patch's pixels, the column counts before the row."""
    x = F.pixel_unshuffle(x, patch).unflatten(1, (-1, patch, patch))
    return x.transpose(2, 3).flatten(1, 3)


def from_patches(x: Tensor, patch: int) -> Tensor:
    """[T, C*p*p, h, w] to [T, C, p*h, p*w]."""
    return F.pixel_shuffle(x.unflatten(1, (-1, patch, patch)).transpose(2, 3).flatten(1, 3), patch)


def by_frame(x: Tensor) -> Tensor:
    """[B, C, T, H, W] to [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def by_clip(x: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] to [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
