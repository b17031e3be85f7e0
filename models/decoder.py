"""Decoders of latents as the runtime sees them: streams with an explicit state, and what they cost by their sizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class StreamState:
    """State of an encoder or decoder in one stream: the last input frames by slot, and the count of frames so far."""

    history: dict[int, Tensor] = field(default_factory=dict)
    frames: int = 0

    def clone(self) -> StreamState:
        """Return an independent state; it shares the tensors, which are replaced and never written."""
        return StreamState(dict(self.history), self.frames)

    @property
    def begun(self) -> bool:
        """True once a frame has been decoded, or encoded."""
        return bool(self.history)

    @property
    def owned(self) -> dict[int, int]:
        """Bytes of each thing that it refers to, by an identity which states that share the thing have in common."""
        return {id(tensor): tensor.nbytes for tensor in tuple(self.history.values())}

    @property
    def nbytes(self) -> int:
        return sum(self.owned.values())


@dataclass(frozen=True)
class DecoderSpec(ABC):
    """Sizes of a decoder, and its costs as integers: FLOPs (a multiply and an add are 2), entries and bytes.

    z_dim: channels of the latents. latent: (height, width) of a latent frame.
    """

    z_dim: int

    @property
    @abstractmethod
    def temporal_stride(self) -> int:
        """Pictures of one latent frame."""

    @property
    @abstractmethod
    def spatial_stride(self) -> int:
        """Pixels a side of one latent pixel."""

    @property
    def tile_frames(self) -> int:
        """Latent frames that are decoded at once, whatever is decoded with them."""
        return 1

    @property
    @abstractmethod
    def encodes(self) -> bool:
        """True if there is an encoder, too."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Parameters loaded, those of an encoder included."""

    @property
    @abstractmethod
    def decoding_parameters(self) -> int:
        """Parameters that decoding reads."""

    @abstractmethod
    def state_entries(self, latent: tuple[int, int]) -> int:
        """Entries of a stream's decoder state after two latent frames."""

    def encoding_parts(self, pictures: int) -> range:
        """Pictures at which a video of that many pictures may be split to be encoded part by part."""
        return range(1, pictures, self.temporal_stride)

    @abstractmethod
    def decode_flops(self, latent: tuple[int, int], first: bool = False) -> int:
        """FLOPs of decoding one latent frame, the first of a stream or a later one."""

    @abstractmethod
    def encode_flops(self, latent: tuple[int, int]) -> int:
        """FLOPs of encoding one picture, the first of a stream; 0 without an encoder."""

    def edge_entries(self, first: bool = False) -> tuple[int, int]:
        """Entries that a rank which decodes some columns sends to a neighbour, and how often, for one latent frame.

        The entries are for each row of latents. first: the frame is the first of a stream.
        """
        raise NotImplementedError(f"{type(self).__name__} is not decoded by columns")

    @property
    def attended_entries(self) -> int:
        """Entries for each latent pixel of a frame that all ranks which decode some columns need; 0 without any."""
        return 0

    @abstractmethod
    def scratch_bytes(self, latent: tuple[int, int], frames: int, item: int, on_gpu: bool = False) -> int:
        """Upper bound of the bytes of decoding `frames` latent frames at once, besides weights, state and latents.

        item: bytes of an entry. on_gpu: with the layers of a GPU.
        """


class Decoder(nn.Module, ABC):
    """Decodes a stream of latents to pictures; with an encoder where its spec has one.

    name: of the decoder in results, whatever layers it runs. zero_start: a stream can start from zero caches, so that
    its first latent frame gives as many pictures as others.
    """

    spec: DecoderSpec
    name: str
    zero_start = False

    def new_state(self) -> StreamState:
        """Return the state before the first frame of a stream."""
        return StreamState()

    def whole_state(self, state: StreamState) -> StreamState:
        """Return a state of this decoder with its tensors in this process, as it is saved."""
        return state

    def own_state(self, saved: StreamState) -> StreamState:
        """Return the state of this decoder of which `whole_state` made `saved`."""
        return saved

    @abstractmethod
    def encode(self, pixels: Tensor, state: StreamState) -> Tensor:
        """Encode pixels [T, 3, H, W] in [-1, 1] to normalised latents [F, z, H/s, W/s]; advances `state`."""

    @abstractmethod
    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        """Decode normalised latents [F, z, h, w] to pixels [T, 3, s*h, s*w] in [-1, 1]; advances `state`."""
