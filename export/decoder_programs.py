"""Programs of an exported engine's decoder and encoder, as modules; a stream's state is among inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.decoder import Decoder, StreamState
from .programs import Program


class DecodeFrame(nn.Module):
    """One latent frame [1, z, h, w] to pictures [T, 3, H, W] in [-1, 1], then the state of each slot.

    first: the frame begins a stream and there is no state.
    """

    def __init__(self, vae: Decoder, slots: Sequence[int], first: bool) -> None:
        super().__init__()
        self.vae, self.slots, self.first = vae, tuple(slots), first

    def forward(self, latents: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        stream = StreamState(dict(zip(self.slots, state, strict=False)), 0 if self.first else 1)
        pixels = self.vae.decode(latents, stream)
        return pixels, *(stream.history[slot] for slot in self.slots if slot in stream.history)


class EncodeFrame(nn.Module):
    """Pictures [T, 3, H, W] in [-1, 1] of one latent frame to its latents [1, z, h, w], then the state of each slot.

    first: the frame begins a stream and there is no state.
    """

    def __init__(self, vae: Decoder, slots: Sequence[int], first: bool) -> None:
        super().__init__()
        self.vae, self.slots, self.first = vae, tuple(slots), first

    def forward(self, pixels: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        stream = StreamState(dict(zip(self.slots, state, strict=False)), 0 if self.first else 1)
        latents = self.vae.encode(pixels, stream)
        return latents, *(stream.history[slot] for slot in self.slots if slot in stream.history)


@dataclass(frozen=True)
class EncoderPrograms:
    """Programs of an encoder, the shape of each slot of its state, zero at first, and slots that the first returns."""

    programs: tuple[Program, ...]
    shapes: tuple[tuple[int, ...], ...]
    first_state: tuple[int, ...]


@dataclass(frozen=True)
class DecoderPrograms:
    """Programs of a decoder, the shape of each slot of its state, zero at first, and how a stream begins.

    first: the program of a stream's first frame. first_state: slots that it returns; it takes none if it is
    `decode_first`. first_pictures: how many of its last pictures are kept. pictures: of each later frame. frames:
    latent frames of a program, which stand for the frame in all this.
    """

    programs: tuple[Program, ...]
    shapes: tuple[tuple[int, ...], ...]
    first: str
    first_state: tuple[int, ...]
    first_pictures: int
    pictures: int
    frames: int


def decoder_programs(vae: Decoder, channels: int, height: int, width: int, zero_start: bool) -> DecoderPrograms:
    """Programs of a decoder over latents [1, channels, height, width], its slots read off a stream of two frames.

    One program serves every frame where the first differs only in how many of its pictures are kept.
    """
    frames = vae.spec.tile_frames
    blank = torch.zeros(frames, channels, height, width)
    state = vae.new_state()
    kept = len(vae.decode(blank, state))
    at_first = sorted(state.history)
    pictures = len(vae.decode(blank, state))
    slots = sorted(state.history)
    shapes = tuple(tuple(state.history[slot].shape) for slot in slots)
    indices = tuple(slots.index(slot) for slot in at_first)

    def describe(name: str, first: bool, given: list[Tensor], results: Sequence[int]) -> Program:
        names = ("latents", *(f"state_{index}" for index in range(len(given))))
        returned = ("pixels", *(f"next_{index}" for index in results))
        inputs = {"latents": blank, "state": given}
        return Program(name, DecodeFrame(vae, slots, first), inputs, {key: {} for key in inputs}, names, returned)

    following = describe("decode_next", False, [torch.zeros(shape) for shape in shapes], range(len(slots)))
    if zero_start or begins_as_it_goes_on(vae, blank.shape, shapes, slots):
        every = tuple(range(len(slots)))
        return DecoderPrograms((following,), shapes, "decode_next", every, kept, pictures, frames)
    first = describe("decode_first", True, [], indices)
    return DecoderPrograms((first, following), shapes, "decode_first", indices, kept, pictures, frames)


def encoder_programs(vae: Decoder, size: tuple[int, int], first: int, later: int) -> EncoderPrograms:
    """Programs of an encoder, its slots read off a stream of two frames. first, later: pictures of a latent frame."""
    width, height = size
    blanks = [torch.zeros(count, 3, height, width) for count in (first, later)]
    state, seen = vae.new_state(), list[list[int]]()
    for blank in blanks:
        vae.encode(blank, state)
        seen.append(sorted(state.history))
    at_first, slots = seen
    shapes = tuple(tuple(state.history[slot].shape) for slot in slots)
    indices = tuple(slots.index(slot) for slot in at_first)

    def describe(name: str, blank: Tensor, given: list[Tensor], results: Sequence[int]) -> Program:
        names = ("pixels", *(f"state_{index}" for index in range(len(given))))
        returned = ("latents", *(f"next_{index}" for index in results))
        inputs = {"pixels": blank, "state": given}
        return Program(name, EncodeFrame(vae, slots, not given), inputs, {key: {} for key in inputs}, names, returned)

    following = describe("encode_next", blanks[1], [torch.zeros(shape) for shape in shapes], range(len(slots)))
    return EncoderPrograms((describe("encode_first", blanks[0], [], indices), following), shapes, indices)


def begins_as_it_goes_on(
    vae: Decoder, shape: Sequence[int], shapes: Sequence[tuple[int, ...]], slots: Sequence[int]
) -> bool:
    """True if a stream's first pictures are the last that any later frame gives over a state of zeros."""
    latents = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    first = StreamState()
    later = StreamState({slot: torch.zeros(size) for slot, size in zip(slots, shapes, strict=True)}, 1)
    begun, gone_on = vae.decode(latents, first), vae.decode(latents, later)
    same = all(torch.equal(first.history[slot], later.history[slot]) for slot in first.history)
    return same and first.history.keys() == later.history.keys() and torch.equal(begun, gone_on[-len(begun) :])
