"""A bounded queue of one session's blocks, from their start until a reader takes them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..engine_condition import EngineCondition
from ..telemetry.records import Ack, BlockRecord


@dataclass(frozen=True)
class Block:
    """A finished block: latents [F, C, H, W], frames uint8 [T, H, W, 3] or None, seconds per stage.

    acks: the controls that it is the first to show. record: all that was measured.
    """

    index: int
    latents: Tensor
    frames: NDArray[np.uint8] | None
    timings: dict[str, float]
    acks: tuple[Ack, ...]
    record: BlockRecord

    def __repr__(self) -> str:
        frames = None if self.frames is None else list(self.frames.shape)
        return f"<Block {self.index}, latents {list(self.latents.shape)}, frames {frames}>"


class OutputQueue:
    """At most `room` blocks of one session, unfinished ones included."""

    def __init__(self, condition: EngineCondition, room: int) -> None:
        self.condition, self.room = condition, room
        self.ready: deque[Block] = deque()
        self.unfinished = 0  # begun, not ready
        self.touched = time.perf_counter()  # when a reader last took a block, or there was none to take

    def __len__(self) -> int:
        return len(self.ready) + self.unfinished

    @property
    def full(self) -> bool:
        return len(self) >= self.room

    def reserve(self) -> None:
        """Take room for one block that begins."""
        with self.condition:
            self.unfinished += 1

    def cancel(self) -> None:
        """Free the room of the newest unfinished block, which was rolled back."""
        with self.condition:
            self.unfinished -= 1
            self.condition.signal()

    def put(self, block: Block) -> None:
        """Add the oldest unfinished block, now finished."""
        with self.condition:
            if not self.ready:
                self.touched = time.perf_counter()
            self.unfinished -= 1
            self.ready.append(block)
            self.condition.signal()

    def take(self) -> Block | None:
        """The next block, if it is ready."""
        with self.condition:
            if not self.ready:
                return None
            self.touched = time.perf_counter()
            self.condition.signal()
            return self.ready.popleft()

    def put_back(self, block: Block) -> None:
        """Return a block that was taken and did not reach its reader."""
        with self.condition:
            self.ready.appendleft(block)
            self.condition.signal()

    def drop_from(self, index: int) -> int:
        """Drop finished blocks from `index` on; returns their number."""
        with self.condition:
            before = len(self.ready)
            self.ready = deque(block for block in self.ready if block.index < index)
            return before - len(self.ready)
