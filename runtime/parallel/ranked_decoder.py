"""The decoder of several ranks, in the process of rank 0: each rank decodes some columns, and keeps their state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...models.decoder import Decoder, StreamState
from ..plans import Decode, ReadDecoding, SetDecoding
from ..worker_client import Handle, WorkerClient


@dataclass
class RankedState(StreamState):
    """The state of a stream, whose tensors the ranks keep. handle: of the state there; None before the first frame.

    bytes_here: of rank 0's part. An encoder's state has its tensors here.
    """

    handle: Handle | None = None
    bytes_here: int = 0

    def clone(self) -> RankedState:
        return RankedState(dict(self.history), self.frames, self.handle, self.bytes_here)

    @property
    def begun(self) -> bool:
        return self.handle is not None or super().begun

    @property
    def owned(self) -> dict[int, int]:
        return super().owned if self.handle is None else {self.handle.number: self.bytes_here}


class RankedDecoder(Decoder):
    """Decodes on all ranks, between two passes; encodes on rank 0. whole: the decoder of which each has its columns."""

    def __init__(self, whole: Decoder, client: WorkerClient, ranks: int) -> None:
        super().__init__()
        self.whole, self.client, self.ranks = whole, client, ranks
        self.spec, self.zero_start, self.name = whole.spec, whole.zero_start, whole.name

    def state_dict(self, *args: Any, **keywords: Any) -> Any:
        return self.whole.state_dict(*args, **keywords)

    def new_state(self) -> RankedState:
        return RankedState()

    def encode(self, pixels: Tensor, state: StreamState) -> Tensor:
        return self.whole.encode(pixels, state)

    def decode(self, latents: Tensor, state: StreamState) -> Tensor:
        assert isinstance(state, RankedState)
        after = self.client.handle()
        before = None if state.handle is None else state.handle.number
        (pixels,) = self.client.execute(Decode(before, after.number, state.frames), latents)
        state.handle, state.frames = after, state.frames + len(latents)
        entries, kind = self.spec.state_entries((latents.shape[-2], latents.shape[-1])), pixels.dtype
        state.bytes_here = entries * kind.itemsize // self.ranks
        return pixels

    def whole_state(self, state: StreamState) -> StreamState:
        assert isinstance(state, RankedState)
        if state.handle is None:
            return StreamState({}, state.frames)
        slots, *tensors = self.client.execute(ReadDecoding(state.handle.number))
        return StreamState(dict(zip(slots.tolist(), tensors, strict=True)), state.frames)

    def own_state(self, saved: StreamState) -> RankedState:
        if not saved.begun:
            return RankedState({}, saved.frames)
        handle, tensors = self.client.handle(), saved.history.values()
        columns = min(tensor.shape[-1] for tensor in tensors)  # the first layer's state has the size of latents
        self.client.execute(SetDecoding(handle.number, columns, tuple(saved.history)), *tensors)
        return RankedState({}, saved.frames, handle, saved.nbytes // self.ranks)
